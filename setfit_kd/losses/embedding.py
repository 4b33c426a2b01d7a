"""Loss against the teacher's embeddings, text by text."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, take_rows, to_float32
from setfit_kd.utils.arrays import Floats, normalize_rows


class EmbeddingLoss(BatchLoss):
    """Mean cosine distance between the student's and the teacher's embedding of each text.

    The loss is the mean of 1 - cos(student, teacher), instead of the squared distance of the paper. If the dimensions
    differ, a linear projection without bias maps the student's embeddings to the teacher's dimension. It is trained
    together with the student and discarded after training.

    Args:
        teacher_embeddings: (n, d_teacher), one row per pool text.
        dimension: Dimension of the student's embeddings.
        model, options: See `BatchLoss`.

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

    def __init__(self, model: nn.Module, teacher_embeddings: Floats, *, dimension: int, **options: Any) -> None:
        super().__init__(model, **options)
        self.teacher_embeddings = teacher_embeddings
        d_teacher = teacher_embeddings.shape[1]
        self.projection = nn.Identity() if dimension == d_teacher else nn.Linear(dimension, d_teacher, bias=False)

    def init_projection(self, embeddings: Floats, teacher_embeddings: Floats) -> None:
        """Initialize the projection by ridge regression of (m, d_teacher) on the untrained student's (m, dimension).

        The learning rate of a body is far too small to train a random projection.
        """
        # The rows have length 1; alpha keeps the projection from fitting a few texts exactly.
        ridge = Ridge(alpha=0.1, fit_intercept=False)
        fitted = ridge.fit(normalize_rows(embeddings), normalize_rows(teacher_embeddings))
        assert isinstance(self.projection, nn.Linear)
        with torch.no_grad():
            self.projection.weight.copy_(torch.as_tensor(fitted.coef_))

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the mean of 1 - cos over the texts."""
        (rows,) = embeddings
        if isinstance(self.projection, nn.Linear):
            rows = self.projection(rows.to(self.projection.weight))
        projected = to_float32(rows)
        target = take_rows(self.teacher_embeddings, labels, projected)
        return (1 - torch.cosine_similarity(projected, target)).mean()
