"""The teacher's similarity matrix, batch by batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from setfit_kd.losses.base import BatchLoss, LossOptions, cosine_matrix, rows_at

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from typing_extensions import Unpack


class SimilarityLoss(BatchLoss):
    """Make the student's cosines of a batch those of the teacher.

    The mean squared difference between the two B by B cosine matrices, diagonal left out (Tung and Mori, 2019,
    "Similarity-Preserving Knowledge Distillation"). B texts give B(B-1)/2 targets for B forward passes. Teacher and
    student may differ in dimension.

    Labels: (B,) integers, each text's row in the teacher's embeddings.

    Args:
        model: The student's body.
        teacher_embeddings: (n, d), a row a pool text. Targets are made of the B rows of a batch alone: memory is
            O(n d), never O(n²).
        weights: (n,) weight of each pool text; a pair weighs the product of its two. None weighs all pairs alike.
        options: As `BatchLoss`.

    Example:
        >>> import numpy as np, torch
        >>> teacher = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=np.float32)
        >>> objective = SimilarityLoss(torch.nn.Identity(), teacher)
        >>> turned = torch.tensor([[0.0, 2.0, 0.0], [-3.0, 0.0, 0.0]])  # another basis, other lengths, same angle
        >>> objective.loss([turned], torch.tensor([0, 1])).item()
        0.0
    """

    def __init__(
        self,
        model: SentenceTransformer,
        teacher_embeddings: npt.NDArray[np.floating],
        *,
        weights: npt.NDArray[np.float32] | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(model, **options)
        self.teacher_embeddings = teacher_embeddings
        self.weights = weights

    def targets(self, labels: Tensor) -> Tensor:
        """The teacher's cosines of the pool rows ``labels`` (B,): (B, B), on the same device."""
        return cosine_matrix(rows_at(self.teacher_embeddings, labels))

    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Weighted mean of the squared differences of the cosines, over the pairs of different texts."""
        (rows,) = embeddings
        student = cosine_matrix(rows)
        target = self.targets(labels).to(student)
        weight = 1 - torch.eye(len(labels), dtype=student.dtype, device=student.device)
        if self.weights is not None:
            of_text = rows_at(self.weights, labels).to(student)
            of_text = of_text / of_text.max().clamp_min(torch.finfo(of_text.dtype).tiny)
            weight = weight * of_text[:, None] * of_text[None, :]
        total = weight.sum()
        # Weights of zero throughout leave nothing to learn, rather than 0 / 0.
        return ((student - target).square() * weight).sum() / total.clamp_min(torch.finfo(weight.dtype).tiny)
