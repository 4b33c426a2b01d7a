"""What all objectives share: embedding the batch, with dropout off unless asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


CPU_PART = 16


class Objective(nn.Module, ABC):
    """A loss over embeddings.

    Args:
        model: The body to train.
        dropout: Keep the body's dropout on. Off by default: a student that must reproduce the teacher's geometry is
            only disturbed by it.

    Inputs, as sentence-transformers' trainer hands them over: one feature mapping a text column, of B texts each, and
    ``labels``, B numbers whose meaning is the objective's own.
    """

    def __init__(self, model: SentenceTransformer, *, dropout: bool = False) -> None:
        super().__init__()
        self.model = model
        self.dropout = dropout

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Embed each column and return the loss, a scalar."""
        # The trainer sets training mode before every step; in evaluation mode gradients flow all the same.
        self.model.train(self.dropout)
        return self.loss([self.embed(features) for features in sentence_features], labels)

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Embed one column of B texts, padded on the right to T tokens: (B, d).

        A batch is padded to its longest text, and on a CPU every padded token costs. There, the texts go through the
        body sorted by length in parts of `CPU_PART`, each cut to its own longest. Embeddings and gradients are the
        same as without, but for the draws of dropout where that is on.
        """
        mask = features.get("attention_mask")  # (B, T)
        is_sortable = mask is not None and mask.device.type == "cpu" and bool(mask[:, 0].all())
        if mask is None or not is_sortable or len(mask) <= CPU_PART:
            return cast("Tensor", self.model(dict(features))["sentence_embedding"])
        lengths = mask.sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        parts = []
        for rows in torch.split(order, CPU_PART):
            longest = int(lengths[rows[0]])
            part = {
                name: value[rows, :longest] if isinstance(value, Tensor) and value.shape == mask.shape else value
                for name, value in features.items()
            }
            parts.append(self.model(part)["sentence_embedding"])
        return torch.cat(parts)[order.argsort()]

    @abstractmethod
    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of ``embeddings``, one (B, d) tensor a text column, and ``labels`` (B,): a scalar."""


def at_least_float32(embeddings: Tensor) -> Tensor:
    """The same numbers, half precision made single: cosines near 1 need more digits than it has."""
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


def cosine_matrix(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs of rows: (B, d) to (B, B)."""
    unit = nn.functional.normalize(at_least_float32(embeddings), dim=1)
    return unit @ unit.T
