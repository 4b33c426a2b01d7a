"""Calibration of a classifier, and the confidence threshold below which it abstains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

N_BINS = 15


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


def measure_calibration(
    probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64], *, n_bins: int = N_BINS
) -> Calibration:
    """Measure the calibration of (n, n_classes) probabilities on (n,) gold classes, with n >= 1."""
    probabilities = np.asarray(probabilities, np.float64)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    bins, gaps, scores = calibration_terms(probabilities, gold, n_bins=n_bins)
    reliability = [
        Bin(float(confidence[in_bin].mean()), float(is_correct[in_bin].mean()), int(in_bin.sum()))
        for in_bin in (bins == index for index in np.unique(bins))
    ]
    error = np.abs(np.bincount(bins, gaps)).sum() / len(gold)
    return Calibration(float(error), float(scores.mean()), reliability)


def calibration_terms(
    probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64], *, n_bins: int = N_BINS
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return, for each of n texts, its bin, its correctness (0 or 1) minus its confidence, and its Brier score."""
    probabilities = np.asarray(probabilities, np.float64)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    bins = np.minimum((confidence * n_bins).astype(np.int64), n_bins - 1)
    one_hot = np.eye(probabilities.shape[1])[gold]
    return bins, is_correct - confidence, np.square(probabilities - one_hot).sum(axis=1)


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


def coverage_curve(probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the threshold, coverage and accuracy for each distinct confidence, shape (k, 3), by rising coverage."""
    probabilities = np.asarray(probabilities, np.float64)
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    is_correct = (probabilities.argmax(axis=1) == gold)[order]
    n_answered = np.arange(1, len(gold) + 1)
    accuracy = is_correct.cumsum() / n_answered
    # A threshold cannot separate texts of equal confidence.
    last = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True))
    return np.column_stack([confidence[order][last], n_answered[last] / len(gold), accuracy[last]])


def threshold_for(
    target: float, probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64]
) -> OperatingPoint | None:
    """Find the lowest threshold at which the answers reach the accuracy ``target``; None if there is no such threshold.

    The threshold is chosen and measured on the same texts. Expect a lower accuracy on new texts, especially if the
    threshold was chosen on few texts. The interval shows how much of the accuracy may be due to chance.
    """
    from scipy.stats import binomtest

    curve = coverage_curve(probabilities, gold)
    candidates = np.flatnonzero(curve[:, 2] >= target)
    if not len(candidates):
        return None
    threshold, coverage, accuracy = (float(value) for value in curve[candidates[-1]])
    n = round(coverage * len(gold))
    interval = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
    # Round down by less than the spacing of single-precision numbers, so that the same texts are answered.
    threshold = math.floor(threshold * 1e9) / 1e9
    return OperatingPoint(threshold, coverage, accuracy, float(interval.low), float(interval.high))
