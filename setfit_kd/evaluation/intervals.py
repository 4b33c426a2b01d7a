"""Bootstrap confidence intervals over the evaluated texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from setfit_kd.evaluation.calibration import calibration_terms, measure_calibration

Classes = npt.NDArray[np.int64]

N_RESAMPLES = 2000
_RESAMPLES_PER_BATCH = 100


@dataclass(frozen=True)
class Interval:
    """A metric with its 95% interval: the 2.5th and 97.5th percentile over `N_RESAMPLES` bootstrap resamples."""

    value: float
    low: float
    high: float


def bootstrap_quality(
    gold: Classes, predicted: Classes, *, n_classes: int, other: Classes | None = None
) -> dict[str, Interval]:
    """Compute ``accuracy`` and ``macro_f1`` with intervals or, with ``other``, the difference to other predictions.

    All arrays have shape (n,), with n >= 1. Texts are drawn with replacement (Efron and Tibshirani, 1993, "An
    Introduction to the Bootstrap"). Differences are computed within each resample, because both classifiers see the
    same texts. With fewer than about 15 texts per class, the interval of macro-F1 is too low.
    """
    columns = np.column_stack([gold, predicted, predicted if other is None else other])
    # Texts with the same classes are interchangeable, so it is enough to draw the number of texts of each such kind.
    kinds, counts = np.unique(columns, axis=0, return_counts=True)

    def metrics(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        first = _weighted_metrics(weights, kinds[:, 0], kinds[:, 1], n_classes)
        return first if other is None else first - _weighted_metrics(weights, kinds[:, 0], kinds[:, 2], n_classes)

    rng, n = np.random.default_rng([0, 10]), len(gold)
    batches = [
        metrics(rng.multinomial(n, counts / n, size=_RESAMPLES_PER_BATCH).astype(np.float64))
        for _ in range(N_RESAMPLES // _RESAMPLES_PER_BATCH)
    ]
    values, resampled = metrics(counts[None, :].astype(np.float64))[0], np.concatenate(batches)
    return {name: _interval(float(values[i]), resampled[:, i]) for i, name in enumerate(("accuracy", "macro_f1"))}


def bootstrap_proportion(count: int, total: int) -> Interval:
    """Compute the proportion ``count / total`` with its interval; each resample is one binomial draw."""
    resampled = np.random.default_rng([0, 11]).binomial(total, count / total, N_RESAMPLES) / total
    return _interval(count / total, resampled)


def bootstrap_calibration(probabilities: npt.NDArray[np.floating], gold: Classes) -> dict[str, Interval]:
    """Compute ``ece`` and ``brier`` of (n, n_classes) probabilities, with n >= 1, with their intervals.

    Resampling adds random calibration error. Therefore the interval of a small calibration error is somewhat too high
    and may lie above the measured value.
    """
    bins, confidence, is_correct, scores = calibration_terms(probabilities, gold)
    gaps, rng, n = is_correct - confidence, np.random.default_rng([0, 12]), len(gold)
    errors, means = [], []
    for _ in range(N_RESAMPLES):
        rows = rng.integers(0, n, n)
        errors.append(np.abs(np.bincount(bins[rows], gaps[rows])).sum() / n)
        means.append(scores[rows].mean())
    measured = measure_calibration(probabilities, gold)
    return {"ece": _interval(measured.ece, np.array(errors)), "brier": _interval(measured.brier, np.array(means))}


def _interval(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def _weighted_metrics(
    weights: npt.NDArray[np.float64], gold: Classes, predicted: Classes, n_classes: int
) -> npt.NDArray[np.float64]:
    """Compute accuracy and macro-F1 (over the classes with gold texts), shape (r, 2), for (r, k) weights of k kinds."""
    is_gold, is_predicted = np.eye(n_classes)[gold], np.eye(n_classes)[predicted]  # (k, n_classes)
    n_gold, n_predicted, n_correct = (weights @ mask for mask in (is_gold, is_predicted, is_gold * is_predicted))
    f1 = 2 * n_correct / np.maximum(n_gold + n_predicted, 1)  # (r, n_classes)
    macro_f1 = f1.sum(axis=1, where=n_gold > 0) / np.maximum((n_gold > 0).sum(axis=1), 1)
    return np.column_stack([n_correct.sum(axis=1) / weights.sum(axis=1), macro_f1])
