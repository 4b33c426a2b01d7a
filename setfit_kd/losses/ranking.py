"""Ranking loss over sentence pairs with in-batch and hard negatives, and batches without duplicates."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

from setfit_kd.losses.base import BatchLoss, to_float32


class RankingLoss(BatchLoss):
    """Cross-entropy of finding the sentence that belongs to each anchor among all candidates of a batch.

    The candidates are the positives of all B anchors and M ≤ B hard negatives, those of the anchors that have one. The
    logits are the cosines times 20. This is the ``MultipleNegativesRankingLoss`` of sentence-transformers.

    Args:
        model, options: See `BatchLoss`.

    References:
        - Henderson et al., 2017, "Efficient Natural Language Response Suggestion for Smart Reply".

    Inputs:
        Two or three text columns: B anchors, B positives and M negatives. Labels are ignored.

    Example:
        >>> import torch
        >>> loss = RankingLoss(torch.nn.Identity())
        >>> anchors, negative = torch.eye(3)[:2], torch.eye(3)[:1]
        >>> round(loss.compute_loss([anchors, anchors], torch.zeros(2)).item(), 6) + 0.0
        0.0
        >>> round(loss.compute_loss([anchors, anchors, negative], torch.zeros(2)).item(), 3)  # log(2) for one anchor
        0.347
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.ranking = MultipleNegativesRankingLoss(model)  # type: ignore[arg-type]

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy over the anchors."""
        return self.ranking.compute_loss_from_embeddings([to_float32(rows) for rows in embeddings], labels)


def distinct_batches(keys: npt.NDArray[np.int64], *, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Draw batches of rows that have no key in common; each epoch uses every row once, in random order.

    Batches of a single row, which has nothing to be compared with, are dropped, unless there are no others.

    Args:
        keys: (n, k) keys of each row, such as the numbers of its texts; negative ones are ignored.
        batch_size: Maximum number of rows per batch. Batches are smaller if the rows that are left share keys.
        epochs: Number of passes over the rows.
    """
    rng = np.random.default_rng([seed, 10])
    keys_of = [{key for key in row if key >= 0} for row in keys.tolist()]
    batches = []
    for _ in range(epochs):
        queue = deque(rng.permutation(len(keys_of)).tolist())
        while queue:
            batch: list[int] = []
            used: set[int] = set()
            skipped = []
            while queue and len(batch) < batch_size:
                row = queue.popleft()
                if used.isdisjoint(keys_of[row]):
                    batch.append(row)
                    used |= keys_of[row]
                else:
                    skipped.append(row)
            queue.extendleft(reversed(skipped))
            batches.append(batch)
    return [batch for batch in batches if len(batch) > 1] or batches
