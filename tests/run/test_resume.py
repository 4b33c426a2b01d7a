"""Resuming killed runs: from the last finished stage, and within training from the last checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import assert_refused, invoke, truncate_file
from conftest import FAST, Run
from synthetic import few_labels, pool_signals, raise_at_step
from torch import Tensor

from setfit_kd import load, train_student, train_teacher
from setfit_kd.config.presets import read_config
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import SignalsConfig, StudentConfig, TeacherConfig
from setfit_kd.errors import ConfigError, DataError, OutputError
from setfit_kd.finetune.train import finetune
from setfit_kd.run.pipeline import resumed_config
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.utils.atomic_io import lock_folder
from setfit_kd.utils.files import fingerprint

EVERY_STEP = 1e-9
EVALUATIONS = {f"evaluation/{name}" for name in ("teacher", "student", "baseline")}
STAGES = {"teacher", "signals", "student", "baseline", *EVALUATIONS}


@pytest.fixture(scope="module")
def base(tiny_teacher: Path, tiny_student: Path) -> dict[str, Any]:
    small = {"pool_size": 48, "shots": 4, "epochs": 2, "batch_size": 16, "cache": False}
    sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
    return {**FAST, **small, **sources, "teacher": str(tiny_teacher), "student": str(tiny_student)}


@pytest.fixture(scope="module")
def uninterrupted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run(output_dir=folder)
    return folder


@pytest.fixture
def finished(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run that can be resumed."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run"))


def weights(model: Any) -> list[Tensor]:
    return [*model.model_body.state_dict().values(), torch.as_tensor(model.model_head.coef_)]


def assert_equal_weights(model: Any, expected: Any) -> None:
    for tensor, expected_tensor in zip(weights(model), weights(expected), strict=True):
        torch.testing.assert_close(tensor, expected_tensor, atol=1e-6, rtol=0)


def assert_equal_runs(folder: Path, expected: Path) -> None:
    metrics, expected_metrics = (json.loads((path / "metrics.json").read_text()) for path in (folder, expected))
    for values in (*metrics.values(), *expected_metrics.values()):
        del values["texts_per_second"]
    assert metrics == expected_metrics
    for name in ("teacher", "baseline", "student"):
        assert_equal_weights(load(folder / name, device="cpu"), load(expected / name, device="cpu"))
    signals, expected_signals = (TeacherSignals.load(path / "signals") for path in (folder, expected))
    np.testing.assert_allclose(signals.probabilities, expected_signals.probabilities, atol=1e-6)
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_run_killed_many_times_equals_an_uninterrupted_one(
    uninterrupted: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("kills.py")
    settings = json.dumps({**base, "checkpoint_seconds": EVERY_STEP})
    command = [sys.executable, str(script), str(tmp_path / "killed"), settings]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) >= 20
    assert_equal_runs(tmp_path / "killed", uninterrupted)


class Killed(BaseException):
    """Simulates a kill in tests of training alone."""


BY_EPOCH = {"device": "cpu", "precision": "fp32", "epochs": 3, "batch_size": 8, "learning_rate": 1e-3}


def student(body: Path, family: str = "", **settings: Any) -> Any:
    return train_student(pool_signals(24), f"{family}{body}", **{**BY_EPOCH, **settings})


def teacher(body: Path, family: str = "", **settings: Any) -> Any:
    defaults = {"device": "cpu", "precision": "fp32", "teacher_steps": 9, "teacher_batch_size": 8}
    return train_teacher(few_labels(24), f"{family}{body}", **{**defaults, "teacher_learning_rate": 1e-3, **settings})


def finetuned(body: Path, **settings: Any) -> Any:
    return finetune(few_labels(24), body, validation=few_labels(24), **{**BY_EPOCH, **settings})


@pytest.mark.parametrize(
    ("train", "settings"),
    [
        (student, {"dropout": True}),
        (student, {"objective": "pairs", "num_iterations": 1}),
        (student, {"objective": "embedding,soft-labels", "alpha": 0.2}),
        (student, {"patience": 9, "epochs": 4}),
        (student, {"patience": 1, "epochs": 9, "learning_rate": 0.5}),
        (teacher, {"teacher_dropout": True}),
        (teacher, {"teacher_objective": "pairs", "num_iterations": 2}),
        (student, {"family": "transformer:", "patience": 9, "objective": "soft-labels,embedding"}),
        (teacher, {"family": "transformer:", "schedule": "cosine"}),
        (finetuned, {"schedule": "plateau", "eval_steps": 2, "patience": 4}),
    ],
)
@pytest.mark.parametrize("step", [3, 6])
def test_resumed_training_equals_an_uninterrupted_one(
    train: Any, settings: dict[str, Any], step: int, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tiny_student, **settings)
    with_checkpoints = {**settings, "checkpoints": tmp_path / "checkpoints", "checkpoint_seconds": EVERY_STEP}
    with monkeypatch.context() as patch:
        raise_at_step(patch, step, Killed)
        with suppress(Killed):  # some trainings have fewer steps
            train(tiny_student, **with_checkpoints)
    assert_equal_weights(train(tiny_student, **with_checkpoints), expected)


def test_checkpoints_are_written_at_time_intervals(tiny_student: Path, tmp_path: Path) -> None:
    student(tiny_student, checkpoints=tmp_path / "rare", checkpoint_seconds=1000)
    assert not (tmp_path / "rare").exists()
    student(tiny_student, checkpoints=tmp_path / "often", checkpoint_seconds=EVERY_STEP)
    assert sorted(path.name for path in (tmp_path / "often").iterdir()) == ["checkpoint-8"]


@pytest.mark.parametrize("damage", ["truncated", "body.safetensors", "whole.json", "none"])
def test_damaged_checkpoint_is_not_resumed_from(
    damage: str, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = student(tiny_student)
    with_checkpoints: dict[str, Any] = {"checkpoints": tmp_path, "checkpoint_seconds": EVERY_STEP}
    with monkeypatch.context() as patch:
        raise_at_step(patch, 6, Killed)
        with pytest.raises(Killed):
            student(tiny_student, **with_checkpoints)
    newest = tmp_path / "checkpoint-5"
    if damage == "truncated":
        truncate_file(newest / "body.safetensors")
    elif damage != "none":
        (newest / damage).unlink()
    with caplog.at_level("INFO", "setfit_kd"):
        assert_equal_weights(student(tiny_student, **with_checkpoints), expected)
    assert (f"The checkpoint {newest} is incomplete or damaged" in caplog.text) == (damage != "none")
    assert ("Resuming from step 5" in caplog.text) == (damage == "none")


@pytest.mark.parametrize("free_kb", [8, 256])
def test_training_continues_if_the_disk_is_too_small_for_checkpoints(
    free_kb: int, mount: Callable[[str], Path], tiny_student: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = mount(f"size={free_kb}k") / "student"
    trained = student(tiny_student, checkpoints=folder, checkpoint_seconds=EVERY_STEP)
    assert_equal_weights(trained, student(tiny_student))
    assert caplog.text.count("Skipped a checkpoint, training continues: Cannot write") == 1
    assert all((checkpoint / "whole.json").is_file() for checkpoint in folder.glob("*"))


# Stages that a resumed run repeats


def loaded_stages(caplog: pytest.LogCaptureFixture) -> set[str]:
    return {line.split(":")[0].removeprefix("Stage ") for line in caplog.messages if re.match("Stage .*: loaded", line)}


@pytest.mark.parametrize(
    ("settings", "repeated"),
    [
        ({"num_iterations": 5, "encode_batch_size": 16, "micro_batch_size": 4, "checkpoint_seconds": 60}, set()),
        ({"epochs": 1}, {"student", "evaluation/student"}),
        ({"refine": "none"}, {"signals", "student", "baseline", *EVALUATIONS}),
        ({"exact": True}, {"signals", "student", "baseline", *EVALUATIONS}),
        ({"pool_size": 40}, {"signals", "student", "baseline", *EVALUATIONS}),
        ({"teacher_steps": 3}, STAGES),
    ],
)
def test_changed_setting_repeats_the_stages_that_depend_on_it(
    settings: Any, repeated: set[str], run: Run, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "setfit_kd"):
        run(resume=finished, **settings)
    assert loaded_stages(caplog) == STAGES - repeated
    if repeated:
        run(output_dir=tmp_path / "fresh", **settings)
        assert_equal_runs(finished, tmp_path / "fresh")


def test_new_student_does_not_repeat_the_teacher(run: Run, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "setfit_kd"):
        run(resume=finished, student=["layers:1", "static:8"])
    assert loaded_stages(caplog) == {"teacher", "signals", "evaluation/teacher"}
    assert {path.name for path in (finished / "students").iterdir()} == {"layers-1", "static-8"}
    assert not any((finished / name).exists() for name in ("student", "baseline", "evaluation/student"))


def test_fingerprint_contains_all_settings_except_these() -> None:
    """A new setting of a stage is part of the fingerprint unless it is excluded."""
    pairs = RunConfig.of(objective="pairs", teacher_objective="pairs")
    stages = (TeacherConfig, SignalsConfig, StudentConfig)
    excluded = {name for stage in stages for name in set(stage.model_fields) - set(stage.fingerprint_inputs(pairs))}
    execution = {"device", "cpu_fallback", "micro_batch_size", "gradient_checkpointing", "encode_batch_size"}
    assert excluded - {"num_iterations"} == {*execution, "cache", "checkpoint_seconds", "exact"}
    assert "num_iterations" in TeacherConfig.fingerprint_inputs(pairs)
    assert "num_iterations" not in TeacherConfig.fingerprint_inputs(RunConfig.of())


@pytest.mark.parametrize("stage", ["teacher", "signals", "evaluation/student"])
def test_damaged_stage_runs_again(
    stage: str, run: Run, uninterrupted: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in (finished / stage).rglob("*"):
        if file.suffix in (".safetensors", ".npy"):
            file.write_bytes(file.read_bytes()[:-8])
    with caplog.at_level("INFO", "setfit_kd"):
        run(resume=finished)
    assert stage not in loaded_stages(caplog)
    assert f"Running stage {stage} again" in caplog.text
    assert_equal_runs(finished, uninterrupted)


def test_different_values_have_different_fingerprints() -> None:
    parts = [["a", "b"], ["ab"], ["a"], "a", ["a", ["b"]], {"a": 1}, {"a": 2}, [], [1.0], [1]]
    assert len({fingerprint(part) for part in parts}) == len(parts)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(["a"], ["b"]) != fingerprint(["a", "b"])


# Folders


def test_resume_requires_a_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for name in ("nowhere", "other"):
        with pytest.raises(ConfigError, match="Found no run in"):
            run(resume=tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["other", "notes.txt"]


def test_interrupted_overwrite_can_be_repeated(run: Run, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, removed = RunFolder._remove, []
    with pytest.raises(OutputError, match=f"--resume {finished}"):
        run(output_dir=finished)

    def remove_until_teacher(folder: RunFolder, name: str) -> None:
        remove(folder, name)
        removed.append(name)
        if name == "teacher":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_remove", remove_until_teacher)
        with pytest.raises(KeyboardInterrupt):
            run(output_dir=finished, overwrite=True)
    assert "student" not in removed
    assert (finished / "student").is_dir()
    assert run(output_dir=finished, overwrite=True).metrics


def test_temporary_folders_of_a_killed_process_are_removed(run: Run, finished: Path) -> None:
    temporary = [finished / name for name in (".student.0123abcd", "student/.new.0123abcd", "teachers/a/.new.0123abcd")]
    for folder in temporary:
        (folder / "nested").mkdir(parents=True)
    run(resume=finished)
    assert not [folder for folder in temporary if folder.exists()]


@pytest.mark.parametrize("name", ["../other", "/tmp/other", "config.yaml"])
def test_manifest_cannot_refer_to_files_outside_the_folder(name: str, run: Run, finished: Path) -> None:
    (finished.parent / "other").mkdir()
    manifest = json.loads((finished / "run.json").read_text())
    manifest["stages"][name] = manifest["stages"]["student"]
    (finished / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="unknown stage"):
        run(resume=finished)
    assert (finished.parent / "other").is_dir()
    assert (finished / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OutputError("The disk is full.", hint="Free some space."), 2)]
)
def test_resume_hint_follows_the_error(
    error: BaseException, code: int, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    folder = finished.rename(finished.with_name("my run"))
    monkeypatch.setattr("setfit_kd.run.stages.train_student", fail)
    result = invoke("run", "--resume", folder, "--epochs", 1)
    assert result.exit_code == code
    hint = f"Completed stages are kept. Resume with: setfit-kd run --resume '{folder}'"
    assert result.stderr.splitlines()[-2:] in (["Interrupted.", hint], ["Free some space.", hint])


def test_two_processes_cannot_use_the_same_folder(run: Run, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    for settings in ({"resume": finished}, {"output_dir": finished, "overwrite": True}):
        with lock_folder(finished), pytest.raises(OutputError, match=rf"Another process \({os.getpid()}\)"):
            run(**settings)
    with lock_folder(finished):
        assert "Resume with" not in invoke("run", "--resume", finished).stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"} == before


def test_lock_of_a_killed_process_is_ignored(run: Run, finished: Path) -> None:
    program = (
        "import os, signal, sys, pathlib\nfrom setfit_kd.utils.atomic_io import lock_folder\n"
        "with lock_folder(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", program, finished], check=False)
    assert process.returncode == -signal.SIGKILL
    assert run(resume=finished).metrics


def test_files_have_the_default_permissions(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "probe").touch()
    default = (tmp_path / "probe").stat().st_mode
    files = [path for path in uninterrupted.rglob("*") if path.is_file()]
    assert {path.name for path in files if path.stat().st_mode != default} == set()


def test_new_sources_are_read_with_the_same_settings(finished: Path, tmp_path: Path) -> None:
    before = read_config(finished / "config.yaml")
    settings = {**before, "text_column": ["title", "body"], "label_column": "topic", "pool_size": 99}
    (finished / "config.yaml").write_text(RunConfig.of(**settings).to_yaml())
    sources = {"labeled": "few.csv", "unlabeled": "pool.txt"}
    config = resumed_config(finished, sources)
    assert (config.labeled, config.unlabeled, config.eval) == ("few.csv", "pool.txt", None)
    assert (config.text_column, config.label_column) == (("title", "body"), "topic")
    assert (config.shots, config.pool_size) == (before["shots"], 99)
    assert resumed_config(finished, {**sources, "shots": 5}).shots == 5


def test_invalid_resume_flags_are_refused() -> None:
    assert_refused(invoke("run", "--resume", "x", "--preset", "newswire"), "Remove --preset")
    message = "cannot be combined with --output-dir or --overwrite"
    assert_refused(invoke("run", "--resume", "x", "--overwrite"), message)
