"""What all objectives share: embedding the batch, with dropout off unless asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


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
        embeddings = [self.model(dict(features))["sentence_embedding"] for features in sentence_features]
        return self.loss(embeddings, labels)

    @abstractmethod
    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of ``embeddings``, one (B, d) tensor a text column, and ``labels`` (B,): a scalar."""


def cosine_matrix(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs of rows: (B, d) to (B, B)."""
    unit = nn.functional.normalize(embeddings, dim=1)
    return unit @ unit.T
