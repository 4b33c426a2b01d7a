"""What all objectives share: embedding the batch, with dropout off unless asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


CPU_CHUNK = 16
"""Texts that pass through the body at once on a CPU, where padding to the longest of a whole batch is what costs."""


class LossOptions(TypedDict, total=False):
    """What every objective can be told about its passes; see `BatchLoss`."""

    dropout: bool
    micro_batch_size: int | None


class BatchLoss(nn.Module, ABC):
    """A loss over embeddings, computed on whole batches whatever fits in memory.

    Args:
        model: The body to train.
        dropout: Keep the body's dropout on. Off by default: a student that must reproduce the teacher's geometry is
            only disturbed by it.
        micro_batch_size: Most texts whose activations are held at once. The loss is still that of the whole batch:
            each micro-batch is embedded without keeping its activations, and embedded again when the gradient comes
            back to it (gradient caching: Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
            Limited Setup"). Memory is that of one micro-batch, for a third more compute; loss and gradient are the
            same at any size. None holds the whole batch.

    Inputs, as sentence-transformers' trainer hands them over: one feature mapping a text column, of B texts each, and
    ``labels``, B numbers whose meaning is the objective's own.
    """

    def __init__(
        self, model: SentenceTransformer, *, dropout: bool = False, micro_batch_size: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.dropout = dropout
        self.micro_batch_size = micro_batch_size

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Embed each column and return the loss, a scalar."""
        # The trainer sets training mode before every step; in evaluation mode gradients flow all the same.
        self.model.train(self.dropout)
        columns = list(sentence_features)
        return self.loss([self.embed(features, n_columns=len(columns)) for features in columns], labels)

    def embed(self, features: dict[str, Tensor], *, n_columns: int = 1) -> Tensor:
        """Embed one of ``n_columns`` columns of B texts, padded to T tokens: (B, d).

        In micro-batches, and on a CPU in parts of `CPU_CHUNK`, texts go through the body sorted by length, each part
        cut to its own longest. Embeddings and gradients are the same as without, but for the draws of dropout where
        that is on.
        """
        mask = features.get("attention_mask")  # (B, T); a body without one, such as a static one, needs no parts
        if mask is None:
            return self._encode(features)
        size = self.micro_batch_size or (CPU_CHUNK if mask.device.type == "cpu" else len(mask))
        fits = n_columns * len(mask) <= size
        if fits or (self.micro_batch_size is None and len(mask) <= size):
            return self._encode(features)
        recompute = self.micro_batch_size is not None and torch.is_grad_enabled()
        lengths = mask.sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        padded_right = bool(mask[:, 0].all())
        parts = []
        for rows in torch.split(order, size):
            longest = int(lengths[rows[0]]) if padded_right else mask.shape[1]
            part = {name: _rows_of(value, rows, longest, like=mask) for name, value in features.items()}
            parts.append(
                # The masks of dropout are drawn again from the same state.
                checkpoint(self._encode, part, use_reentrant=False, preserve_rng_state=self.dropout)
                if recompute
                else self._encode(part)
            )
        return torch.cat(parts)[order.argsort()]

    def _encode(self, features: dict[str, Tensor]) -> Tensor:
        # A copy, since the body's modules leave their activations in what they are given.
        return cast("Tensor", self.model(dict(features))["sentence_embedding"])

    @abstractmethod
    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of ``embeddings``, one (B, d) tensor a text column, and ``labels`` (B,): a scalar."""


def _rows_of(value: Tensor, rows: Tensor, longest: int, *, like: Tensor) -> Tensor:
    """Some rows of a feature of B texts, without the padding past ``longest``; anything else as it is."""
    if not isinstance(value, Tensor) or value.shape[:1] != like.shape[:1]:
        return value
    return value[rows, :longest] if value.shape[:2] == like.shape else value[rows]


def to_float32(embeddings: Tensor) -> Tensor:
    """The same numbers, half precision made single: cosines near 1 need more digits than it has."""
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


def cosine_matrix(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs of rows: (B, d) to (B, B)."""
    unit = nn.functional.normalize(to_float32(embeddings), dim=1)
    return unit @ unit.T


def rows_at(array: npt.NDArray[np.floating], labels: Tensor) -> Tensor:
    """The rows ``labels`` (B,) of an (n, ...) array, as float32 on the labels' device; no other row is read."""
    return torch.as_tensor(np.asarray(array[labels.cpu().numpy()], np.float32), device=labels.device)
