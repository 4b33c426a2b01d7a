"""Whether a classifier's probabilities mean what they say, and what it can leave to others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 15


@dataclass(frozen=True)
class Bin:
    """The texts whose confidence lies in one of equally wide ranges: mean confidence, accuracy, how many."""

    confidence: float
    accuracy: float
    texts: int


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be believed.

    Attributes:
        ece: Expected calibration error: the mean distance of confidence and accuracy over the bins, weighted by their
            texts, from 0 to 1 (Naeini et al., 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning").
        brier: Mean squared distance of the probabilities and the gold class, summed over the classes, from 0 to 2
            (Brier, 1950, "Verification of Forecasts Expressed in Terms of Probability").
        reliability: The bins that have texts, least confident first.
    """

    ece: float
    brier: float
    reliability: list[Bin]


def measure_calibration(
    probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64], *, bins: int = BINS
) -> Calibration:
    """Compare (n, n_classes) probabilities with (n,) gold classes, n at least 1."""
    said = np.asarray(probabilities, np.float64)
    confidence, right = said.max(axis=1), said.argmax(axis=1) == gold
    place, gap, score = calibration_terms(said, gold, bins=bins)
    reliability = [
        Bin(float(confidence[chosen].mean()), float(right[chosen].mean()), int(chosen.sum()))
        for chosen in (place == number for number in np.unique(place))
    ]
    error = np.abs(np.bincount(place, gap)).sum() / len(gold)
    return Calibration(float(error), float(score.mean()), reliability)


def calibration_terms(
    probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64], *, bins: int = BINS
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What each of n texts adds: (n,) its bin, how far it is right beyond its confidence, and its Brier score."""
    said = np.asarray(probabilities, np.float64)
    confidence, right = said.max(axis=1), said.argmax(axis=1) == gold
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    one_hot = np.eye(said.shape[1])[gold]
    return place, right - confidence, np.square(said - one_hot).sum(axis=1)


@dataclass(frozen=True)
class OperatingPoint:
    """A classifier that answers only where its confidence reaches a threshold.

    Attributes:
        threshold: The least confidence of an answer, as in ``setfit-kd predict --threshold``.
        coverage: Share of the texts that are answered.
        accuracy: Of the answers.
        low, high: 95 % interval of that accuracy (Wilson, 1927).
    """

    threshold: float
    coverage: float
    accuracy: float
    low: float
    high: float


def coverage_curve(probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Every threshold that makes a difference: (k, 3) of threshold, coverage and accuracy, most answers last."""
    said = np.asarray(probabilities, np.float64)
    confidence = said.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    right = (said.argmax(axis=1) == gold)[order]
    answered = np.arange(1, len(gold) + 1)
    accuracy = right.cumsum() / answered
    # Texts of one confidence are answered together or not at all.
    last = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True))
    return np.column_stack([confidence[order][last], answered[last] / len(gold), accuracy[last]])


def threshold_for(
    target: float, probabilities: npt.NDArray[np.floating], gold: npt.NDArray[np.int64]
) -> OperatingPoint | None:
    """The lowest threshold at which the answers are as accurate as ``target``; None where no threshold is.

    The threshold is taken from the texts that it is measured on: on few of them, or on other ones, expect less. The
    interval says how far that may go by chance.
    """
    from scipy.stats import binomtest

    curve = coverage_curve(probabilities, gold)
    good = np.flatnonzero(curve[:, 2] >= target)
    if not len(good):
        return None
    threshold, coverage, accuracy = (float(value) for value in curve[good[-1]])
    n = round(coverage * len(gold))
    interval = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
    # Rounded down by less than lies between two single-precision numbers: the same texts are answered.
    threshold = math.floor(threshold * 1e9) / 1e9
    return OperatingPoint(threshold, coverage, accuracy, float(interval.low), float(interval.high))
