"""Calibration of a classifier, and its accuracy if it abstains below a confidence threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

N_BINS = 15

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Mean confidence, accuracy and number of the texts in one of several equally wide confidence bins."""

    confidence: float
    accuracy: float
    texts: int


@dataclass(frozen=True)
class Calibration:
    """Calibration of predicted probabilities.

    Attributes:
        ece: Expected calibration error, from 0 to 1: the mean distance between confidence and accuracy over the bins,
            weighted by the number of texts (Naeini et al., 2015, "Obtaining Well Calibrated Probabilities Using
            Bayesian Binning").
        brier: Brier score, from 0 to 2: the mean squared distance between the probabilities and the one-hot gold
            class, summed over the classes (Brier, 1950, "Verification of Forecasts Expressed in Terms of Probability").
        reliability: The bins that contain texts, in order of increasing confidence.
    """

    ece: float
    brier: float
    reliability: list[Bin]


def measure_calibration(probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64]) -> Calibration:
    """Measure the calibration of (n, n_classes) probabilities on (n,) gold classes, with n >= 1."""
    bins, confidence, is_correct, scores = calibration_terms(probabilities, gold)
    reliability = [
        Bin(float(confidence[in_bin].mean()), float(is_correct[in_bin].mean()), int(in_bin.sum()))
        for in_bin in (bins == index for index in np.unique(bins))
    ]
    error = np.abs(np.bincount(bins, is_correct - confidence)).sum() / len(gold)
    return Calibration(float(error), float(scores.mean()), reliability)


def calibration_terms(
    probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.bool_], Floats]:
    """Return, for each of n texts, its bin, its confidence, whether it is correct, and its Brier score."""
    probabilities = np.asarray(probabilities, np.float64)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    bins = np.minimum((confidence * N_BINS).astype(np.int64), N_BINS - 1)
    one_hot = np.eye(probabilities.shape[1])[gold]
    return bins, confidence, is_correct, np.square(probabilities - one_hot).sum(axis=1)


@dataclass(frozen=True)
class OperatingPoint:
    """A confidence threshold, with the coverage and accuracy of a classifier that abstains below it.

    Attributes:
        threshold: Minimum confidence of an answer, as in ``setfit-kd predict --threshold``.
        coverage: Share of the texts that are answered.
        accuracy: Accuracy of the answers.
        low, high: 95% interval of this accuracy (Wilson, 1927).
    """

    threshold: float
    coverage: float
    accuracy: float
    low: float
    high: float


def coverage_curve(probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64]) -> Floats:
    """Return the threshold, coverage and accuracy for each distinct confidence, shape (k, 3), by rising coverage."""
    _, confidence, is_correct, _ = calibration_terms(probabilities, gold)
    order = np.argsort(-confidence, kind="stable")
    n_answered = np.arange(1, len(gold) + 1)
    curve = np.column_stack([confidence[order], n_answered / len(gold), is_correct[order].cumsum() / n_answered])
    # A threshold cannot separate texts of equal confidence.
    is_last: npt.NDArray[np.bool_] = np.append(np.diff(curve[:, 0]) != 0, True)
    return curve[is_last]
