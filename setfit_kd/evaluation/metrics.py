"""Quality and calibration of predictions, with bootstrap confidence intervals over the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL, Labels, Task, is_equal, task_of

Floats = npt.NDArray[np.float64]
N_BINS, N_RESAMPLES = 15, 2000
_RESAMPLES_PER_BATCH = 100
METRICS: dict[Task, dict[str, str]] = {
    SINGLE_LABEL: {"accuracy": "accuracy", "macro_f1": "macro-F1"},
    MULTI_LABEL: {"macro_f1": "macro-F1", "micro_f1": "micro-F1", "accuracy": "exact match"},
}
"""Fields of `Quality` that are shown for each task, with their displayed names; the first is the main metric."""


def main_metric(task: Task) -> tuple[str, str]:
    """Return the field and the displayed name of the metric by which the models of a task are compared."""
    return next(iter(METRICS[task].items()))


@dataclass(frozen=True)
class ClassQuality:
    """Precision, recall and F1 of one class, from 0 to 1, and its number of gold texts.

    The average precision (0 without gold texts), calibration error and Brier score are for multi-label only.
    """

    precision: float
    recall: float
    f1: float
    support: int
    average_precision: float | None = None
    ece: float | None = None
    brier: float | None = None


@dataclass(frozen=True)
class Quality:
    """Quality of predictions on gold labels.

    Attributes:
        accuracy: Fraction of texts whose labels are all correct; for multi-label, the exact match.
        macro_f1: Mean F1 of the classes that occur in the gold labels.
        classes: Quality of each class by name.
        confusion: (n_classes, n_classes) numbers of texts with a gold class (row) and a predicted class (column). For
            multi-label, a text counts for every pair of its gold and predicted labels.
        agreement: Fraction of texts with the same labels as the teacher's; None without a teacher.
        micro_f1: F1 over all pairs of a text and a label; None for single-label, as all below.
        sample_f1: Mean over the texts of the F1 of their labels, which is 1 for a text with neither gold nor predicted
            labels.
        average_precision: Mean average precision of the labels that occur in the gold labels.
        label_ranking: Label ranking average precision over the texts with at least one gold label; None without any.
    """

    accuracy: float
    macro_f1: float
    classes: dict[str, ClassQuality]
    confusion: list[list[int]]
    agreement: float | None = None
    micro_f1: float | None = None
    sample_f1: float | None = None
    average_precision: float | None = None
    label_ranking: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """``accuracy``, ``f1-macro``, ``f1-weighted`` (weighted by support) and that of the task.

        That is ``f1-micro`` for multi-label and, for two single-label classes, ``f1-binary``: the F1 of the second
        class, as in scikit-learn.
        """
        classes = list(self.classes.values())
        weighted = sum(c.f1 * c.support for c in classes) / max(sum(c.support for c in classes), 1)
        scores = {"accuracy": self.accuracy, "f1-macro": self.macro_f1, "f1-weighted": weighted}
        if self.micro_f1 is not None:
            return {**scores, "f1-micro": self.micro_f1}
        return {**scores, "f1-binary": classes[1].f1} if len(classes) == 2 else scores

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON, without the metrics that do not apply to the task."""
        return asdict(self, dict_factory=lambda items: {k: v for k, v in items if v is not None or k == "agreement"})


def measure_quality(
    predicted: Labels,
    gold: Labels,
    label_names: Sequence[str],
    reference: Labels | None = None,
    *,
    probabilities: npt.NDArray[np.floating] | None = None,
) -> Quality:
    """Compare predicted labels with gold labels and, if passed, with the teacher's predictions as ``reference``.

    All labels are of the same n >= 1 texts. A class that is never predicted has precision 0; a class without gold texts
    has recall 0. The (n, n_classes) probabilities are for the metrics of a multi-label task that need them.
    """
    from scipy.sparse import csr_array
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels, others, by_label = range(len(label_names)), dict[str, float](), [dict[str, float]()] * len(label_names)
    columns = precision_recall_fscore_support(gold, predicted, labels=labels, zero_division=0)
    if task_of(gold) is SINGLE_LABEL:
        confusion = confusion_matrix(gold, predicted, labels=labels)
    else:
        confusion = (csr_array(gold, dtype=int).T @ csr_array(predicted, dtype=int)).toarray()
        others, by_label = _multi_label_metrics(gold, predicted, probabilities)
    classes = {
        name: ClassQuality(float(p), float(r), float(f), int(n), **of_label)
        for name, p, r, f, n, of_label in zip(label_names, *columns, by_label, strict=True)
    }
    _, _, f1, support = columns
    macro_f1 = float(f1.sum(where=support > 0) / max(np.count_nonzero(support), 1))
    agreement = None if reference is None else float(is_equal(predicted, reference).mean())
    accuracy = float(is_equal(predicted, gold).mean())
    return Quality(accuracy, macro_f1, classes, confusion.tolist(), agreement, **others)


def _multi_label_metrics(
    gold: Labels, predicted: Labels, probabilities: npt.NDArray[np.floating] | None
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the fields of `Quality`, and of `ClassQuality` for each label, that are for multi-label only."""
    from sklearn.metrics import average_precision_score, f1_score, label_ranking_average_precision_score

    micro = f1_score(gold, predicted, average="micro", zero_division=0)
    metrics = {"micro_f1": micro, "sample_f1": f1_score(gold, predicted, average="samples", zero_division=1)}
    by_label: list[dict[str, float]] = [{}] * gold.shape[1]
    if probabilities is not None:
        by_label, has_label = [], gold.any(axis=1)
        for is_gold, probability in zip(gold.T, probabilities.T, strict=True):
            precision = average_precision_score(is_gold, probability) if is_gold.any() else 0
            calibration = measure_calibration(probability[:, None], is_gold[:, None])
            by_label.append({"average_precision": float(precision), "ece": calibration.ece, "brier": calibration.brier})
        total = sum(label["average_precision"] for label in by_label)
        metrics["average_precision"] = total / max(int(gold.any(axis=0).sum()), 1)
        if has_label.any():
            rows = gold[has_label], probabilities[has_label]
            metrics["label_ranking"] = label_ranking_average_precision_score(*rows)
    return {name: float(value) for name, value in metrics.items()}, by_label


@dataclass(frozen=True)
class Bin:
    """Mean confidence, accuracy and number of the texts in one of several equally wide confidence bins.

    For multi-label, these are the mean probability, fraction of gold labels and number of pairs of a text and a label.
    """

    confidence: float
    accuracy: float
    texts: int


@dataclass(frozen=True)
class Calibration:
    """Calibration of predicted probabilities.

    For multi-label, every pair of a text and a label is one binary prediction: its confidence is the probability of the
    label, and it is correct if the text has the label.

    Attributes:
        ece: Expected calibration error, from 0 to 1: the mean distance between confidence and accuracy over the bins,
            weighted by the number of texts (Naeini et al., 2015, "Obtaining Well Calibrated Probabilities Using
            Bayesian Binning").
        brier: Brier score, from 0 to 2: the mean squared distance between the probabilities and the one-hot gold
            class, summed over the classes (Brier, 1950, "Verification of Forecasts Expressed in Terms of Probability").
            For multi-label from 0 to 1: averaged over the labels.
        reliability: The bins that contain texts, in order of increasing confidence.
    """

    ece: float
    brier: float
    reliability: list[Bin]


def measure_calibration(probabilities: npt.NDArray[np.floating], gold: Labels) -> Calibration:
    """Measure the calibration of (n, n_classes) probabilities on the gold labels of n >= 1 texts."""
    bins, confidence, is_correct, scores = calibration_terms(probabilities, gold)
    bins, confidence, is_correct = bins.ravel(), confidence.ravel(), is_correct.ravel()
    reliability = [
        Bin(float(confidence[in_bin].mean()), float(is_correct[in_bin].mean()), int(in_bin.sum()))
        for in_bin in (bins == index for index in np.unique(bins))
    ]
    error = np.abs(np.bincount(bins, is_correct - confidence)).sum() / len(bins)
    return Calibration(float(error), float(scores.mean()), reliability)


def calibration_terms(
    probabilities: npt.NDArray[np.floating], gold: Labels
) -> tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.bool_], Floats]:
    """Return bin, confidence and correctness, (n, 1) or multi-label (n, n_classes), and the (n,) Brier scores."""
    confidence, task = np.asarray(probabilities, np.float64), task_of(gold)
    squares = np.square(confidence - task.targets(gold, confidence.shape[1]))
    if task is MULTI_LABEL:
        is_correct, scores = np.asarray(gold, bool), squares.mean(axis=1)
    else:
        is_correct, scores = (confidence.argmax(axis=1) == gold)[:, None], squares.sum(axis=1)
        confidence = confidence.max(axis=1, keepdims=True)
    bins = np.minimum((confidence * N_BINS).astype(np.int64), N_BINS - 1)
    return bins, confidence, is_correct, scores


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


def coverage_curve(probabilities: npt.NDArray[np.floating], gold: Labels) -> Floats:
    """Return the threshold, coverage and accuracy for each distinct confidence, shape (k, 3), by rising coverage."""
    _, confidences, correctness, _ = calibration_terms(probabilities, gold)
    confidence, is_correct = confidences.ravel(), correctness.ravel()
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

    def __str__(self) -> str:
        return f"{100 * self.low:.1f}-{100 * self.high:.1f}"


def bootstrap_quality(
    gold: Labels, predicted: Labels, *, n_classes: int, other: Labels | None = None
) -> dict[str, Interval]:
    """Compute ``accuracy`` and ``macro_f1`` with intervals or, with ``other``, the difference to other predictions.

    For multi-label also ``micro_f1``. All labels are of the same n >= 1 texts, which are drawn with replacement (Efron
    and Tibshirani, 1993, "An Introduction to the Bootstrap"). Differences are computed within each resample, because
    both classifiers see the same texts. With fewer than about 15 texts per class, the interval of macro-F1 is too low.
    """
    task, others = task_of(gold), [predicted] if other is None else [predicted, other]
    # Texts with the same labels are interchangeable, so it is enough to draw the number of texts of each such kind.
    _, rows, counts = np.unique(np.column_stack([gold, *others]), axis=0, return_index=True, return_counts=True)
    expected, *predicted_labels = (task.targets(labels[rows], n_classes) for labels in (gold, *others))

    def metrics(weights: Floats) -> Floats:
        first, *second = (_weighted_metrics(weights, expected, each) for each in predicted_labels)
        return first - second[0] if second else first

    rng, n = np.random.default_rng([0, 10]), len(gold)
    size, n_batches = _RESAMPLES_PER_BATCH, N_RESAMPLES // _RESAMPLES_PER_BATCH
    batches = [metrics(rng.multinomial(n, counts / n, size=size).astype(np.float64)) for _ in range(n_batches)]
    values, resampled = metrics(counts[None, :].astype(np.float64))[0], np.concatenate(batches)
    names = [name for name in ("accuracy", "macro_f1", "micro_f1") if name in METRICS[task]]
    return {name: _interval(float(values[i]), resampled[:, i]) for i, name in enumerate(names)}


def bootstrap_mean(values: npt.NDArray[np.floating | np.bool_]) -> Interval:
    """Compute the mean of (n,) values, n >= 1, with its interval."""
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng([0, 13]).multinomial(len(values), counts / len(values), N_RESAMPLES)
    return _interval(float(values.mean()), draws @ distinct / len(values))


def bootstrap_calibration(probabilities: npt.NDArray[np.floating], gold: Labels) -> dict[str, Interval]:
    """Compute ``ece`` and ``brier`` of (n, n_classes) probabilities, with n >= 1, with their intervals over the texts.

    Resampling adds random error, so the interval of a small ``ece`` is too high and may lie above its value.
    """
    from scipy.sparse import csr_array

    bins, confidence, is_correct, scores = calibration_terms(probabilities, gold)
    n, n_predictions = bins.shape
    texts = np.repeat(np.arange(n), n_predictions)
    gaps = csr_array(((is_correct - confidence).ravel(), (bins.ravel(), texts)), (N_BINS, n))
    rng, errors, means = np.random.default_rng([0, 12]), [], []
    for _ in range(N_RESAMPLES):
        weights = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        errors.append(np.abs(gaps @ weights).sum() / bins.size)
        means.append(scores @ weights / n)
    measured = measure_calibration(probabilities, gold)
    return {"ece": _interval(measured.ece, np.array(errors)), "brier": _interval(measured.brier, np.array(means))}


def _interval(value: float, resampled: Floats) -> Interval:
    return Interval(value, *map(float, np.percentile(resampled, (2.5, 97.5))))


def _weighted_metrics(weights: Floats, gold: npt.NDArray[np.float32], predicted: npt.NDArray[np.float32]) -> Floats:
    """Compute accuracy, macro-F1 (over the classes with gold texts) and micro-F1, shape (r, 3).

    The weights of k kinds of texts have shape (r, k), their gold and predicted labels (k, n_classes), 1 or 0.
    """
    from scipy.sparse import csr_array

    n_gold, n_predicted, n_correct = (weights @ csr_array(labels) for labels in (gold, predicted, gold * predicted))
    f1 = 2 * n_correct / np.maximum(n_gold + n_predicted, 1)  # (r, n_classes)
    macro_f1 = f1.sum(axis=1, where=n_gold > 0) / np.maximum((n_gold > 0).sum(axis=1), 1)
    micro_f1 = 2 * n_correct.sum(axis=1) / np.maximum((n_gold + n_predicted).sum(axis=1), 1)
    accuracy = weights @ (gold == predicted).all(axis=1) / weights.sum(axis=1)
    return np.column_stack([accuracy, macro_f1, micro_f1])
