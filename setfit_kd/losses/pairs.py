"""SetFit's pairs, with the targets that they are meant to have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, to_float32
from setfit_kd.utils.arrays import normalise_rows


class PairSimilarityLoss(BatchLoss):
    """Make the student's cosine of a pair of texts that of the teacher.

    What SetFit's ``DistillationTrainer`` describes. (SetFit 1.2.0 itself trains toward the constant 1, since its pairs
    are drawn before their texts are numbered.)

    Labels: (B,) floats from -1 to 1, the teacher's cosines.

    Example:
        >>> import torch
        >>> objective = PairSimilarityLoss(torch.nn.Identity())
        >>> left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> objective.loss([left, right], torch.tensor([0.5])).item()
        0.25
    """

    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Mean squared difference of the cosines over the pairs."""
        left, right = embeddings
        cosines = torch.cosine_similarity(to_float32(left), to_float32(right))
        return nn.functional.mse_loss(cosines, labels.to(cosines))


def draw_pairs(
    embeddings: npt.NDArray[np.floating],
    *,
    pairs_per_text: int,
    seed: int,
    rows: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Random pairs of different texts with their cosines; each text opens ``pairs_per_text`` pairs.

    Args:
        embeddings: (n, d) of the teacher.
        pairs_per_text: Pairs that each text opens.
        seed: Same seed, same pairs.
        rows: The m texts to pair, at least 2; None pairs all.

    Returns:
        ``(left, right, cosines)``, each (m * pairs_per_text,): rows of the embeddings, and what memory is O of.
    """
    rows = np.arange(len(embeddings)) if rows is None else rows
    n = len(rows)
    rng = np.random.default_rng([seed, 3])
    left = np.repeat(np.arange(n), pairs_per_text)
    # A step of 1 to n - 1 around the circle never ends where it began.
    right = (left + rng.integers(1, n, size=len(left))) % n
    left, right = rows[left], rows[right]
    cosines = np.empty(len(left), np.float32)
    for start in range(0, len(left), 8192):
        part = slice(start, start + 8192)
        pairs = normalise_rows(embeddings[left[part]]), normalise_rows(embeddings[right[part]])
        cosines[part] = np.einsum("ij,ij->i", *pairs)
    return left, right, cosines.clip(-1, 1)
