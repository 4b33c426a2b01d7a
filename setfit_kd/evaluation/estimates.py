"""Estimated quality of the models of a run without an evaluation set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from setfit_kd.evaluation.metrics import METRICS, Interval, bootstrap_quality, measure_calibration
from setfit_kd.tasks.classification import SINGLE_LABEL, TASKS, Labels, is_equal, task_of
from setfit_kd.utils.arrays import Floats
from setfit_kd.utils.json_artifact import JsonArtifact

_CONFIDENCE_WEIGHT = 0.75  # of the confidence on the pool, which varies less than the accuracy on a few labeled texts
_STUDENT_WEIGHT = 0.5  # of a student's probabilities, compared with those of its teacher


@dataclass(frozen=True)
class Estimate(JsonArtifact):
    """Estimated quality of a model on texts like those of the pool.

    Attributes:
        accuracy: Accuracy with its 95% interval; for multi-label, the exact match.
        macro_f1: Macro-F1 with its 95% interval, from cross-fitting; None for a student.
        ece: Calibration error, from cross-fitting, too high if there are few labels; None for a student.
        agreement: Share of pool texts with the same labels as the teacher's; None for a teacher.
        task: Name of the task.
    """

    file_name = "estimate.json"
    accuracy: Interval
    macro_f1: Interval | None = None
    ece: float | None = None
    agreement: float | None = None
    task: str = SINGLE_LABEL.name

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON, named as those of an evaluation, and marked by ``estimated``."""
        intervals = {name: value for name, value in vars(self).items() if isinstance(value, Interval)}
        values: dict[str, Any] = {"estimated": True, **{name: value.value for name, value in intervals.items()}}
        values |= {f"{name}_interval": [value.low, value.high] for name, value in intervals.items()}
        others = {"ece": self.ece, "agreement": self.agreement}
        return {**values, **{name: value for name, value in others.items() if value is not None}}


def estimate_teacher(
    probabilities: Floats, labels: Labels, confidence: float | None, *, thresholds: Floats | None = None
) -> Estimate:
    """Estimate the quality of a teacher from cross-fitting and from its confidence on the pool.

    The accuracy is a weighted mean of two estimates: that on the labeled texts, by teachers trained on fewer labels,
    and the mean confidence on the pool. The first is exact only with many labels, the second only if the teacher is
    calibrated (Guillory et al., 2021, "Predicting with Confidence on Unseen Distributions"). The interval has the width
    of the first one's.

    Args:
        probabilities: (n, n_classes) calibrated probabilities of the labeled texts, from cross-fitting; n >= 1.
        labels: Gold labels of these texts.
        confidence: Mean probability that the teacher's labels of a pool text are all correct; None without a pool.
        thresholds: (n_classes,) decision thresholds of a multi-label task; None for 0.5.
    """
    task = task_of(labels)
    quality = bootstrap_quality(labels, task.decide(probabilities, thresholds), n_classes=probabilities.shape[1])
    accuracy, ece = quality["accuracy"], measure_calibration(probabilities, labels).ece
    shift = 0.0 if confidence is None else _CONFIDENCE_WEIGHT * (confidence - accuracy.value)
    return Estimate(_shifted(accuracy, shift), quality["macro_f1"], ece, task=task.name)


def estimate_student(
    teacher: Estimate,
    student: Floats,
    targets: Floats,
    *,
    thresholds: Floats | None = None,
    teacher_thresholds: Floats | None = None,
) -> Estimate:
    """Estimate the accuracy of a student from that of its teacher and their predictions on unlabeled texts.

    Where they disagree, the probabilities of both predictions by both models tell how much more often the teacher is
    right.

    Args:
        teacher: Estimate of the teacher.
        student: (n, n_classes) calibrated probabilities of the student.
        targets: (n, n_classes) calibrated probabilities of the teacher.
        thresholds: (n_classes,) decision thresholds of a multi-label student; None for 0.5.
        teacher_thresholds: Those of the teacher.
    """
    task = TASKS[teacher.task]
    predicted, expected = task.decide(student, thresholds), task.decide(targets, teacher_thresholds)

    def belief(labels: Labels) -> Floats:
        return task.joint_probability(targets, labels) + _STUDENT_WEIGHT * task.joint_probability(student, labels)

    loss = float((belief(expected) - belief(predicted)).mean())
    agreement = float(is_equal(predicted, expected).mean())
    return Estimate(_shifted(teacher.accuracy, -loss), agreement=agreement, task=task.name)


def _shifted(interval: Interval, shift: float) -> Interval:
    value, low, high = (min(max(bound + shift, 0.0), 1.0) for bound in (interval.value, interval.low, interval.high))
    return replace(interval, value=value, low=low, high=high)


def estimate_table(estimates: dict[str, Estimate]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and cells of a table with one row per model."""

    def cells(interval: Interval | None) -> list[str]:
        return ["", ""] if interval is None else [f"{interval.value:.1%}", str(interval)]

    names = METRICS[TASKS[next(iter(estimates.values())).task]]
    headings = ["estimated", names["accuracy"], "95% CI", "macro-F1", "95% CI", "calibration error", "agreement"]
    rows = []
    for name, estimate in estimates.items():
        others = ["" if value is None else f"{value:.1%}" for value in (estimate.ece, estimate.agreement)]
        rows.append([name, *cells(estimate.accuracy), *cells(estimate.macro_f1), *others])
    return headings, rows
