"""Temperatures: how sharp probabilities are, apart from which class is the most probable."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_LEAST, _MOST = 1 / 20, 20.0


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

    found = minimize_scalar(cross_entropy, bounds=(np.log(_LEAST), np.log(_MOST)), method="bounded")
    return float(np.exp(found.x))
