"""Base class of the losses over the tokens of texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss


class TokenLoss(BatchLoss):
    """Mean loss over targets in the texts of a batch, which is computed chunk by chunk.

    Args:
        model: The body to train, with an output for each token.
        teacher: A body that the loss runs on the same tokens, without training it; None without distillation.
        options: See `BatchLoss`.

    Inputs:
        One column, whose features include the targets. Labels are not used.
    """

    def __init__(self, model: nn.Module, *, teacher: nn.Module | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self._teacher = (teacher,)  # hidden from the optimizer

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, in evaluation mode and on the device of the model."""
        (teacher,) = self._teacher
        if teacher is None:
            return None
        return teacher.to(next(self.model.parameters()).device).eval()

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Compute the loss, a scalar."""
        self.model.train(self.dropout)
        (features,) = sentence_features
        _, chunks = self.split(features)
        sum_loss = self.recomputed(self.sum_loss)
        return torch.stack([sum_loss(chunk) for chunk in chunks]).sum() / max(self.count_targets(features), 1)

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Not used: this loss has no embeddings of texts."""
        raise NotImplementedError

    @abstractmethod
    def sum_loss(self, features: dict[str, Tensor]) -> Tensor:
        """Compute the sum of the losses of all targets in the features of a chunk."""

    @abstractmethod
    def count_targets(self, features: dict[str, Tensor]) -> int:
        """Count the targets in the features of a batch."""
