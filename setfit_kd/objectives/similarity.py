"""The teacher's similarity matrix, batch by batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from setfit_kd.objectives.base import Objective, cosine_matrix

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class SimilarityObjective(Objective):
    """Make the student's cosines of a batch those of the teacher.

    The mean squared difference between the two B by B cosine matrices, diagonal left out (Tung and Mori, 2019,
    "Similarity-Preserving Knowledge Distillation"). B texts give B(B-1)/2 targets for B forward passes. Teacher and
    student may differ in dimension.

    Labels: (B,) integers, each text's row in the teacher's embeddings.

    Args:
        model: The student's body.
        teacher_embeddings: (n, d), a row a pool text. Targets are made of the B rows of a batch alone: memory is
            O(n d), never O(n²).
        dropout: See `Objective`.

    Example:
        >>> import numpy as np, torch
        >>> teacher = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=np.float32)
        >>> objective = SimilarityObjective(torch.nn.Identity(), teacher)
        >>> turned = torch.tensor([[0.0, 2.0, 0.0], [-3.0, 0.0, 0.0]])  # another basis, other lengths, same angle
        >>> objective.loss([turned], torch.tensor([0, 1])).item()
        0.0
    """

    def __init__(
        self,
        model: SentenceTransformer,
        teacher_embeddings: npt.NDArray[np.float32],
        *,
        dropout: bool = False,
    ) -> None:
        super().__init__(model, dropout=dropout)
        self.teacher_embeddings = teacher_embeddings

    def targets(self, labels: Tensor) -> Tensor:
        """The teacher's cosines of the pool rows ``labels`` (B,): (B, B), on the same device."""
        rows = self.teacher_embeddings[labels.cpu().numpy()]
        return cosine_matrix(torch.as_tensor(rows, dtype=torch.float32, device=labels.device))

    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Mean squared difference of the cosines, over the pairs of different texts."""
        (rows,) = embeddings
        off_diagonal = ~torch.eye(len(labels), dtype=torch.bool, device=rows.device)
        student = cosine_matrix(rows)[off_diagonal]
        return nn.functional.mse_loss(student, self.targets(labels).to(student)[off_diagonal])
