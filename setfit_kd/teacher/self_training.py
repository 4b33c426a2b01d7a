"""A teacher bettered by the pool: its head fitted anew on texts that nobody labeled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.data import LabeledSet
from setfit_kd.models import fit_head, new_model, resolve_c
from setfit_kd.utils.arrays import sample_rows

if TYPE_CHECKING:
    from setfit import SetFitModel

Rows = npt.NDArray[np.floating]

ROUNDS = 5
SHARPENING = 0.5
"""Temperature of the labels that a teacher learns from itself."""
GOLD_WEIGHT = 3.0
NEIGHBOURS = 30
MAX_TEXTS = 10_000
"""Most pool texts that a head is refined on; a linear head gains nothing from more."""


def refine(
    teacher: SetFitModel,
    labeled: LabeledSet,
    labeled_embeddings: Rows,
    pool_embeddings: Rows,
    *,
    method: str = "self-training",
    head_c: float | str = 10.0,
    balance: bool = False,
    seed: int = 0,
) -> SetFitModel:
    """A teacher with the same body and a head fitted on the gold labels and on labels of its own for the pool.

    ``self-training`` fits the head in `ROUNDS` rounds on gold and on what it said of the pool the round before,
    sharpened at a temperature of `SHARPENING` and weighted by the square of its confidence (pseudo-labels: Lee, 2013;
    sharpening: Berthelot et al., 2019, "MixMatch"). ``label-spreading`` labels the pool by
    `sklearn.semi_supervised.LabelSpreading` over nearest neighbours (Zhou et al., 2004), and the head is fitted on
    that.

    Args:
        teacher: A trained model; it is not changed, its body is shared.
        labeled: The m gold labels.
        labeled_embeddings: (m, d) of the teacher.
        pool_embeddings: (n, d) of the teacher.
        method: ``self-training``, ``label-spreading``, or ``none`` to return the teacher itself.
        head_c: Inverse regularisation of the head, or ``auto``; see `RunConfig`.
        balance: Let every class weigh the same in the head.
        seed: Of the texts drawn from a pool of more than `MAX_TEXTS`.
    """
    if method == "none" or not len(pool_embeddings):
        return teacher
    rows = sample_rows(np.arange(len(pool_embeddings)), MAX_TEXTS, seed=[seed, 8])
    gold = np.eye(len(labeled.label_names))[labeled.labels]
    pool = np.asarray(pool_embeddings[rows], np.float32)
    refined = new_model(teacher.model_body, labeled.label_names)
    refined.normalize_embeddings = teacher.normalize_embeddings
    strength = resolve_c(head_c, labeled_embeddings, labeled.labels, seed=seed)
    refined.model_head = _METHODS[method](gold, labeled_embeddings, pool, _Head(strength, balance))
    return refined


@dataclass(frozen=True)
class _Head:
    """How heads are fitted."""

    C: float
    balance: bool


def _self_training(gold: Rows, labeled: Rows, pool: Rows, how: _Head) -> Any:
    head = fit_head(labeled, gold, C=how.C, balance=how.balance)
    for _ in range(ROUNDS):
        head = _fit(gold, labeled, head.predict_proba(pool), pool, how)
    return head


def _label_spreading(gold: Rows, labeled: Rows, pool: Rows, how: _Head) -> Any:
    from sklearn.semi_supervised import LabelSpreading

    known = np.concatenate([gold.argmax(axis=1), np.full(len(pool), -1)])
    # More neighbours than half a class has would reach across classes.
    neighbours = min(NEIGHBOURS, max(2, len(known) // (2 * gold.shape[1])), len(known) - 1)
    spreading = LabelSpreading(kernel="knn", n_neighbors=neighbours, max_iter=200)
    spreading.fit(np.concatenate([labeled, pool]), known)
    return _fit(gold, labeled, spreading.label_distributions_[len(gold) :], pool, how)


def _fit(gold: Rows, labeled: Rows, said: Rows, pool: Rows, how: _Head) -> Any:
    """A head on the gold labels and on what was ``said`` of the pool, sharpened and weighted by its confidence."""
    confidence = said.max(axis=1)
    sharp = (said / np.maximum(confidence, 1e-12)[:, None]) ** (1 / SHARPENING)
    sharp /= np.maximum(sharp.sum(axis=1, keepdims=True), 1e-12)
    sharp[confidence <= 0] = 1 / said.shape[1]  # a text that no label has reached; it weighs nothing
    return fit_head(
        np.concatenate([labeled, pool]),
        np.concatenate([gold, sharp]),
        np.concatenate([np.full(len(gold), GOLD_WEIGHT), confidence**2]),
        C=how.C,
        balance=how.balance,
    )


_METHODS: dict[str, Callable[[Rows, Rows, Rows, _Head], Any]] = {
    "self-training": _self_training,
    "label-spreading": _label_spreading,
}
