"""How much of a figure may be chance: bootstrap intervals over the evaluated texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from setfit_kd.evaluation.calibration import calibration_terms, measure_calibration

Classes = npt.NDArray[np.int64]

RESAMPLES = 2000
_RESAMPLES_PER_BATCH, _DRAWS_PER_BATCH = 100, 2_000_000


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval: the figure of the texts, and the 2.5th and 97.5th percentile of resamples."""

    value: float
    low: float
    high: float


def bootstrap(
    gold: Classes, predicted: Classes, *, n_classes: int, other: Classes | None = None, seed: int = 0
) -> dict[str, Interval]:
    """``accuracy`` and ``macro_f1`` with their intervals; with ``other`` predictions, of the difference to those.

    Texts are drawn with replacement, `RESAMPLES` times (Efron and Tibshirani, 1993, "An Introduction to the
    Bootstrap"); a difference is taken within each resample, since both classifiers meet the same texts. Texts with the
    same classes are alike to these figures, so that what is drawn is how many there are of each kind. With fewer than
    about fifteen texts a class, the interval of macro-F1 lies too low.

    Args:
        gold: (n,) gold classes, n at least 1.
        predicted: (n,) predicted classes.
        n_classes: How many classes there are.
        other: (n,) classes that another classifier predicted.
        seed: Of the resamples.
    """
    columns = [gold, predicted, predicted if other is None else other]
    kinds, counts = np.unique(np.column_stack(columns), axis=0, return_counts=True)

    def figures(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        of_first = _figures(weights, kinds[:, 0], kinds[:, 1], n_classes)
        return of_first if other is None else of_first - _figures(weights, kinds[:, 0], kinds[:, 2], n_classes)

    found = figures(counts[None, :].astype(np.float64))[0]
    resampled = np.concatenate([figures(weights) for weights in _resamples(counts, seed)])
    return {name: _interval(float(found[i]), resampled[:, i]) for i, name in enumerate(("accuracy", "macro_f1"))}


def bootstrap_share(count: int, total: int, *, seed: int = 0) -> Interval:
    """The share of ``count`` in ``total`` texts with its interval; a resample of them is a binomial draw."""
    resampled = np.random.default_rng([seed, 11]).binomial(total, count / total, RESAMPLES) / total
    return _interval(count / total, resampled)


def bootstrap_calibration(
    probabilities: npt.NDArray[np.floating], gold: Classes, *, seed: int = 0
) -> dict[str, Interval]:
    """``ece`` and ``brier`` of (n, n_classes) probabilities, n at least 1, with their intervals.

    A resample is never better calibrated than its texts are by chance, so that the interval of a small calibration
    error lies somewhat too high, and may lie above it.
    """
    place, gap, score = calibration_terms(probabilities, gold)
    n, n_bins = len(gold), int(place.max()) + 1
    found: list[npt.NDArray[np.float64]] = []
    rng, at_once = np.random.default_rng([seed, 12]), max(1, _DRAWS_PER_BATCH // n)
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.integers(0, n, (min(at_once, RESAMPLES - start), n))
        rows = np.arange(len(drawn))[:, None] * n_bins
        gaps = np.bincount((rows + place[drawn]).ravel(), gap[drawn].ravel(), len(drawn) * n_bins)
        errors = np.abs(gaps.reshape(len(drawn), n_bins)).sum(axis=1) / n
        found.append(np.column_stack([errors, score[drawn].mean(axis=1)]))
    measured, resampled = measure_calibration(probabilities, gold), np.concatenate(found)
    return {"ece": _interval(measured.ece, resampled[:, 0]), "brier": _interval(measured.brier, resampled[:, 1])}


def _interval(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def _resamples(counts: Classes, seed: int) -> Iterator[npt.NDArray[np.float64]]:
    """How many texts of each of k kinds a resample holds: (`_RESAMPLES_PER_BATCH`, k), until there are enough."""
    rng = np.random.default_rng([seed, 10])
    n = int(counts.sum())
    for _ in range(RESAMPLES // _RESAMPLES_PER_BATCH):
        yield rng.multinomial(n, counts / n, size=_RESAMPLES_PER_BATCH).astype(np.float64)


def _figures(
    weights: npt.NDArray[np.float64], gold: Classes, predicted: Classes, n_classes: int
) -> npt.NDArray[np.float64]:
    """Accuracy and macro-F1, over the classes with gold texts, of r weightings of k kinds of text: (r, k) to (r, 2)."""
    one_hot = np.eye(n_classes)
    is_gold, is_predicted = one_hot[gold], one_hot[predicted]  # (k, n_classes)
    n_gold, n_predicted = weights @ is_gold, weights @ is_predicted  # (r, n_classes)
    n_right = weights @ (is_gold * is_predicted)
    f1 = 2 * n_right / np.maximum(n_gold + n_predicted, 1)
    occurs = n_gold > 0
    macro = (f1 * occurs).sum(axis=1) / np.maximum(occurs.sum(axis=1), 1)
    return np.column_stack([n_right.sum(axis=1) / weights.sum(axis=1), macro])
