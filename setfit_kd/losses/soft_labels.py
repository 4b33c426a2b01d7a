"""The teacher's soft labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, LossOptions, rows_at, to_float32

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from typing_extensions import Unpack

NO_GOLD = -1
"""The gold class of a text that has none."""


class SoftLabelLoss(BatchLoss):
    """Make the student's class probabilities the teacher's, at a temperature.

    Of each text, T² KL(teacher at T ‖ student at T); of a text with a gold label, (1 - alpha) of that and alpha times
    the cross-entropy against gold at T = 1 (Hinton, Vinyals and Dean, 2015, "Distilling the Knowledge in a Neural
    Network"). The mean over the batch is the loss. A linear head inside the objective turns embeddings into logits; it
    is trained beside the body and dropped after, when the student's own head is fitted at T = 1.

    Labels: (B,) integers, each text's row in the signals.

    Args:
        model: The student's body.
        probabilities: (n, n_classes) of the teacher, a row a pool text, rows summing to 1.
        dimension: Length of the student's embeddings.
        gold: (n,) class of each pool text, `NO_GOLD` where it has none; None is none at all.
        temperature: T, above 0.
        alpha: Share of the gold label, from 0 to 1.
        options: As `BatchLoss`.

    Example:
        >>> import numpy as np, torch
        >>> probabilities = np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32)
        >>> objective = SoftLabelLoss(torch.nn.Identity(), probabilities, dimension=2, temperature=2.0)
        >>> objective.start_from(np.eye(2), np.zeros(2))  # the embeddings are the logits
        >>> logits = torch.tensor([[7.0, 7.0], [3.0, 0.0]])
        >>> round(objective.loss([logits], torch.tensor([0, 0])).item(), 3)
        0.517
    """

    def __init__(
        self,
        model: SentenceTransformer,
        probabilities: npt.NDArray[np.float32],
        *,
        dimension: int,
        gold: npt.NDArray[np.int64] | None = None,
        temperature: float = 1.0,
        alpha: float = 0.5,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(model, **options)
        self.probabilities = probabilities
        self.gold = gold
        self.temperature = temperature
        self.alpha = alpha
        self.head = nn.Linear(dimension, probabilities.shape[1])

    def start_from(self, coef: npt.NDArray[np.floating], intercept: npt.NDArray[np.floating]) -> None:
        """Begin with a fitted head: ``coef`` (n_classes, d) and ``intercept`` (n_classes,).

        A body's learning rate is far too small to bring a random head anywhere.
        """
        with torch.no_grad():
            self.head.weight.copy_(torch.as_tensor(coef).reshape(self.head.weight.shape))
            self.head.bias.copy_(torch.as_tensor(intercept).reshape(self.head.bias.shape))

    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Mean over the texts of the soft and, where there is one, the gold term."""
        (rows,) = embeddings
        logits = to_float32(self.head(rows.to(self.head.weight)))  # (B, n_classes)
        soft_labels = rows_at(self.probabilities, labels).to(logits)
        tiny = torch.finfo(logits.dtype).tiny
        target = torch.log_softmax(soft_labels.clamp_min(tiny).log() / self.temperature, dim=1)
        student = torch.log_softmax(logits / self.temperature, dim=1)
        soft = self.temperature**2 * (target.exp() * (target - student)).sum(dim=1)  # (B,)
        if self.gold is None:
            return soft.mean()
        gold = torch.as_tensor(self.gold[labels.cpu().numpy()], device=labels.device)
        hard = nn.functional.cross_entropy(logits, gold, ignore_index=NO_GOLD, reduction="none")
        share = self.alpha * (gold != NO_GOLD)
        return (share * hard + (1 - share) * soft).mean()
