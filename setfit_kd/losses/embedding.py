"""The teacher's embeddings, text by text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, LossOptions, rows_at, to_float32
from setfit_kd.utils.arrays import normalise_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from typing_extensions import Unpack


_RIDGE = 0.1
"""Keeps the first map from copying a few texts exactly; rows have length 1."""


class EmbeddingLoss(BatchLoss):
    """Make the student's embedding of each text point where the teacher's does.

    The mean of 1 - cos(student, teacher) over a batch (Reimers and Gurevych, 2020, "Making Monolingual Sentence
    Embeddings Multilingual using Knowledge Distillation", by the cosine instead of the squared distance). Where the
    dimensions differ, a linear map without bias takes the student's embedding to the teacher's; it is trained beside
    the student and dropped after.

    Labels: (B,) integers, each text's row in the teacher's embeddings.

    Args:
        model: The student's body.
        teacher_embeddings: (n, d_teacher), a row a pool text.
        dimension: Length of the student's embeddings.
        options: As `BatchLoss`.

    Example:
        >>> import numpy as np, torch
        >>> teacher = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
        >>> objective = EmbeddingLoss(torch.nn.Identity(), teacher, dimension=2)
        >>> objective.loss([torch.tensor([[3.0, 0.0], [2.0, 0.0]])], torch.tensor([0, 1])).item()
        0.5
    """

    def __init__(
        self,
        model: SentenceTransformer,
        teacher_embeddings: npt.NDArray[np.floating],
        *,
        dimension: int,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(model, **options)
        self.teacher_embeddings = teacher_embeddings
        width = teacher_embeddings.shape[1]
        self.projection = nn.Identity() if dimension == width else nn.Linear(dimension, width, bias=False)

    def start_from(self, embeddings: npt.NDArray[np.floating], teacher_embeddings: npt.NDArray[np.floating]) -> None:
        """Begin with the linear map that fits m texts best, by ridge regression.

        A body's learning rate is far too small to bring a random map anywhere.

        Args:
            embeddings: (m, dimension) of the untrained student.
            teacher_embeddings: (m, d_teacher).
        """
        student, teacher = normalise_rows(embeddings), normalise_rows(teacher_embeddings)
        fitted = Ridge(alpha=_RIDGE, fit_intercept=False).fit(student, teacher)
        assert isinstance(self.projection, nn.Linear)
        with torch.no_grad():
            self.projection.weight.copy_(torch.as_tensor(fitted.coef_))

    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Mean of 1 - cos over the texts."""
        (rows,) = embeddings
        if isinstance(self.projection, nn.Linear):
            rows = self.projection(rows.to(self.projection.weight))
        projected = to_float32(rows)
        target = rows_at(self.teacher_embeddings, labels).to(projected)
        return (1 - torch.cosine_similarity(projected, target)).mean()
