"""Refine a teacher's head on the unlabeled pool, by self-training or label spreading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.models.heads import fit_head, resolve_c
from setfit_kd.models.io import new_model
from setfit_kd.utils.arrays import sample_rows

if TYPE_CHECKING:
    from setfit import SetFitModel

Floats = npt.NDArray[np.floating]

N_ROUNDS = 5
SHARPENING = 0.5
"""Temperature of the pseudo-labels."""
GOLD_WEIGHT = 3.0
MAX_NEIGHBORS = 30
MAX_TEXTS = 10_000
"""Maximum number of pool texts to refine a head on; more do not improve a linear head."""


def refine(
    teacher: SetFitModel,
    labeled: LabeledSet,
    labeled_embeddings: Floats,
    pool_embeddings: Floats,
    *,
    method: str = "self-training",
    head_c: float | str = 10.0,
    balance: bool = False,
    seed: int = 0,
) -> SetFitModel:
    """Create a teacher with the same body and a head fitted on gold labels and on pseudo-labels of the pool.

    ``self-training`` fits the head in `N_ROUNDS` rounds on the gold labels and the probabilities that the previous head
    predicts for the pool, sharpened at a temperature of `SHARPENING` and weighted by the square of their confidence
    (pseudo-labels: Lee, 2013; sharpening: Berthelot et al., 2019, "MixMatch"). ``label-spreading`` labels the pool with
    `sklearn.semi_supervised.LabelSpreading` on nearest neighbors (Zhou et al., 2004) and fits the head once.

    Args:
        teacher: A trained model; it is not changed, and its body is shared.
        labeled: The m gold labels.
        labeled_embeddings: (m, d) embeddings of the labeled texts by the teacher.
        pool_embeddings: (n, d) embeddings of the pool by the teacher.
        method: ``self-training``, ``label-spreading``, or ``none`` to return the teacher itself.
        head_c: Inverse regularization strength of the head, or ``auto``; see `RunConfig`.
        balance: Weight all classes equally in the head.
        seed: Random seed of the sample drawn from a pool of more than `MAX_TEXTS`.
    """
    if method == "none" or not len(pool_embeddings):
        return teacher
    rows = sample_rows(np.arange(len(pool_embeddings)), MAX_TEXTS, seed=[seed, 8])
    gold = np.eye(len(labeled.label_names))[labeled.labels]
    pool = np.asarray(pool_embeddings[rows], np.float32)
    refined = new_model(teacher.model_body, labeled.label_names)
    refined.normalize_embeddings = teacher.normalize_embeddings
    c = resolve_c(head_c, labeled_embeddings, labeled.labels, seed=seed)
    refined.model_head = _METHODS[method](gold, labeled_embeddings, pool, _HeadOptions(c, balance))
    return refined


@dataclass(frozen=True)
class _HeadOptions:
    """Options of `fit_head`."""

    C: float
    balance: bool


def _self_training(gold: Floats, labeled: Floats, pool: Floats, options: _HeadOptions) -> Any:
    head = fit_head(labeled, gold, C=options.C, balance=options.balance)
    for _ in range(N_ROUNDS):
        head = _fit(gold, labeled, head.predict_proba(pool), pool, options)
    return head


def _label_spreading(gold: Floats, labeled: Floats, pool: Floats, options: _HeadOptions) -> Any:
    from sklearn.semi_supervised import LabelSpreading

    labels = np.concatenate([gold.argmax(axis=1), np.full(len(pool), -1)])
    # With more neighbors than half the size of a class, labels would spread to other classes.
    n_neighbors = min(MAX_NEIGHBORS, max(2, len(labels) // (2 * gold.shape[1])), len(labels) - 1)
    spreading = LabelSpreading(kernel="knn", n_neighbors=n_neighbors, max_iter=200)
    spreading.fit(np.concatenate([labeled, pool]), labels)
    return _fit(gold, labeled, spreading.label_distributions_[len(gold) :], pool, options)


def _fit(gold: Floats, labeled: Floats, probabilities: Floats, pool: Floats, options: _HeadOptions) -> Any:
    """Fit a head on the gold labels and on the pool's probabilities, sharpened and weighted by their confidence."""
    confidence = probabilities.max(axis=1)
    sharp = (probabilities / np.maximum(confidence, 1e-12)[:, None]) ** (1 / SHARPENING)
    sharp /= np.maximum(sharp.sum(axis=1, keepdims=True), 1e-12)
    sharp[confidence <= 0] = 1 / probabilities.shape[1]  # no label has spread to these texts; their weight is 0
    return fit_head(
        np.concatenate([labeled, pool]),
        np.concatenate([gold, sharp]),
        np.concatenate([np.full(len(gold), GOLD_WEIGHT), confidence**2]),
        C=options.C,
        balance=options.balance,
    )


_METHODS: dict[str, Callable[[Floats, Floats, Floats, _HeadOptions], Any]] = {
    "self-training": _self_training,
    "label-spreading": _label_spreading,
}
