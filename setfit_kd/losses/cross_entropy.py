"""Cross-entropy loss against the gold labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, to_float32
from setfit_kd.memory.devices import to_device


class CrossEntropyLoss(BatchLoss):
    """Mean cross-entropy against the gold labels; of several labels per text, also over the labels.

    Args:
        head: Maps (B, d) embeddings to (B, n_classes) logits; of pairs, the (B, 3 d) features (u, v, |u - v|) of their
            embeddings. Trained together with the body.
        model, options: See `BatchLoss`.

    References:
        - Reimers and Gurevych, 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks" (pairs).

    Inputs:
        One text column, or two with the texts of pairs; labels are (B,) integers, the gold class of each text or pair,
        or (B, n_classes) bool, its labels.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(2, 2)
        >>> _ = head.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        >>> loss = CrossEntropyLoss(torch.nn.Identity(), head)
        >>> round(loss.compute_loss([torch.tensor([[3.0, 0.0], [0.0, 0.0]])], torch.tensor([0, 1])).item(), 3)
        0.371
    """

    def __init__(self, model: nn.Module, head: nn.Linear, **options: Any) -> None:
        super().__init__(model, **options)
        self.head = head

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy over the texts or pairs."""
        rows, *others = (column.to(self.head.weight) for column in embeddings)
        for second in others:
            rows = torch.cat([rows, second, (rows - second).abs()], dim=1)
        logits = to_float32(self.head(rows))  # (B, n_classes)
        labels = to_device(labels, logits.device)
        if labels.ndim == 2:
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return nn.functional.cross_entropy(logits, labels)
