"""Knowledge distillation loss against the teacher's soft labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, take_rows, to_float32
from setfit_kd.memory.devices import to_device
from setfit_kd.utils.arrays import Floats

NO_GOLD = -1  # stands for the gold class of a text without a gold label


class SoftLabelLoss(BatchLoss):
    """KL divergence between the teacher's and the student's class probabilities at a temperature T.

    With several labels per text, it is the sum of the divergences of the labels, and likewise the cross-entropy below.

    The loss of a text is T² KL(teacher at T ‖ student at T). For a text with a gold label, this term has weight
    1 - alpha, and the cross-entropy against the gold label at T = 1 has weight alpha. The loss is the mean over the
    batch. A linear head, part of the loss, maps embeddings to logits. It is trained together with the body and
    discarded after training, when the student's own head is fitted at T = 1.

    Args:
        probabilities: (n, n_classes) of the teacher, one row per pool text; rows sum to 1 unless multi-label.
        dimension: Dimension of the student's embeddings.
        gold: (n,) row of each pool text in ``gold_targets``, or `NO_GOLD`; None if no text has gold labels.
        gold_targets: (m, n_classes) gold labels, 0 or 1.
        is_multi_label: Whether the probabilities are those of independent labels.
        temperature: T, above 0.
        alpha: Weight of the gold label, from 0 to 1.
        model, options: See `BatchLoss`.

    References:
        - Hinton, Vinyals and Dean, 2015, "Distilling the Knowledge in a Neural Network".

    Inputs:
        One text column; labels are (B,) integers, the row of each text in the signals.

    Example:
        >>> import numpy as np, torch
        >>> probabilities = np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32)
        >>> loss = SoftLabelLoss(torch.nn.Identity(), probabilities, dimension=2, temperature=2.0)
        >>> loss.init_head(np.eye(2), np.zeros(2))  # the embeddings are the logits
        >>> logits = torch.tensor([[7.0, 7.0], [3.0, 0.0]])
        >>> round(loss.compute_loss([logits], torch.tensor([0, 0])).item(), 3)
        0.517
    """

    def __init__(
        self,
        model: nn.Module,
        probabilities: Floats,
        *,
        dimension: int,
        gold: npt.NDArray[np.int64] | None = None,
        gold_targets: Floats | None = None,
        is_multi_label: bool = False,
        temperature: float = 1.0,
        alpha: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.probabilities, self.gold, self.temperature, self.alpha = probabilities, gold, temperature, alpha
        self.gold_targets, self.is_multi_label = gold_targets, is_multi_label
        self.head = nn.Linear(dimension, probabilities.shape[1])

    def init_head(self, coef: Floats, intercept: Floats) -> None:
        """Initialize the head with a fitted one: ``coef`` (n_classes, d) and ``intercept`` (n_classes,).

        The learning rate of a body is far too small to train a random head.
        """
        with torch.no_grad():
            self.head.weight.copy_(torch.as_tensor(coef).reshape(self.head.weight.shape))
            self.head.bias.copy_(torch.as_tensor(intercept).reshape(self.head.bias.shape))

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the mean over the texts of the soft-label term and, for texts with a gold label, the gold term."""
        (rows,) = embeddings
        logits = to_float32(self.head(rows.to(self.head.weight)))  # (B, n_classes)
        soft_labels = take_rows(self.probabilities, labels, logits)
        tiny = torch.finfo(logits.dtype).tiny
        teacher_logits = soft_labels.clamp_min(tiny).log()
        if self.is_multi_label:
            # Each label is a distribution over two outcomes, the second with the logit 0: (B, n_classes, 2).
            teacher_logits = _with_complement(teacher_logits - (1 - soft_labels).clamp_min(tiny).log())
            logits = _with_complement(logits)
        target = torch.log_softmax(teacher_logits / self.temperature, dim=-1)
        student = torch.log_softmax(logits / self.temperature, dim=-1)
        soft = self.temperature**2 * (target.exp() * (target - student)).flatten(1).sum(dim=1)  # (B,)
        if self.gold is None or self.gold_targets is None:
            return soft.mean()
        gold = self.gold[labels.numpy()]
        gold_labels = take_rows(self.gold_targets, torch.as_tensor(gold), logits)
        if self.is_multi_label:
            gold_labels = _with_complement(gold_labels, 1 - gold_labels)
        hard = -(gold_labels * torch.log_softmax(logits, dim=-1)).flatten(1).sum(dim=1)
        share = to_device(torch.as_tensor(self.alpha * (gold != NO_GOLD), dtype=logits.dtype), logits.device)
        return (share * hard + (1 - share) * soft).mean()


def _with_complement(values: Tensor, others: Tensor | None = None) -> Tensor:
    return torch.stack([values, torch.zeros_like(values) if others is None else others], dim=-1)
