"""Bootstrap confidence intervals over the evaluated texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from setfit_kd.evaluation.calibration import calibration_terms, measure_calibration

Classes = npt.NDArray[np.int64]

N_RESAMPLES = 2000
_RESAMPLES_PER_BATCH, _DRAWS_PER_BATCH = 100, 2_000_000


@dataclass(frozen=True)
class Interval:
    """A metric with its 95% interval: the 2.5th and 97.5th percentile over bootstrap resamples."""

    value: float
    low: float
    high: float


def bootstrap_quality(
    gold: Classes, predicted: Classes, *, n_classes: int, other: Classes | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Compute ``accuracy`` and ``macro_f1`` with intervals or, with ``other``, the difference to other predictions.

    Texts are drawn with replacement `N_RESAMPLES` times (Efron and Tibshirani, 1993, "An Introduction to the
    Bootstrap"). Differences are computed within each resample, because both classifiers see the same texts. Texts with
    the same gold and predicted classes are interchangeable, so the code draws the number of texts of each such kind.
    With fewer than about 15 texts per class, the interval of macro-F1 is too low.

    Args:
        gold: (n,) gold classes, with n >= 1.
        predicted: (n,) predicted classes.
        n_classes: Number of classes.
        other: (n,) classes predicted by another classifier.
        seed: Random seed of the resamples.
    """
    columns = [gold, predicted, predicted if other is None else other]
    kinds, counts = np.unique(np.column_stack(columns), axis=0, return_counts=True)

    def metrics(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        first = _weighted_metrics(weights, kinds[:, 0], kinds[:, 1], n_classes)
        return first if other is None else first - _weighted_metrics(weights, kinds[:, 0], kinds[:, 2], n_classes)

    values = metrics(counts[None, :].astype(np.float64))[0]
    resampled = np.concatenate([metrics(weights) for weights in _resamples(counts, seed)])
    return {name: _interval(float(values[i]), resampled[:, i]) for i, name in enumerate(("accuracy", "macro_f1"))}


def bootstrap_proportion(count: int, total: int, *, seed: int = 0) -> Interval:
    """Compute the proportion ``count / total`` with its interval; each resample is one binomial draw."""
    resampled = np.random.default_rng([seed, 11]).binomial(total, count / total, N_RESAMPLES) / total
    return _interval(count / total, resampled)


def bootstrap_calibration(
    probabilities: npt.NDArray[np.floating], gold: Classes, *, seed: int = 0
) -> dict[str, Interval]:
    """Compute ``ece`` and ``brier`` of (n, n_classes) probabilities, with n >= 1, with their intervals.

    Resampling adds random calibration error. Therefore the interval of a small calibration error is somewhat too high
    and may lie above the measured value.
    """
    bins, gaps, scores = calibration_terms(probabilities, gold)
    n, n_bins = len(gold), int(bins.max()) + 1
    batches: list[npt.NDArray[np.float64]] = []
    rng, batch_size = np.random.default_rng([seed, 12]), max(1, _DRAWS_PER_BATCH // n)
    for start in range(0, N_RESAMPLES, batch_size):
        drawn = rng.integers(0, n, (min(batch_size, N_RESAMPLES - start), n))
        offsets = np.arange(len(drawn))[:, None] * n_bins
        bin_gaps = np.bincount((offsets + bins[drawn]).ravel(), gaps[drawn].ravel(), len(drawn) * n_bins)
        errors = np.abs(bin_gaps.reshape(len(drawn), n_bins)).sum(axis=1) / n
        batches.append(np.column_stack([errors, scores[drawn].mean(axis=1)]))
    measured, resampled = measure_calibration(probabilities, gold), np.concatenate(batches)
    return {"ece": _interval(measured.ece, resampled[:, 0]), "brier": _interval(measured.brier, resampled[:, 1])}


def _interval(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def _resamples(counts: Classes, seed: int) -> Iterator[npt.NDArray[np.float64]]:
    """Yield batches of resamples as the number of texts of each of k kinds, shape (`_RESAMPLES_PER_BATCH`, k)."""
    rng = np.random.default_rng([seed, 10])
    n = int(counts.sum())
    for _ in range(N_RESAMPLES // _RESAMPLES_PER_BATCH):
        yield rng.multinomial(n, counts / n, size=_RESAMPLES_PER_BATCH).astype(np.float64)


def _weighted_metrics(
    weights: npt.NDArray[np.float64], gold: Classes, predicted: Classes, n_classes: int
) -> npt.NDArray[np.float64]:
    """Compute accuracy and macro-F1 (over the classes with gold texts), shape (r, 2), for (r, k) weights of k kinds."""
    one_hot = np.eye(n_classes)
    is_gold, is_predicted = one_hot[gold], one_hot[predicted]  # (k, n_classes)
    n_gold, n_predicted = weights @ is_gold, weights @ is_predicted  # (r, n_classes)
    n_correct = weights @ (is_gold * is_predicted)
    f1 = 2 * n_correct / np.maximum(n_gold + n_predicted, 1)
    has_gold = n_gold > 0
    macro_f1 = (f1 * has_gold).sum(axis=1) / np.maximum(has_gold.sum(axis=1), 1)
    return np.column_stack([n_correct.sum(axis=1) / weights.sum(axis=1), macro_f1])
