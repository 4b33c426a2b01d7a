"""Classification loss over sentence pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, to_float32
from setfit_kd.memory.devices import to_device


class PairClassificationLoss(BatchLoss):
    """Cross-entropy of a linear classifier of sentence pairs on the features (u, v, |u - v|) of their embeddings.

    The classifier is part of the loss, trained together with the body and discarded afterwards.

    Args:
        dimension: Dimension d of the embeddings.
        n_classes: Number of classes.
        model, options: See `BatchLoss`.

    References:
        - Reimers and Gurevych, 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks".

    Inputs:
        Two text columns; labels are (B,) integers, the class of each pair.

    Example:
        >>> import torch
        >>> loss = PairClassificationLoss(torch.nn.Identity(), dimension=2, n_classes=2)
        >>> for parameter in loss.classifier.parameters():
        ...     _ = torch.nn.init.zeros_(parameter)
        >>> round(loss.compute_loss([torch.eye(2), torch.eye(2)], torch.tensor([0, 1])).item(), 3)
        0.693
    """

    def __init__(self, model: nn.Module, *, dimension: int, n_classes: int, **options: Any) -> None:
        super().__init__(model, **options)
        self.classifier = nn.Linear(3 * dimension, n_classes)

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy over the pairs."""
        u, v = (rows.to(self.classifier.weight) for rows in embeddings)
        logits = to_float32(self.classifier(torch.cat([u, v, (u - v).abs()], dim=1)))  # (B, n_classes)
        return nn.functional.cross_entropy(logits, to_device(labels, logits.device))
