"""How sharp a head's probabilities are, and what heads say of texts that they were not fitted on."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from setfit_kd.models.heads import fit_head
from setfit_kd.utils.arrays import sample_rows

_FOLDS, _MOST_TEXTS = 5, 5_000
"""Parts that are held out in turn, and texts that are looked at; one number needs no more."""


def logits(head: Any, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Logits of a logistic regression: (n, d) to (n, n_classes); of two classes, the first's are 0."""
    found: npt.NDArray[np.float64] = head.decision_function(np.asarray(embeddings, np.float64))
    return found if found.ndim == 2 else np.column_stack([np.zeros(len(found)), found])


def head_at_temperature(head: Any, temperature: float) -> Any:
    """A logistic regression whose probabilities are those of ``head`` at a temperature."""
    other = copy.copy(head)
    other.coef_, other.intercept_ = head.coef_ / temperature, head.intercept_ / temperature
    return other


def held_out_logits(
    embeddings: npt.NDArray[np.floating],
    probabilities: npt.NDArray[np.floating],
    weights: npt.NDArray[np.floating],
    *,
    C: float,  # noqa: N803 - scikit-learn's name
    balance: bool,
    seed: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """What heads say of texts that they were not fitted on: rows (k,), and their logits (k, n_classes).

    Each of a few parts of the texts is held out in turn while a head is fitted on the others, as `fit_head` does.

    Args:
        embeddings: (n, d).
        probabilities: (n, n_classes) that the heads are fitted to.
        weights: (n,) of the texts.
        C, balance: As in `fit_head`.
        seed: Of the parts.
    """
    rows = sample_rows(np.arange(len(embeddings)), _MOST_TEXTS, seed=[seed, 11])
    part = np.random.default_rng([seed, 12]).permutation(len(rows)) % _FOLDS
    found = np.zeros((len(rows), probabilities.shape[1]))
    for number in range(min(_FOLDS, len(rows)) if len(rows) > 1 else 0):
        others, held_out = rows[part != number], rows[part == number]
        head = fit_head(embeddings[others], probabilities[others], weights[others], C=C, balance=balance)
        found[part == number] = logits(head, embeddings[held_out])
    return rows, found


_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1 / 20, 20.0


def log_probabilities(probabilities: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Logarithms of probabilities, finite where one is 0; they are logits of the same distribution."""
    return np.asarray(np.log(np.maximum(np.asarray(probabilities, np.float64), np.finfo(np.float32).tiny)))


def at_temperature(probabilities: npt.NDArray[np.floating], temperature: float) -> npt.NDArray[np.float64]:
    """Softmax of log-probabilities over a temperature: above 1 flatter, below 1 sharper; (n, n_classes) to the same."""
    from scipy.special import softmax

    found: npt.NDArray[np.float64] = softmax(log_probabilities(probabilities) / temperature, axis=1)
    return found


def fit_temperature(logits: npt.NDArray[np.floating], targets: npt.NDArray[np.floating]) -> float:
    """The temperature at which the logits' softmax comes closest to distributions, both (n, n_classes).

    Closest by cross-entropy (Guo et al., 2017, "On Calibration of Modern Neural Networks", with distributions in the
    place of gold classes); from a twentieth to twenty, and 1 where there are no texts.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    if not len(logits):
        return 1.0

    def cross_entropy(log_temperature: float) -> float:
        return -float((targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum(axis=1).mean())

    found = minimize_scalar(
        cross_entropy, bounds=(np.log(_MIN_TEMPERATURE), np.log(_MAX_TEMPERATURE)), method="bounded"
    )
    return float(np.exp(found.x))
