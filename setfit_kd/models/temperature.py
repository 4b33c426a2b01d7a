"""Temperature scaling of probabilities and heads, and logits of held-out texts."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from setfit_kd.models.heads import fit_head
from setfit_kd.utils.arrays import sample_rows

_FOLDS, _MAX_TEXTS = 5, 5_000
"""Folds and maximum number of texts of `held_out_logits`; a single parameter needs no more texts."""


def head_logits(head: Any, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Compute the logits of a logistic regression: (n, d) to (n, n_classes); with two classes, the first's are 0."""
    logits: npt.NDArray[np.float64] = head.decision_function(np.asarray(embeddings, np.float64))
    return logits if logits.ndim == 2 else np.column_stack([np.zeros(len(logits)), logits])


def head_at_temperature(head: Any, temperature: float) -> Any:
    """Return a logistic regression with the probabilities of ``head`` at a temperature."""
    scaled = copy.copy(head)
    scaled.coef_, scaled.intercept_ = head.coef_ / temperature, head.intercept_ / temperature
    return scaled


def held_out_logits(
    embeddings: npt.NDArray[np.floating],
    probabilities: npt.NDArray[np.floating],
    weights: npt.NDArray[np.floating],
    *,
    C: float,  # noqa: N803 - scikit-learn's name
    balance: bool,
    seed: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Compute out-of-fold logits: each fold is predicted by a head fitted on the other folds with `fit_head`.

    Args:
        embeddings: (n, d).
        probabilities: (n, n_classes), the soft labels to fit.
        weights: (n,) weight of each text.
        C, balance: See `fit_head`.
        seed: Seed of the sample of texts and of the folds.

    Returns:
        ``(rows, logits)``, (k,) row indices of the texts and (k, n_classes).
    """
    rows = sample_rows(np.arange(len(embeddings)), _MAX_TEXTS, seed=[seed, 11])
    folds = np.random.default_rng([seed, 12]).permutation(len(rows)) % _FOLDS
    logits = np.zeros((len(rows), probabilities.shape[1]))
    for fold in range(min(_FOLDS, len(rows)) if len(rows) > 1 else 0):
        training, held_out = rows[folds != fold], rows[folds == fold]
        head = fit_head(embeddings[training], probabilities[training], weights[training], C=C, balance=balance)
        logits[folds == fold] = head_logits(head, embeddings[held_out])
    return rows, logits


_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1 / 20, 20.0


def log_probabilities(probabilities: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Compute logarithms of probabilities, finite even for 0; they are logits of the same distribution."""
    return np.asarray(np.log(np.maximum(np.asarray(probabilities, np.float64), np.finfo(np.float32).tiny)))


def at_temperature(probabilities: npt.NDArray[np.floating], temperature: float) -> npt.NDArray[np.float64]:
    """Apply a temperature to (n, n_classes) probabilities: above 1 makes them flatter, below 1 sharper."""
    from scipy.special import softmax

    scaled: npt.NDArray[np.float64] = softmax(log_probabilities(probabilities) / temperature, axis=1)
    return scaled


def fit_temperature(logits: npt.NDArray[np.floating], targets: npt.NDArray[np.floating]) -> float:
    """Fit the temperature that minimizes the cross-entropy of logits against distributions, both (n, n_classes).

    As in Guo et al., 2017, "On Calibration of Modern Neural Networks", with distributions instead of gold classes. The
    result is between 1/20 and 20, and 1 if there are no texts.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    if not len(logits):
        return 1.0

    def cross_entropy(log_temperature: float) -> float:
        return -float((targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum(axis=1).mean())

    result = minimize_scalar(
        cross_entropy, bounds=(np.log(_MIN_TEMPERATURE), np.log(_MAX_TEMPERATURE)), method="bounded"
    )
    return float(np.exp(result.x))
