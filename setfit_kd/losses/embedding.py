"""Loss against the teacher's embeddings, text by text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, LossOptions, take_rows, to_float32
from setfit_kd.utils.arrays import normalize_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from typing_extensions import Unpack


_RIDGE_ALPHA = 0.1
"""Keeps the initial projection from fitting a few texts exactly; rows have length 1."""


class EmbeddingLoss(BatchLoss):
    """Mean cosine distance between the student's and the teacher's embedding of each text.

    The loss is the mean of 1 - cos(student, teacher), instead of the squared distance of the paper. If the dimensions
    differ, a linear projection without bias maps the student's embeddings to the teacher's dimension. It is trained
    together with the student and discarded after training.

    Args:
        model: The student's body.
        teacher_embeddings: (n, d_teacher), one row per pool text.
        dimension: Dimension of the student's embeddings.
        options: See `BatchLoss`.

    References:
        - Reimers and Gurevych, 2020, "Making Monolingual Sentence Embeddings Multilingual using Knowledge
          Distillation".

    Inputs:
        One text column; labels are (B,) integers, the row of each text in ``teacher_embeddings``.

    Example:
        >>> import numpy as np, torch
        >>> teacher = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
        >>> loss = EmbeddingLoss(torch.nn.Identity(), teacher, dimension=2)
        >>> loss.compute_loss([torch.tensor([[3.0, 0.0], [2.0, 0.0]])], torch.tensor([0, 1])).item()
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
        d_teacher = teacher_embeddings.shape[1]
        self.projection = nn.Identity() if dimension == d_teacher else nn.Linear(dimension, d_teacher, bias=False)

    def init_projection(
        self, embeddings: npt.NDArray[np.floating], teacher_embeddings: npt.NDArray[np.floating]
    ) -> None:
        """Initialize the projection by ridge regression on m texts.

        The learning rate of a body is far too small to train a random projection.

        Args:
            embeddings: (m, dimension) of the untrained student.
            teacher_embeddings: (m, d_teacher).
        """
        student, teacher = normalize_rows(embeddings), normalize_rows(teacher_embeddings)
        fitted = Ridge(alpha=_RIDGE_ALPHA, fit_intercept=False).fit(student, teacher)
        assert isinstance(self.projection, nn.Linear)
        with torch.no_grad():
            self.projection.weight.copy_(torch.as_tensor(fitted.coef_))

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the mean of 1 - cos over the texts."""
        (rows,) = embeddings
        if isinstance(self.projection, nn.Linear):
            rows = self.projection(rows.to(self.projection.weight))
        projected = to_float32(rows)
        target = take_rows(self.teacher_embeddings, labels).to(projected)
        return (1 - torch.cosine_similarity(projected, target)).mean()
