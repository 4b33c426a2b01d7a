"""The gold labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, LossOptions, to_float32

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from typing_extensions import Unpack


class CrossEntropyLoss(BatchLoss):
    """Make a classifier's most probable class the gold one: the mean cross-entropy over a batch.

    Labels: (B,) integers, the gold classes.

    Args:
        model: The body to train.
        head: From (B, d) embeddings to (B, n_classes) logits; trained along.
        options: As `BatchLoss`.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(2, 2)
        >>> _ = head.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        >>> objective = CrossEntropyLoss(torch.nn.Identity(), head)
        >>> round(objective.loss([torch.tensor([[3.0, 0.0], [0.0, 0.0]])], torch.tensor([0, 1])).item(), 3)
        0.371
    """

    def __init__(self, model: SentenceTransformer, head: nn.Linear, **options: Unpack[LossOptions]) -> None:
        super().__init__(model, **options)
        self.head = head

    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Mean of the texts' cross-entropies."""
        (rows,) = embeddings
        logits = to_float32(self.head(rows.to(self.head.weight)))  # (B, n_classes)
        return nn.functional.cross_entropy(logits, labels)
