"""What a plan says beforehand is what then passes through a body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from synthetic import POOL, QUICK, few_labels, pool_signals

from setfit_kd import train_student, train_teacher
from setfit_kd.config import StudentConfig, TeacherConfig
from setfit_kd.student import steps, student_passes
from setfit_kd.teacher import teacher_passes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LABELED = 16
TEACHER: dict[str, Any] = {"device": "cpu", "precision": "fp32", "teacher_steps": 3, "teacher_batch_size": 12}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epochs": 2, "batch_size": 8},  # the last text of 33 is left over
        {"epochs": 2, "batch_size": 10},  # a last batch of 3
        {"micro_batch_size": 5},
        {"micro_batch_size": 16},
        {"batch_size": 10, "micro_batch_size": 4},  # a last batch that fits
        {"objective": "soft-labels"},
        {"objective": "similarity,soft-labels=3", "micro_batch_size": 4},
        {"objective": "embedding"},
        {"objective": "pairs", "num_iterations": 3},
        {"objective": "pairs", "num_iterations": 3, "micro_batch_size": 6},
        {"objective": "pairs", "batch_size": 4, "micro_batch_size": 8},
        {"gold_weight": 0.0},
        {"patience": 9, "epochs": 3},
        {"patience": 9, "objective": "similarity,soft-labels=3", "micro_batch_size": 4},
        {"patience": 9, "objective": "pairs"},
    ],
)
def test_a_students_passes_are_known_beforehand(
    student_body: SentenceTransformer, passed: list[int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "LOOK_STEPS", 1)
    config = StudentConfig.of(**{**QUICK, "learning_rate": 1e-4, **settings})
    train_student(pool_signals(), student_body, labeled=few_labels(LABELED), config=config)
    assert sum(passed) == student_passes(config, POOL, LABELED)


def test_the_head_of_a_large_pool_sees_a_part_of_it() -> None:
    config = StudentConfig.of(epochs=1, objective="similarity")
    assert student_passes(config, 100_016, 16) == 100_016 + 20_000 + 16


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_size": 5},
        {"micro_batch_size": 12},
        {"teacher_objective": "pairs", "num_iterations": 1},
        {"teacher_objective": "pairs", "num_iterations": 1, "micro_batch_size": 5},
        {"teacher_objective": "pairs", "num_iterations": 1, "micro_batch_size": 32},
    ],
)
def test_a_teachers_passes_are_known_beforehand(
    student_body: SentenceTransformer, passed: list[int], settings: dict[str, Any]
) -> None:
    config, labeled = TeacherConfig.of(**{**TEACHER, **settings}), few_labels(LABELED)
    train_teacher(labeled, student_body, config=config)
    assert sum(passed) == teacher_passes(config, labeled)
