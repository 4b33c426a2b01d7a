"""Base class of the losses, which embeds whole batches with gradient caching."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from setfit_kd.memory.devices import to_device
from setfit_kd.utils.arrays import Floats, iter_batches

CPU_TOKENS = 768  # tokens per forward pass on a CPU, where padding a whole batch to its longest text is expensive


class BatchLoss(nn.Module, ABC):
    """Loss over the embeddings of a whole batch, with gradients computed micro-batch by micro-batch.

    Each micro-batch is embedded without keeping its activations, and embedded again in the backward pass (gradient
    caching). Loss and gradient are the same for any micro-batch size. Memory is that of one micro-batch, for a third
    more compute.

    Args:
        model: The body to train.
        dropout: Keep the body's dropout on. Off by default: it disturbs a student that must reproduce the teacher's
            geometry.
        micro_batch_size: Maximum number of texts whose activations are kept in memory; None is the whole batch.

    References:
        - Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".

    Inputs:
        sentence_features: One feature mapping per text column, of B texts each, as in sentence-transformers.
        labels: (B,) numbers on the CPU; their meaning depends on the loss.
    """

    shared_embed: Callable[[dict[str, Tensor], int], Tensor] | None = None  # set if other processes embed texts, too

    def __init__(self, model: nn.Module, *, dropout: bool = False, micro_batch_size: int | None = None) -> None:
        super().__init__()
        self.model, self.dropout, self.micro_batch_size = model, dropout, micro_batch_size

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Embed each text column and compute the loss, a scalar."""
        # The trainer sets training mode before every step. Gradients also flow in evaluation mode.
        self.model.train(self.dropout)
        columns = list(sentence_features)
        return self.compute_loss([self.embed(features, n_columns=len(columns)) for features in columns], labels)

    def embed(self, features: dict[str, Tensor], *, n_columns: int = 1) -> Tensor:
        """Embed one of ``n_columns`` text columns, with features of B texts padded to T tokens: (B, d)."""
        if self.shared_embed is not None and "attention_mask" in features and torch.is_grad_enabled():
            return self.shared_embed(features, n_columns)
        return self.embed_rows(features, n_columns=n_columns)

    def embed_rows(self, features: dict[str, Tensor], *, n_columns: int = 1) -> Tensor:
        """Embed texts as in `embed`, in this process.

        Texts are sorted by length and embedded in micro-batches, or on a CPU in chunks of `CPU_TOKENS`, each cut to its
        longest text. Embeddings and gradients are the same as in one pass, except for the random draws of dropout.
        """
        batches, chunks = self.split(features, n_columns=n_columns)
        if len(batches) == 1:
            return self._encode(features)
        encode = self.recomputed(self._encode)
        embeddings = [encode(chunk) for chunk in chunks]
        return torch.cat(embeddings)[torch.from_numpy(np.argsort(np.concatenate(batches))).to(embeddings[0].device)]

    def recomputed(self, function: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
        """Return a function of features that is computed again in the backward pass if there are micro-batches."""
        if self.micro_batch_size is None or not torch.is_grad_enabled():
            return function
        # Both passes draw the same dropout masks.
        return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=self.dropout)

    def split(
        self, features: dict[str, Tensor], *, n_columns: int = 1
    ) -> tuple[list[npt.NDArray[np.int64]], Iterator[dict[str, Tensor]]]:
        """Split a batch into chunks; return the rows of each chunk, and the features of each."""
        mask = features.get("attention_mask")  # (B, T); static bodies have none and need no chunks
        if mask is None:
            return [np.arange(0)], iter([features])
        max_texts, max_tokens = self.micro_batch_size or len(mask), math.inf
        if mask.device.type == "cpu":
            max_tokens = CPU_TOKENS
        if len(mask) * (1 if self.micro_batch_size is None else n_columns) <= max_texts and mask.numel() <= max_tokens:
            return [np.arange(len(mask))], iter([features])
        lengths = text_lengths(mask)
        batches = list(iter_batches(lengths, max_texts, max_tokens))
        return batches, (take_texts(features, mask, batch, int(lengths[batch[0]])) for batch in batches)

    def _encode(self, features: dict[str, Tensor]) -> Tensor:
        # Pass a copy, because the body's modules write their outputs into it.
        return cast("Tensor", self.model(dict(features))["sentence_embedding"])

    @abstractmethod
    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the loss, a scalar, from one (B, d) tensor of embeddings per text column and (B,) labels."""


def text_lengths(mask: Tensor) -> npt.NDArray[np.int64]:
    """Return the number of tokens of each text in an attention mask (B, T) that must be kept if it is cut."""
    lengths: npt.NDArray[np.int64] = mask.sum(dim=1).numpy(force=True)
    if not mask[:, 0].all():  # padded on the left, where texts are not cut
        lengths[:] = mask.shape[1]
    return lengths


def take_texts(
    features: dict[str, Tensor], mask: Tensor, batch: npt.NDArray[np.int64], length: int
) -> dict[str, Tensor]:
    """Take some rows of the features, cut to a length."""
    rows = torch.from_numpy(batch).to(mask.device)
    length = -(-length // 8) * 8  # torch caches compiled kernels for every shape
    return {
        name: (value[rows, :length] if value.shape[:2] == mask.shape else value[rows])
        if isinstance(value, Tensor) and value.shape[:1] == mask.shape[:1]
        else value
        for name, value in features.items()
    }


def to_float32(embeddings: Tensor) -> Tensor:
    """Convert half precision to float32, because cosines near 1 need more digits."""
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


def cosine_matrix(embeddings: Tensor) -> Tensor:
    """Compute the cosines of all pairs of rows: (B, d) to (B, B)."""
    unit = nn.functional.normalize(to_float32(embeddings), dim=1)
    return unit @ unit.T


def take_rows(array: Floats, labels: Tensor, like: Tensor) -> Tensor:
    """Read only the rows ``labels`` (B,) of an (n, ...) array, with the type and device of another tensor."""
    rows = torch.from_numpy(np.asarray(array[labels.numpy()], np.float32))
    return to_device(rows, like.device).to(like.dtype)
