"""A dry run lists the training steps that the run then takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import FAST
from synthetic import POOL_SIZE, QUICK, few_labels, pool_signals

from setfit_kd import train_student, train_teacher
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import FinetuneConfig, StudentConfig, TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.finetune.train import finetune, finetune_steps
from setfit_kd.memory.devices import resolve_device
from setfit_kd.run.dry_run import plan
from setfit_kd.run.inputs import prepare_run
from setfit_kd.run.pipeline import run as run_pipeline
from setfit_kd.student.distil import student_steps
from setfit_kd.teacher.train import steps_and_batch_size


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 2, "batch_size": 8},  # the last of 33 texts is dropped
        {"epochs": 2, "batch_size": 10},  # a last batch of 3
        {"objective": "pairs", "num_iterations": 3},
        {"patience": 9, "epochs": 3},
    ],
)
def test_student_steps_are_counted(tiny_student: Path, trained_steps: list[int], settings: dict[str, Any]) -> None:
    config = StudentConfig.of(**{**QUICK, "learning_rate": 1e-4, **settings})
    train_student(pool_signals(), tiny_student, labeled=few_labels(), config=config)
    assert len(trained_steps) == student_steps(config, "setfit", POOL_SIZE)


@pytest.mark.parametrize("name", ["{}", "transformer:{}"])
@pytest.mark.parametrize(
    "settings",
    [{"teacher_steps": 3}, {"teacher_steps": None}, {"teacher_objective": "pairs", "num_iterations": 1}],
)
def test_teacher_steps_are_counted(
    name: str, settings: dict[str, Any], tiny_student: Path, trained_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.teacher.train.MIN_TRANSFORMER_STEPS", 5)
    labeled, device = few_labels(18), resolve_device("cpu")
    config = TeacherConfig.of(**{"device": "cpu", "precision": "fp32", "teacher_batch_size": 12, **settings})
    train_teacher(labeled, name.format(tiny_student), config=config)
    family: Any = "transformer" if name.startswith("transformer") else "setfit"
    assert len(trained_steps) == steps_and_batch_size(config, labeled, family=family, device=device)[0]


@pytest.mark.parametrize("settings", [{}, {"batch_size": 6}, {"steps": 3}])
def test_finetune_steps_are_counted(settings: dict[str, Any], tiny_student: Path, trained_steps: list[int]) -> None:
    config = FinetuneConfig.of(**{"device": "cpu", "precision": "fp32", "epochs": 2, "batch_size": 8, **settings})
    finetune(few_labels(), tiny_student, config=config)
    assert len(trained_steps) == finetune_steps(config, 16, resolve_device("cpu"))


@pytest.mark.parametrize(
    "settings",
    [
        {"student": ["static:8", "layers:1"]},
        {"student": ["TINY", "static:4@TINY"], "baseline": False},
        {"student": "layers:1", "augment": 20, "augment_confidence": 0.0},
        {"teacher": ["TINY", "transformer:TINY"], "student": "transformer:TINY", "teacher_weights": "cross-validated"},
    ],
)
def test_run_steps_are_counted(settings: dict[str, Any], tiny_student: Path, trained_steps: list[int]) -> None:
    sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")

    settings = json.loads(json.dumps({"teacher": "TINY", **settings}).replace("TINY", str(tiny_student)))
    config = RunConfig.of(**{**FAST, **sources, "pool_size": 48, **settings})
    planned = {stage.name: stage for stage in plan(config, prepare_run(config))}
    assert planned["signals"].texts == 48 + planned["teacher"].texts + settings.get("augment", 0)
    assert ("baseline" in planned) == settings.get("baseline", True)
    run_pipeline(config)
    assert len(trained_steps) == sum(stage.steps for stage in planned.values())


def test_steps_without_a_pool_are_counted(
    tiny_student: Path, trained_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text is held out, since all have gold labels; the baseline takes as many steps as the student."""
    monkeypatch.setattr("setfit_kd.student.distil.MIN_HELD_OUT", 4)
    sources, name = dict.fromkeys(("labeled", "eval"), "bundled:newswire"), f"transformer:{tiny_student}"
    config = RunConfig.of(**{**FAST, **sources, "shots": 16, "epochs": 3, "teacher": name, "student": name})
    planned = {stage.name: stage for stage in plan(config, prepare_run(config))}
    assert planned["student"].steps == planned["baseline"].steps == 3 * 64 // config.batch_size
    run_pipeline(config)
    assert len(trained_steps) == sum(stage.steps for stage in planned.values())


def test_announced_steps_are_taken_if_labels_are_not_in_the_pool(
    tiny_student: Path, trained_steps: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pool texts are held out as usual, since none of them has a gold label."""
    monkeypatch.setattr("setfit_kd.student.distil.MIN_HELD_OUT", 3)
    few, config = few_labels(POOL_SIZE), StudentConfig.of(**{**QUICK, "learning_rate": 1e-4, "batch_size": 6})
    other = LabeledSet([f"another text, {text}" for text in few.texts], few.labels, few.label_names)
    with caplog.at_level(logging.DEBUG, logger="setfit_kd"):
        train_student(pool_signals(), tiny_student, labeled=other, config=config)
    assert f"Training student: starting {len(trained_steps)} steps." in caplog.messages
    assert len(trained_steps) == 5 * config.epochs  # 30 of the 33 texts
