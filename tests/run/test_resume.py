"""Runs that go on after a kill: from the last whole stage, within a training from its last checkpoint."""

from __future__ import annotations

import json
import os
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
from click.testing import CliRunner
from conftest import FAST
from synthetic import stop_at
from torch import Tensor

from setfit_kd import distill, load, train_student, train_teacher
from setfit_kd.cli import main
from setfit_kd.config import RunConfig, SignalsConfig, StageConfig, StudentConfig, TeacherConfig, read_config
from setfit_kd.data import LabeledSet
from setfit_kd.errors import ConfigError, DataError, OutputError
from setfit_kd.finetune import finetune
from setfit_kd.run import resumed_config
from setfit_kd.run_folder import RunFolder
from setfit_kd.signals import TeacherSignals
from setfit_kd.utils.atomic_io import lock_folder
from setfit_kd.utils.hashing import fingerprint

EVERY_STEP = 1e-9
EVALUATIONS = {f"evaluation/{name}" for name in ("teacher", "student", "baseline")}
STAGES = {"teacher", "signals", "student", "baseline", *EVALUATIONS}

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def base(tiny_teacher: Path, tiny_student: Path) -> dict[str, Any]:
    small = {"pool_size": 48, "shots": 4, "epochs": 2, "batch_size": 16, "cache": False}
    return {**FAST, **small, "teacher": str(tiny_teacher), "student": str(tiny_student)}


@pytest.fixture(scope="module")
def run_in(base: dict[str, Any]) -> Run:
    """Run, or go on with, the run in a folder."""

    def run(folder: Path, *, resume: bool = False, **others: Any) -> Any:
        where = {"resume" if resume else "output_dir": folder}
        return distill(*["bundled:newswire"] * 3, **{**base, **where, **others})

    return run


@pytest.fixture(scope="module")
def calm(run_in: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "calm"
    run_in(folder)
    return folder


@pytest.fixture
def finished(calm: Path, tmp_path: Path) -> Path:
    """A copy of it, to be gone on with."""
    return Path(shutil.copytree(calm, tmp_path / "run"))


def weights(model: Any) -> list[Tensor]:
    return [*model.model_body.state_dict().values(), torch.as_tensor(model.model_head.coef_)]


def same_weights(one: Any, other: Any) -> None:
    for here, there in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(here, there, atol=1e-6, rtol=0)


def without_speed(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: of[key] for key in of if key != "texts_per_second"} for name, of in metrics.items()}


def same_run(folder: Path, expected: Path) -> None:
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (folder, expected))
    assert without_speed(ours) == without_speed(theirs)
    for name in ("teacher", "baseline", "student"):
        same_weights(load(folder / name, device="cpu"), load(expected / name, device="cpu"))
    ours, theirs = (TeacherSignals.load(path / "signals") for path in (folder, expected))
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-6)
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}


# Kills


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_a_run_that_is_killed_over_and_over_ends_as_one_that_is_not(
    calm: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    kills = Path(__file__).with_name("kills.py")
    every = json.dumps({**base, "checkpoint_seconds": EVERY_STEP})
    done = subprocess.run(
        [sys.executable, kills, tmp_path / "stormy", every], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20
    same_run(tmp_path / "stormy", calm)


class Killed(BaseException):
    """What stands for a kill where the training alone is looked at."""


TEXTS = [f"{subject} {verb} {thing}" for subject in ("dog", "bank", "team") for verb in ("sees", "buys") for thing in
         ("goals", "shares", "chips", "films")]  # fmt: skip
LABELS = np.arange(len(TEXTS)) % 3


def signals() -> TeacherSignals:
    rng = np.random.default_rng(0)
    said = rng.dirichlet(np.ones(3), len(TEXTS)).astype(np.float32)
    return TeacherSignals(TEXTS, said, ("a", "b", "c"), rng.normal(size=(len(TEXTS), 8)).astype(np.float32))


def student_of(body: Path, **settings: Any) -> Any:
    every = {"device": "cpu", "precision": "fp32", "epochs": 3, "batch_size": 8, "learning_rate": 1e-3}
    return train_student(signals(), body, **{**every, **settings})


LABELED = LabeledSet(TEXTS, LABELS, ("a", "b", "c"))


def teacher_of(body: Path, **settings: Any) -> Any:
    every = {"device": "cpu", "precision": "fp32", "teacher_steps": 9, "teacher_batch_size": 8}
    return train_teacher(LABELED, body, **{**every, "teacher_learning_rate": 1e-3, **settings})


def transformer_student_of(body: Path, **settings: Any) -> Any:
    return student_of(Path(f"transformer:{body}"), **settings)


def transformer_teacher_of(body: Path, **settings: Any) -> Any:
    return teacher_of(Path(f"transformer:{body}"), **settings)


def finetuned(body: Path, **settings: Any) -> Any:
    every = {"device": "cpu", "precision": "fp32", "epochs": 3, "batch_size": 8, "learning_rate": 1e-3}
    return finetune(LABELED, body, validation=LABELED, **{**every, **settings})


@pytest.mark.parametrize(
    ("training", "settings"),
    [
        (student_of, {}),
        (student_of, {"dropout": True}),
        (student_of, {"objective": "pairs", "num_iterations": 1}),
        (student_of, {"objective": "embedding,soft-labels", "alpha": 0.2}),
        (student_of, {"patience": 9, "epochs": 4}),
        (student_of, {"patience": 1, "epochs": 9, "learning_rate": 0.5}),
        (teacher_of, {}),
        (teacher_of, {"teacher_dropout": True}),
        (teacher_of, {"teacher_objective": "pairs", "num_iterations": 2}),
        (transformer_student_of, {}),
        (transformer_student_of, {"patience": 9, "objective": "soft-labels,embedding"}),
        (transformer_teacher_of, {"schedule": "cosine"}),
        (finetuned, {"schedule": "plateau", "eval_steps": 2, "patience": 4}),
    ],
)
@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_a_training_goes_on_as_if_nothing_had_happened(
    training: Callable[..., Any],
    settings: dict[str, Any],
    step: int,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = training(tiny_student, **settings)
    kept = {**settings, "checkpoints": tmp_path / "kept", "checkpoint_seconds": EVERY_STEP}
    with monkeypatch.context() as patch:
        stop_at(patch, step, Killed)
        with suppress(Killed):  # some have ended by then
            training(tiny_student, **kept)
    same_weights(training(tiny_student, **kept), expected)


def test_checkpoints_come_by_the_clock(tiny_student: Path, tmp_path: Path) -> None:
    student_of(tiny_student, checkpoints=tmp_path / "rare", checkpoint_seconds=1000)
    assert not (tmp_path / "rare").exists()
    student_of(tiny_student, checkpoints=tmp_path / "often", checkpoint_seconds=EVERY_STEP)
    assert sorted(path.name for path in (tmp_path / "often").iterdir()) == ["checkpoint-8"]


@pytest.mark.parametrize("damage", ["truncated", "gone", "unmarked", "none"])
def test_a_damaged_checkpoint_is_never_taken_up(
    damage: str, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = student_of(tiny_student)
    kept = {"checkpoints": tmp_path, "checkpoint_seconds": EVERY_STEP}
    with monkeypatch.context() as patch:
        stop_at(patch, 6, Killed)
        with pytest.raises(Killed):
            student_of(tiny_student, **kept)
    newest = tmp_path / "checkpoint-5"
    weights = newest / "body.safetensors"
    if damage == "gone":
        weights.unlink()
    elif damage == "unmarked":
        (newest / "whole.json").unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    with caplog.at_level("INFO", "setfit_kd"):
        same_weights(student_of(tiny_student, **kept), expected)
    assert (f"The checkpoint {newest} is not whole" in caplog.text) == (damage != "none")
    assert ("Going on from step 5" in caplog.text) == (damage == "none")


@pytest.mark.parametrize("free_kb", [8, 64, 128, 256, 384])
def test_a_disk_too_small_for_a_checkpoint_ends_no_training(
    free_kb: int, mount: Callable[[str], Path], tiny_student: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = mount(f"size={free_kb}k") / "student"
    kept = student_of(tiny_student, checkpoints=folder, checkpoint_seconds=EVERY_STEP)
    same_weights(kept, student_of(tiny_student))
    assert caplog.text.count("A checkpoint is left out, so that a kill would cost more: Cannot write") == 1
    assert all((left / "whole.json").is_file() for left in folder.glob("*"))


# What a resumed run does again


def taken(caplog: pytest.LogCaptureFixture) -> set[str]:
    lines = [record.getMessage() for record in caplog.records]
    return {line.split(":")[0].removeprefix("Stage ") for line in lines if ": taken from" in line and "Stage" in line}


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({}, set()),
        ({"encode_batch_size": 16, "micro_batch_size": 4, "checkpoint_seconds": 60}, set()),
        ({"num_iterations": 5}, set()),
        ({"epochs": 1}, {"student", "evaluation/student"}),
        ({"gold_weight": 1.0}, {"student", "evaluation/student"}),
        ({"refine": "none"}, {"signals", "student", *EVALUATIONS}),
        ({"pool_size": 40}, {"signals", "student", *EVALUATIONS}),
        ({"teacher_steps": 3}, STAGES),
        ({"shots": 3}, STAGES),
        ({"seed": 1}, STAGES),
    ],
)
def test_a_changed_setting_does_anew_the_stages_that_it_touches(
    settings: dict[str, Any],
    again: set[str],
    run_in: Run,
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", "setfit_kd"):
        result = run_in(finished, resume=True, **settings)
    assert taken(caplog) == STAGES - again
    if again:
        fresh = run_in(tmp_path / "fresh", **settings)
        assert without_speed(result.metrics) == without_speed(fresh.metrics)
        same_run(finished, tmp_path / "fresh")


def test_data_that_are_named_again_are_read_and_drawn_as_before(finished: Path, tmp_path: Path) -> None:
    before = read_config(finished / "config.yaml")
    assert before["shots"] is not None
    settings = {**before, "text_column": ["title", "body"], "label_column": "topic", "pool_size": 99}
    (finished / "config.yaml").write_text(RunConfig.of(**settings).to_yaml())
    named = {"labeled": "few.csv", "unlabeled": "pool.txt"}
    config = resumed_config(finished, named)
    assert (config.labeled, config.unlabeled, config.eval) == ("few.csv", "pool.txt", None)
    assert (config.text_column, config.label_column) == (("title", "body"), "topic")
    assert (config.shots, config.pool_size) == (before["shots"], 99)
    assert resumed_config(finished, {**named, "shots": 5}).shots == 5


def test_another_student_leaves_the_teacher_alone(
    run_in: Run, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "setfit_kd"):
        run_in(finished, resume=True, student=["layers:1", "static:8"])
    assert taken(caplog) == {"teacher", "signals", "evaluation/teacher"}
    assert {path.name for path in (finished / "students").iterdir()} == {"layers-1", "static-8"}
    assert not any((finished / name).exists() for name in ("student", "baseline", "evaluation/student"))


def test_every_setting_decides_or_does_not() -> None:
    """A new setting of a stage is taken to change what comes out, until it is said not to."""
    pairs = RunConfig.of(objective="pairs", teacher_objective="pairs")
    stages = (TeacherConfig, SignalsConfig, StudentConfig)
    found = {name for stage in stages for name in set(stage.model_fields) - set(stage.fingerprinted(pairs))}
    how = {"device", "cpu_fallback", "micro_batch_size", "gradient_checkpointing", "encode_batch_size"}
    assert found - {"num_iterations"} == {*how, "cache", "checkpoint_seconds"}
    assert "num_iterations" in TeacherConfig.fingerprinted(RunConfig.of(teacher_objective="pairs"))
    assert set(StageConfig.model_fields) >= how


@pytest.mark.parametrize("stage", ["teacher", "signals", "student", "evaluation/student"])
def test_a_damaged_stage_is_gone_through_again(
    stage: str, run_in: Run, calm: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in (finished / stage).rglob("*"):
        if file.suffix in (".safetensors", ".npy"):
            file.write_bytes(file.read_bytes()[:-8])
    with caplog.at_level("INFO", "setfit_kd"):
        run_in(finished, resume=True)
    assert stage not in taken(caplog)
    assert f"Stage {stage} is gone through again" in caplog.text
    same_run(finished, calm)


def test_what_was_measured_of_a_run_goes_when_the_run_changes(
    run_in: Run, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2, Killed)
        with pytest.raises(Killed):
            run_in(finished, resume=True, epochs=3)
    left = {path.name for path in finished.iterdir()}
    assert not left & {"metrics.json", "student"}
    about = json.loads((finished / "run.json").read_text())
    assert not about["finished"]
    assert {"teacher", "signals", "baseline"} <= set(about["stages"])


def test_fingerprints_tell_apart_what_differs() -> None:
    parts = [["a", "b"], ["ab"], ["a"], "a", ["a", ["b"]], {"a": 1}, {"a": 2}, [], [1.0], [1]]
    assert len({fingerprint(part) for part in parts}) == len(parts)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(["a"], ["b"]) != fingerprint(["a", "b"])


# Folders


def test_there_must_be_a_run_to_go_on_with(run_in: Run, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for name in ("nowhere", "other"):
        with pytest.raises(ConfigError, match="There is no run in"):
            run_in(tmp_path / name, resume=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["other", "notes.txt"]


def test_an_overwriting_that_was_killed_can_be_done_again(
    run_in: Run, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, removed = RunFolder._remove, []

    def dies(folder: RunFolder, name: str) -> None:
        remove(folder, name)
        removed.append(name)
        if name == "teacher":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_remove", dies)
        with pytest.raises(KeyboardInterrupt):
            run_in(finished, overwrite=True)
    assert "student" not in removed
    assert (finished / "student").is_dir()
    assert run_in(finished, overwrite=True).metrics


@pytest.mark.parametrize("again", [{"resume": True}, {"overwrite": True}])
def test_what_a_kill_left_half_written_is_taken_away(again: dict[str, bool], run_in: Run, finished: Path) -> None:
    left = [finished / name for name in (".student.0123abcd", "student/.new.0123abcd", "teachers/a/.new.0123abcd")]
    for folder in left:
        (folder / "deep").mkdir(parents=True)
    run_in(finished, **again)
    assert not [folder for folder in left if folder.exists()]


@pytest.mark.parametrize("content", ["", "[]", '{"format": 9, "stages": {}}', '{"format": 1}'])
def test_an_account_that_cannot_be_understood_is_told_of(content: str, run_in: Run, finished: Path) -> None:
    (finished / "run.json").write_text(content)
    with pytest.raises(DataError, match=r"run\.json"):
        run_in(finished, resume=True)
    assert (finished / "student").is_dir()


@pytest.mark.parametrize(
    "name", ["..", "../other", "students/..", "students/../../other", "/tmp/other", "", "config.yaml"]
)
def test_an_account_leads_to_nothing_outside_the_folder(name: str, run_in: Run, finished: Path) -> None:
    (finished.parent / "other").mkdir()
    about = json.loads((finished / "run.json").read_text())
    about["stages"][name] = about["stages"]["student"]
    (finished / "run.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="which no run has"):
        run_in(finished, resume=True)
    assert (finished.parent / "other").is_dir()
    assert (finished / "config.yaml").is_file()


def test_a_folder_that_is_not_empty_tells_how_to_go_on(run_in: Run, finished: Path) -> None:
    with pytest.raises(OutputError, match=f"--resume {finished}"):
        run_in(finished)


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OutputError("It is full.", hint="Free some."), 2)]
)
def test_after_the_error_it_is_told_how_to_go_on(
    error: BaseException, code: int, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("setfit_kd.run.student_stages.train_student", fail)
    result = CliRunner().invoke(main, ["run", "--resume", str(finished), "--epochs", "1"])
    assert result.exit_code == code
    told = result.stderr.splitlines()
    assert told[-1] == f"What is whole is kept. To go on: setfit-kd run --resume {finished}"
    assert told[-2] in ("Interrupted.", "Free some.")
    with lock_folder(finished):
        busy = CliRunner().invoke(main, ["run", "--resume", str(finished)])
    assert "Another process" in busy.stderr
    assert "To go on" not in busy.stderr


def test_two_processes_keep_out_of_each_others_way(run_in: Run, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with lock_folder(finished), pytest.raises(OutputError, match=rf"Another process \({os.getpid()}\)"):
        run_in(finished, resume=True)
    with lock_folder(finished), pytest.raises(OutputError, match="Another process"):
        run_in(finished, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"} == {
        path: when for path, when in before.items() if path.name != ".lock"
    }


def test_the_lock_of_a_process_that_is_gone_is_none(run_in: Run, finished: Path) -> None:
    program = (
        "import os, signal, sys, pathlib\nfrom setfit_kd.utils.atomic_io import lock_folder\n"
        "with lock_folder(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", program, finished], check=False)
    assert died.returncode == -signal.SIGKILL
    assert run_in(finished, resume=True).metrics


def test_files_have_the_modes_that_the_user_gives_to_new_ones(calm: Path, tmp_path: Path) -> None:
    (tmp_path / "probe").touch()
    usual = (tmp_path / "probe").stat().st_mode
    files = [path for path in calm.rglob("*") if path.is_file()]
    assert {path.name for path in files if path.stat().st_mode != usual} == set()


# The command line


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--resume", "nowhere"], "There is no run in nowhere"),
        (["--resume", "x", "--preset", "newswire"], "Drop --preset"),
        (["--resume", "x", "--output-dir", "y"], "Drop --output-dir"),
        (["--resume", "x", "--overwrite"], "Drop --output-dir and --overwrite"),
    ],
)
def test_the_command_line_refuses_what_cannot_be_resumed(flags: list[str], wrong: str) -> None:
    result = CliRunner().invoke(main, ["run", *flags])
    assert result.exit_code == 2
    assert wrong in result.stderr


def test_the_command_line_resumes(finished: Path) -> None:
    result = CliRunner().invoke(main, ["run", "--resume", str(finished), "--epochs", "1"])
    assert result.exit_code == 0, result.stderr
    assert "Stage teacher: taken from" in result.stderr
    assert "Stage student: taken" not in result.stderr
    assert "epochs: 1" in (finished / "config.yaml").read_text()
