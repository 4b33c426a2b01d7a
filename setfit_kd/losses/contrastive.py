"""Supervised contrastive loss and batches balanced by class."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from setfit_kd.losses.base import BatchLoss, cosine_matrix
from setfit_kd.memory.devices import to_device


class ContrastiveLoss(BatchLoss):
    """Supervised contrastive loss over all pairs of texts in a batch.

    The cosine of two texts is regressed to 1 if they have the same class and to 0 otherwise, as SetFit does pair by
    pair. B texts give B(B-1)/2 pairs for B forward passes. The mean over the pairs within classes and the mean over
    the pairs across classes have the same weight, regardless of the number of classes. A pair of texts with several
    labels belongs to the first mean in the proportion of their Jaccard similarity, the share of labels of either text
    that both have, and to the second in the remaining proportion.

    Args:
        model, dropout, micro_batch_size: See `BatchLoss`.

    References:
        - Tunstall et al., 2022, "Efficient Few-Shot Learning Without Prompts".

    Inputs:
        One text column; labels are (B,) integers, the class of each text, or (B, n_classes) bool, its labels.

    Example:
        >>> import torch
        >>> loss = ContrastiveLoss(torch.nn.Identity())
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> loss.compute_loss([embeddings], torch.tensor([0, 0, 1])).item()
        0.0
        >>> loss.compute_loss([embeddings], torch.tensor([0, 1, 1])).item()
        1.5
    """

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the mean of (1 - cos)² within classes plus the mean of cos² across classes."""
        (rows,) = embeddings
        cosines = cosine_matrix(rows)
        if labels.ndim == 1:
            same = (labels[:, None] == labels[None, :]).to(cosines.dtype)
        else:
            targets = labels.to(cosines.dtype)
            common, counts = targets @ targets.T, targets.sum(dim=1)
            either = counts[:, None] + counts[None, :] - common
            same = torch.where(either == 0, 1, common / either.clamp_min(1))  # two texts without labels are alike
        upper = torch.ones_like(same).triu(diagonal=1)
        # Means as weighted sums, because selecting the pairs would wait for a GPU.
        weights = (pairs / pairs.sum().clamp_min(1e-6) for pairs in (same * upper, (1 - same) * upper))
        within, across = (to_device(weight, cosines.device) for weight in weights)
        return (within * (1 - cosines).square() + across * cosines.square()).sum()


def balanced_batches(labels: npt.NDArray[Any], *, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Sample ``steps`` batches of row indices with an equal number of texts per class or label.

    If the batch cannot hold two texts of every class, the classes take turns. The texts of each class are used in
    random order and reshuffled after each pass, so that all are used equally often. No text occurs twice in a batch:
    a class with fewer texts than its share contributes all of them.

    Args:
        labels: (n,) class of each text, or (n, n_classes) bool, its labels; at least two texts per class. Texts without
            labels are treated like a further class.
        batch_size: Maximum number of texts per batch, at least 4.
    """
    rng = np.random.default_rng([seed, 2])
    if labels.ndim == 1:
        rows_of = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    else:
        columns = np.column_stack([labels, ~labels.any(axis=1)])
        rows_of = [np.flatnonzero(column) for column in columns.T if column.any()]
    queues: list[list[int]] = [[] for _ in rows_of]
    turns: list[int] = []
    n_chosen = min(len(rows_of), batch_size // 2)
    batches = []
    for _ in range(steps):
        chosen = _take_rows(turns, np.arange(len(rows_of)), n_chosen, rng)
        shares = np.full(n_chosen, batch_size // n_chosen)
        shares[: batch_size % n_chosen] += 1
        batch: list[int] = []
        for label, share in zip(chosen, shares, strict=True):
            batch += _take_rows(queues[label], rows_of[label], int(share), rng)
        batches.append(list(dict.fromkeys(batch)))  # a text may have been drawn for several of its labels
    return batches


def _take_rows(queue: list[int], rows: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> list[int]:
    """Take up to ``count`` distinct rows from the queue, refilling it with ``rows`` in random order if it runs out."""
    count = min(count, len(rows))
    taken = [queue.pop() for _ in range(min(count, len(queue)))]
    if len(taken) < count:
        queue.extend(rng.permutation(rows).tolist())
        fresh = [row for row in queue if row not in taken][-(count - len(taken)) :]
        for row in fresh:
            queue.remove(row)
        taken += fresh
    return taken
