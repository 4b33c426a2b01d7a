"""Loss over text pairs with the teacher's cosines as targets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, to_float32
from setfit_kd.memory.devices import to_device
from setfit_kd.utils.arrays import Floats, normalize_rows


class PairSimilarityLoss(BatchLoss):
    """Mean squared difference between the student's and the teacher's cosine of text pairs.

    This is the loss that SetFit documents for its ``DistillationTrainer``. SetFit 1.2.0 itself trains towards the
    constant 1, because it draws the pairs before it numbers the texts.

    Args:
        model, dropout, micro_batch_size: See `BatchLoss`.

    Inputs:
        Two text columns, the texts of each pair; labels are (B,) floats from -1 to 1, the teacher's cosines.

    Example:
        >>> import torch
        >>> loss = PairSimilarityLoss(torch.nn.Identity())
        >>> left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> loss.compute_loss([left, right], torch.tensor([0.5])).item()
        0.25
    """

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the mean squared difference of the cosines over the pairs."""
        left, right = embeddings
        cosines = torch.cosine_similarity(to_float32(left), to_float32(right))
        return nn.functional.mse_loss(cosines, to_device(labels, cosines.device).to(cosines.dtype))


def draw_pairs(
    embeddings: Floats, *, pairs_per_text: int, seed: int, rows: npt.NDArray[np.int64] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Draw random pairs of different texts and compute their cosines.

    Args:
        embeddings: (n, d) of the teacher.
        pairs_per_text: Number of pairs with each text on the left.
        rows: Rows of the m texts to pair, at least 2; None pairs all texts.

    Returns:
        ``(left, right, cosines)``, each (m * pairs_per_text,); left and right are rows of the embeddings.
    """
    rows = np.arange(len(embeddings)) if rows is None else rows
    n = len(rows)
    rng = np.random.default_rng([seed, 3])
    left = np.repeat(np.arange(n), pairs_per_text)
    # A cyclic shift by 1 to n - 1 never pairs a text with itself.
    right = (left + rng.integers(1, n, size=len(left))) % n
    left, right = rows[left], rows[right]
    cosines = np.empty(len(left), np.float32)
    for start in range(0, len(left), 8192):
        chunk = slice(start, start + 8192)
        pairs = normalize_rows(embeddings[left[chunk]]), normalize_rows(embeddings[right[chunk]])
        cosines[chunk] = np.einsum("ij,ij->i", *pairs)
    return left, right, cosines.clip(-1, 1)
