"""Loss against the teacher's similarity matrix of each batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, cosine_matrix, take_rows
from setfit_kd.utils.arrays import Floats


class SimilarityLoss(BatchLoss):
    """Mean squared difference between the student's and the teacher's cosine matrix of a batch.

    The diagonals of the two (B, B) matrices are ignored. B texts give B(B-1)/2 targets for B forward passes. Teacher
    and student may differ in dimension.

    Args:
        teacher_embeddings: (n, d), one row per pool text. Targets are computed from the B rows of each batch, so
            memory is O(n d), never O(n²).
        weights: (n,) weight of each pool text; the weight of a pair is the product of the weights of its texts. None
            weights all pairs equally.
        model, options: See `BatchLoss`.

    References:
        - Tung and Mori, 2019, "Similarity-Preserving Knowledge Distillation".

    Inputs:
        One text column; labels are (B,) integers, the row of each text in ``teacher_embeddings``.

    Example:
        >>> import numpy as np, torch
        >>> teacher = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=np.float32)
        >>> loss = SimilarityLoss(torch.nn.Identity(), teacher)
        >>> rotated = torch.tensor([[0.0, 2.0, 0.0], [-3.0, 0.0, 0.0]])  # other lengths, same angle
        >>> loss.compute_loss([rotated], torch.tensor([0, 1])).item()
        0.0
    """

    def __init__(
        self, model: nn.Module, teacher_embeddings: Floats, *, weights: Floats | None = None, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.teacher_embeddings, self.weights = teacher_embeddings, weights

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the weighted mean squared difference of the cosines over all pairs of different texts."""
        (rows,) = embeddings
        student = cosine_matrix(rows)
        target = cosine_matrix(take_rows(self.teacher_embeddings, labels, student))
        weight = 1 - torch.eye(len(labels), dtype=student.dtype, device=student.device)
        if self.weights is not None:
            text_weight = take_rows(self.weights, labels, student)
            text_weight = text_weight / text_weight.max().clamp_min(torch.finfo(text_weight.dtype).tiny)
            weight = weight * text_weight[:, None] * text_weight[None, :]
        total = weight.sum()
        # If all weights are zero, the loss is 0, not 0 / 0.
        return ((student - target).square() * weight).sum() / total.clamp_min(torch.finfo(weight.dtype).tiny)
