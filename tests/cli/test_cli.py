"""Commands of the command line interface."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from checks import assert_refused, invoke
from conftest import FAST
from synthetic import raise_at_step

from setfit_kd.cli import main
from setfit_kd.config.run import RunConfig
from setfit_kd.config.task_runs import TASK_RUNS
from setfit_kd.errors import UnavailableError

NEWSWIRE = ("run", "--preset", "newswire", "--device", "cpu")


def test_flags_of_run_match_settings() -> None:
    other_flags = {"preset_name", "config_file", "resume", "dry_run", "quiet", "verbose", "help_all"}
    options = {param.name: param for param in main.commands["run"].params if isinstance(param, click.Option)}
    of_tasks = {name for config in TASK_RUNS.values() for name in config.model_fields} - set(RunConfig.model_fields)
    assert set(options) - other_flags == set(RunConfig.model_fields) | of_tasks
    for name in RunConfig.model_fields:
        assert "--" + name.replace("_", "-") in options[name].opts


@pytest.mark.parametrize("command", ["run", "finetune"])
def test_help_is_short_and_help_all_is_complete(command: str) -> None:
    short, complete = (invoke(command, flag).stdout for flag in ("--help", "--help-all"))
    assert "--labeled" in short
    assert short.count("\n  -") <= 22
    options = [param for param in main.commands[command].params if isinstance(param, click.Option)]
    assert all(complete.count(f"{option.opts[-1]} ") >= 1 for option in options)


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("", [], {"shots": 16, "teacher": "demo:all-MiniLM-L6-v2", "labeled": "bundled:newswire"}),
        (
            "epochs: 7\nbatch-size: 8\nbaseline: false\ndropout: true\n",
            ["--epochs", "9", "--baseline", "--no-dropout"],
            {"epochs": 9, "batch_size": 8, "baseline": True, "dropout": False, "eval": "bundled:newswire"},
        ),
    ],
)
def test_flags_override_file_and_file_overrides_preset(
    file: str, flags: list[str], expected: dict[str, Any], demo_model: str, tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_text(file)
    result = invoke(*NEWSWIRE, "--config", "settings.yaml", "--dry-run", *flags)
    assert result.exit_code == 0, result.stderr
    for name, value in expected.items():
        assert f"{name}: {json.dumps(value) if not isinstance(value, str) else value}" in result.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "settings.yaml"]


def test_labeled_flag_drops_data_of_the_preset() -> None:
    Path("few.csv").write_text("text,label\nred,a\nblue,b\nrose,a\nsky,b\n")
    result = invoke(*NEWSWIRE, "--labeled", "few.csv")
    message = "Expected at least one batch of 32 training texts, got 4"
    assert_refused(result, "There are no unlabeled texts", message)


@pytest.mark.parametrize("is_installed", [True, False])
def test_offline_run_suggests_a_command_for_the_same_files(is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def locate(name: str) -> Path:
        if name.startswith("demo:") and is_installed:
            return Path()
        raise UnavailableError(f"The model {name!r} is not available.", hint="Install it.")

    monkeypatch.setattr("setfit_kd.models.bodies.locate_model", locate)
    Path("few.csv").write_text("text,label\nred,a\nblue,b\nrose,a\nsky,b\n")
    Path("my pool.txt").write_text("".join(f"text {number}\n" for number in range(40)))
    arguments = ["run", "--labeled", "few.csv", "--unlabeled", "my pool.txt"]
    result = invoke(*arguments)
    demo = ["--teacher", "demo:all-MiniLM-L6-v2", "--student", "layers:0,2,5"]
    assert result.exit_code == 69
    assert result.stderr.endswith(f"works without the hub: {shlex.join(['setfit-kd', *arguments, *demo])}\n")
    assert ("Install it." in result.stderr) is not is_installed
    for flags in (["--teacher", "other"], ["--eval", "ag_news"]):
        assert "layers:0,2,5" not in invoke(*arguments, *flags).stderr


def test_dry_run_lists_texts_and_training_steps(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    result = invoke(
        *(*NEWSWIRE, "--dry-run", "--teacher", tiny_teacher, "--student", tiny_student, "--seeds", "2"),
        *("--shots", "8", "--pool-size", "100", "--teacher-steps", "3", "--teacher-batch-size", "16", "--epochs", "2"),
    )
    assert result.exit_code == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line and line[0] != "-"}
    assert rows["teacher"] == rows["baseline"] == ["32", "3"]
    assert (rows["signals"], rows["student"], rows["evaluation"]) == (["1,000"], ["1,000", "58"], ["200"])
    assert "with 2 seeds" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_run_prints_results_and_predict_command(tiny_teacher: Path, tiny_student: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items() if value]
    result = invoke(*NEWSWIRE, "--teacher", tiny_teacher, "--student", tiny_student, "--output-dir", "out", *flags)
    assert result.exit_code == 0, result.stderr
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.count("%") > 1]
    assert rows == ["teacher", "baseline", "student"]
    assert "setfit-kd predict out" in result.stdout
    assert "\nTraining teacher: 4 steps\n" in result.stderr
    assert "\nEvaluating student: 200 texts\n" in result.stderr
    assert invoke("predict", "out", "hello", "-q", "--device", "cpu").stderr == ""
    assert "is not a number" in invoke("predict", "out", "hello", "--threshold", "nan").stderr


def test_doctor_shows_which_presets_can_run() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.stderr
    for part in ("http://127.0.0.1:9    not reachable", "ag_news               cannot run", "0 MiB of embeddings"):
        assert part in result.stdout


def test_interrupt_exits_with_130(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_at_step(monkeypatch, 2, KeyboardInterrupt)
    result = invoke(*NEWSWIRE, "--teacher", tiny_teacher, "--student", "layers:1", "--output-dir", "out")
    assert (result.exit_code, "Interrupted." in result.stderr) == (130, True)
    assert not Path("out/metrics.json").exists()


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory."), MemoryError()])
def test_unexpected_memory_errors_are_explained(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("setfit_kd.config.run.RunConfig.resolve", fail)
    result = invoke("run")
    assert result.exit_code == 71
    assert f"Out of memory ({str(error) or 'unknown reason'})." in result.stderr
