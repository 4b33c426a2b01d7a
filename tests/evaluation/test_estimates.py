"""Estimated quality of multi-label models without an evaluation set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from setfit_kd.evaluation.estimates import Estimate, estimate_student, estimate_table, estimate_teacher
from setfit_kd.evaluation.metrics import Interval

LABELS = np.array([[True, False], [True, True], [False, False], [False, True]])
PROBABILITIES = np.array([[0.9, 0.3], [0.8, 0.7], [0.2, 0.1], [0.6, 0.8]], np.float32)


@pytest.mark.parametrize(
    ("thresholds", "exact_match", "macro_f1"),
    [(None, 3 / 4, (0.8 + 1) / 2), (np.array([0.7, 0.2]), 3 / 4, (1 + 0.8) / 2)],
)
def test_teacher_is_estimated_by_exact_match_at_thresholds(
    thresholds: np.ndarray | None, exact_match: float, macro_f1: float, tmp_path: Path
) -> None:
    estimate = estimate_teacher(PROBABILITIES, LABELS, 0.5, thresholds=thresholds)
    assert estimate.accuracy.value == pytest.approx(exact_match / 4 + 0.5 * 3 / 4)
    assert estimate.macro_f1 is not None
    assert estimate.macro_f1.value == pytest.approx(macro_f1)
    estimate.save(tmp_path / "estimate")
    assert Estimate.load(tmp_path / "estimate") == estimate
    headings, [row] = estimate_table({"teacher": estimate})
    assert headings[1:4] == ["exact match", "95% CI", "macro-F1"]
    assert row[1] == f"{estimate.accuracy.value:.1%}"


def test_student_loses_accuracy_where_its_labels_are_less_probable() -> None:
    teacher = Estimate(Interval(0.8, 0.7, 0.9), task="multi-label")
    assert estimate_student(teacher, PROBABILITIES, PROBABILITIES) == Estimate(
        teacher.accuracy, agreement=1.0, task="multi-label"
    )
    student = PROBABILITIES.copy()
    student[0] = 0.4, 0.3  # the teacher predicts the first label of this text only, the student none
    estimate = estimate_student(teacher, student, PROBABILITIES)
    teacher_belief, student_belief = 0.9 * 0.7 + 0.5 * 0.4 * 0.7, 0.1 * 0.7 + 0.5 * 0.6 * 0.7
    assert estimate.accuracy.value == pytest.approx(0.8 - (teacher_belief - student_belief) / 4)
    assert estimate.agreement == 0.75
    thresholds = np.array([0.35, 0.5])
    assert estimate_student(teacher, student, PROBABILITIES, thresholds=thresholds).agreement == 1
    assert estimate_student(teacher, student, PROBABILITIES, teacher_thresholds=np.array([0.95, 0.5])).agreement == 0.5
