"""Supervised contrast over whole batches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from setfit_kd.losses.base import BatchLoss, cosine_matrix


class ContrastiveLoss(BatchLoss):
    """Draw texts of a class together and push classes apart, over all pairs of a batch.

    The cosine of two texts is regressed to 1 where they share a class and to 0 where they do not, as SetFit does pair
    by pair (Tunstall et al., 2022, "Efficient Few-Shot Learning Without Prompts"); the B texts of a batch give
    B(B-1)/2 pairs for B forward passes. The mean over the pairs within classes and the mean over the pairs across
    classes weigh the same, however many classes there are.

    Labels: (B,) integers, the class of each text.

    Example:
        >>> import torch
        >>> objective = ContrastiveLoss(torch.nn.Identity())
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> objective.loss([embeddings], torch.tensor([0, 0, 1])).item()
        0.0
        >>> objective.loss([embeddings], torch.tensor([0, 1, 1])).item()
        1.5
    """

    def loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Mean of (1 - cos)² within classes plus mean of cos² across them."""
        (rows,) = embeddings
        cosines = cosine_matrix(rows)
        same = labels[:, None] == labels[None, :]
        upper = torch.ones_like(same).triu(diagonal=1)
        within, across = cosines[same & upper], cosines[~same & upper]
        zero = cosines.sum() * 0
        attraction = (1 - within).square().mean() if within.numel() else zero
        repulsion = across.square().mean() if across.numel() else zero
        return attraction + repulsion


def balanced_batches(labels: npt.NDArray[np.int64], *, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Batches that hold every class evenly, or as many classes by twos as fit.

    Where not all classes fit, they take turns. Each class is gone through in random order and reshuffled when used up,
    so that all its texts come equally often. No text stands twice in a batch: a class with fewer texts than its share
    gives all of them.

    Args:
        labels: (n,) class of each text; two texts a class or more.
        batch_size: Most texts in a batch, 4 or more.
        steps: Number of batches.
        seed: Same seed, same batches.

    Returns:
        ``steps`` lists of row indices.
    """
    rng = np.random.default_rng([seed, 2])
    rows_of = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    queues: list[list[int]] = [[] for _ in rows_of]
    turns: list[int] = []
    n_chosen = min(len(rows_of), batch_size // 2)
    batches = []
    for _ in range(steps):
        chosen = _take(turns, np.arange(len(rows_of)), n_chosen, rng)
        shares = np.full(n_chosen, batch_size // n_chosen)
        shares[: batch_size % n_chosen] += 1
        batch: list[int] = []
        for label, share in zip(chosen, shares, strict=True):
            batch += _take(queues[label], rows_of[label], int(share), rng)
        batches.append(batch)
    return batches


def _take(queue: list[int], rows: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> list[int]:
    """Up to ``count`` different rows, from the queue first; what is refilled skips those just taken."""
    count = min(count, len(rows))
    taken = [queue.pop() for _ in range(min(count, len(queue)))]
    if len(taken) < count:
        queue.extend(rng.permutation(rows).tolist())
        fresh = [row for row in queue if row not in taken][-(count - len(taken)) :]
        for row in fresh:
            queue.remove(row)
        taken += fresh
    return taken
