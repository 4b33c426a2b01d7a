"""Weighted sum of several losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss


class WeightedSumLoss(BatchLoss):
    """Weighted sum of losses over the same batch, which is embedded only once.

    Args:
        parts: Pairs of weight and loss. The options of the losses are ignored.
        model, options: See `BatchLoss`.

    Inputs:
        As for the losses, which must all expect the same text column and labels.

    Example:
        >>> import numpy as np, torch
        >>> teacher, body = np.eye(2, dtype=np.float32), torch.nn.Identity()
        >>> from setfit_kd.losses.embedding import EmbeddingLoss
        >>> from setfit_kd.losses.similarity import SimilarityLoss
        >>> similarity = SimilarityLoss(body, teacher)
        >>> embedding = EmbeddingLoss(body, teacher, dimension=2)
        >>> loss = WeightedSumLoss(body, [(1.0, similarity), (0.5, embedding)])
        >>> loss.compute_loss([torch.tensor([[1.0, 0.0], [1.0, 0.0]])], torch.tensor([0, 1])).item()
        1.25
    """

    def __init__(self, model: nn.Module, parts: Sequence[tuple[float, BatchLoss]], **options: Any) -> None:
        super().__init__(model, **options)
        self.weights = [weight for weight, _ in parts]
        self.parts = nn.ModuleList(part for _, part in parts)

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the weighted sum of the losses."""
        losses = [part.compute_loss(embeddings, labels) for part in self.parts if isinstance(part, BatchLoss)]
        first, *others = (weight * loss for weight, loss in zip(self.weights, losses, strict=True))
        return sum(others, first)
