"""Quality and calibration of predictions, with bootstrap confidence intervals over the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]
N_BINS, N_RESAMPLES = 15, 2000
_RESAMPLES_PER_BATCH = 100


@dataclass(frozen=True)
class ClassQuality:
    """Precision, recall and F1 of one class, from 0 to 1, and its number of gold texts."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Quality:
    """Quality of predictions on gold labels, with the quality of each class by name.

    ``confusion`` has (n_classes, n_classes) counts, with gold classes as rows and predicted classes as columns.
    ``agreement`` is the fraction of texts with the same label as the teacher's; None without a teacher.
    """

    accuracy: float
    macro_f1: float
    classes: dict[str, ClassQuality]
    confusion: list[list[int]]
    agreement: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """``accuracy``, ``f1-macro``, ``f1-weighted`` (weighted by support) and, for two classes, ``f1-binary``.

        The last is the F1 of the second class, as in scikit-learn.
        """
        classes = list(self.classes.values())
        weighted = sum(c.f1 * c.support for c in classes) / sum(c.support for c in classes)
        scores = {"accuracy": self.accuracy, "f1-macro": self.macro_f1, "f1-weighted": weighted}
        return {**scores, "f1-binary": classes[1].f1} if len(classes) == 2 else scores


def measure_quality(
    predicted: Classes, gold: Classes, label_names: Sequence[str], reference: Classes | None = None
) -> Quality:
    """Compare predicted classes with gold classes and, if passed, with the teacher's predictions as ``reference``.

    All arrays have shape (n,), with n >= 1. A class that is never predicted has precision 0; a class without gold texts
    has recall 0. Macro-F1 is averaged over the classes that occur in the gold labels.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels = range(len(label_names))
    columns = precision_recall_fscore_support(gold, predicted, labels=labels, zero_division=0)
    _, _, f1, support = columns
    by_class = (ClassQuality(float(p), float(r), float(f), int(n)) for p, r, f, n in zip(*columns, strict=True))
    classes = dict(zip(label_names, by_class, strict=True))
    confusion = confusion_matrix(gold, predicted, labels=labels).tolist()
    agreement = None if reference is None else float((predicted == reference).mean())
    accuracy, macro_f1 = float((predicted == gold).mean()), float(f1[support > 0].mean())
    return Quality(accuracy, macro_f1, classes, confusion, agreement)


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


def measure_calibration(probabilities: npt.NDArray[np.floating], gold: Classes) -> Calibration:
    """Measure the calibration of (n, n_classes) probabilities on (n,) gold classes, with n >= 1."""
    bins, confidence, is_correct, scores = calibration_terms(probabilities, gold)
    reliability = [
        Bin(float(confidence[in_bin].mean()), float(is_correct[in_bin].mean()), int(in_bin.sum()))
        for in_bin in (bins == index for index in np.unique(bins))
    ]
    error = np.abs(np.bincount(bins, is_correct - confidence)).sum() / len(gold)
    return Calibration(float(error), float(scores.mean()), reliability)


def calibration_terms(
    probabilities: npt.NDArray[np.floating], gold: Classes
) -> tuple[Classes, Floats, npt.NDArray[np.bool_], Floats]:
    """Return, for each of n texts, its bin, its confidence, whether it is correct, and its Brier score."""
    probabilities = np.asarray(probabilities, np.float64)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    bins = np.minimum((confidence * N_BINS).astype(np.int64), N_BINS - 1)
    one_hot = np.eye(probabilities.shape[1])[gold]
    return bins, confidence, is_correct, np.square(probabilities - one_hot).sum(axis=1)


@dataclass(frozen=True)
class OperatingPoint:
    """A confidence threshold, with the coverage and accuracy of a classifier that abstains below it.

    ``coverage`` is the share of the texts that are answered, ``low`` to ``high`` the 95% interval of the accuracy of
    the answers (Wilson, 1927).
    """

    threshold: float
    coverage: float
    accuracy: float
    low: float
    high: float


def coverage_curve(probabilities: npt.NDArray[np.floating], gold: Classes) -> Floats:
    """Return the threshold, coverage and accuracy for each distinct confidence, shape (k, 3), by rising coverage."""
    _, confidence, is_correct, _ = calibration_terms(probabilities, gold)
    order = np.argsort(-confidence, kind="stable")
    n_answered = np.arange(1, len(gold) + 1)
    curve = np.column_stack([confidence[order], n_answered / len(gold), is_correct[order].cumsum() / n_answered])
    # A threshold cannot separate texts of equal confidence.
    is_last: npt.NDArray[np.bool_] = np.append(np.diff(curve[:, 0]) != 0, True)
    return curve[is_last]


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

    def metrics(weights: Floats) -> Floats:
        first = _weighted_metrics(weights, kinds[:, 0], kinds[:, 1], n_classes)
        return first if other is None else first - _weighted_metrics(weights, kinds[:, 0], kinds[:, 2], n_classes)

    rng, n = np.random.default_rng([0, 10]), len(gold)
    size, n_batches = _RESAMPLES_PER_BATCH, N_RESAMPLES // _RESAMPLES_PER_BATCH
    batches = [metrics(rng.multinomial(n, counts / n, size=size).astype(np.float64)) for _ in range(n_batches)]
    values, resampled = metrics(counts[None, :].astype(np.float64))[0], np.concatenate(batches)
    return {name: _interval(float(values[i]), resampled[:, i]) for i, name in enumerate(("accuracy", "macro_f1"))}


def bootstrap_proportion(count: int, total: int) -> Interval:
    """Compute the proportion ``count / total`` with its interval; each resample is one binomial draw."""
    share = count / total
    return _interval(share, np.random.default_rng([0, 11]).binomial(total, share, N_RESAMPLES) / total)


def bootstrap_calibration(probabilities: npt.NDArray[np.floating], gold: Classes) -> dict[str, Interval]:
    """Compute ``ece`` and ``brier`` of (n, n_classes) probabilities, with n >= 1, with their intervals.

    Resampling adds random error, so the interval of a small ``ece`` is too high and may lie above its value.
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


def _interval(value: float, resampled: Floats) -> Interval:
    return Interval(value, *map(float, np.percentile(resampled, (2.5, 97.5))))


def _weighted_metrics(weights: Floats, gold: Classes, predicted: Classes, n_classes: int) -> Floats:
    """Compute accuracy and macro-F1 (over the classes with gold texts), shape (r, 2), for (r, k) weights of k kinds."""
    from scipy.sparse import csr_array

    kinds, ones = np.arange(len(gold)), np.ones(len(gold))
    entries = ((ones, gold), (ones, predicted), (gold == predicted, gold))
    masks = (csr_array((entry, (kinds, classes)), (len(gold), n_classes)) for entry, classes in entries)
    n_gold, n_predicted, n_correct = (weights @ mask for mask in masks)
    f1 = 2 * n_correct / np.maximum(n_gold + n_predicted, 1)  # (r, n_classes)
    macro_f1 = f1.sum(axis=1, where=n_gold > 0) / np.maximum((n_gold > 0).sum(axis=1), 1)
    return np.column_stack([n_correct.sum(axis=1) / weights.sum(axis=1), macro_f1])
