"""Two processes started by torchrun: trainings and runs are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import trainings
from conftest import FAST
from synthetic import QUICK, pool_signals
from trainings import LIMIT, OUT_OF_MEMORY, TRAININGS, train

from setfit_kd import distill, train_student
from setfit_kd.distributed.ranks import OtherRanks
from setfit_kd.inference.classifier import TorchClassifier
from setfit_kd.models import encode
from setfit_kd.models.bodies import load_body
from setfit_kd.models.static import static_body
from setfit_kd.training import shared_batches

TESTS = Path(__file__).parent.parent


def torchrun(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **environment, "SETFIT_KD_CACHE": str(cache)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += map(str, arguments)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def settings(tiny_teacher: Path, tiny_student: Path) -> dict[str, Any]:
    """Settings of the run."""
    sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
    return {**FAST, **sources, "teacher": str(tiny_teacher), "student": str(tiny_student), "baseline": False}


@pytest.fixture(scope="module")
def folder(tiny_student: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all trainings in two processes, a run, and the output of both."""
    folder = tmp_path_factory.mktemp("ranks")
    options = {name: value for name, value in settings.items() if value is not False}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    flags += [f"--no-{name}" for name in settings if name not in options]
    command = ["run", f"--output-dir={folder / 'run'}", *flags]
    process = torchrun(trainings.__file__, tiny_student, folder / "results.pt", *command, cache=folder)
    (folder / "output.txt").write_text(process.stdout + process.stderr)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> list[dict[str, Any]]:
    """Results of all trainings in two processes."""
    return cast("list[dict[str, Any]]", torch.load(folder / "results.pt", weights_only=False))


@pytest.fixture(scope="module")
def alone(tiny_student: Path) -> dict[str, dict[str, Any]]:
    """Results of the trainings in this process."""
    return {name: train(tiny_student, **settings) for name, settings in TRAININGS.items()}


def difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", ["student", "teacher", "pairs"])
@pytest.mark.parametrize("group", [0, 1])
def test_trained_weights_are_those_of_one_process(
    shared: list[dict[str, Any]], alone: dict[str, Any], name: str, group: int
) -> None:
    assert difference(shared[group][name]["weights"], alone[name]["weights"]) < 1e-9
    assert difference(shared[group][name]["gradients"], alone[name]["gradients"]) < 1e-9


@pytest.mark.parametrize(("name", "tolerance"), [("float32", 1e-5), ("bf16", 0.02)])
def test_first_gradients_are_those_of_one_process(
    shared: list[dict[str, Any]], alone: dict[str, Any], name: str, tolerance: float
) -> None:
    expected = alone[name]["gradients"]
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert difference(shared[0][name]["gradients"], expected) < tolerance * max(largest, 1)


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_out_of_memory_on_a_rank_repeats_the_step(
    shared: list[dict[str, Any]], alone: dict[str, Any], name: str
) -> None:
    result = shared[2][name]
    assert result["sizes"] == [16, 8, LIMIT]
    assert difference(result["weights"], alone["student"]["weights"]) < 1e-9


def test_run_is_that_of_one_process(
    folder: Path, settings: dict[str, Any], tmp_path: Path, trained_steps: list[int]
) -> None:
    output = (folder / "output.txt").read_text()
    assert output.count("Finished in") == output.count("Evaluating student: 200 texts") == 1
    assert "Scoring pool on rank 0: 300 texts" in output  # of 600

    alone = distill(output_dir=tmp_path / "run", **settings)
    assert trained_steps
    trained_steps.clear()
    resumed = distill(resume=folder / "run", **settings)
    assert not trained_steps  # all stages are cached
    assert resumed.evaluations.keys() == alone.evaluations.keys() == {"teacher", "student"}
    for name, evaluation in alone.evaluations.items():
        expected, result = evaluation.as_dict(), resumed.evaluations[name].as_dict()
        assert result["confusion"] == expected["confusion"]
        assert result["ece"] == pytest.approx(expected["ece"], abs=1e-4)


def test_error_is_printed_once(tmp_path: Path) -> None:
    process = torchrun("-m", "setfit_kd", "run", "--labeled", "missing.csv", cache=tmp_path)
    assert process.returncode != 0
    assert process.stderr.count("Error: No such file: missing.csv.") == 1


def test_texts_are_dealt_out_by_length() -> None:
    assert [rows.tolist() for rows in OtherRanks(1).deal(np.array([5, 9, 7, 8]))] == [[1, 2], [3, 0]]
    assert [rows.tolist() for rows in OtherRanks(3).deal(np.array([5, 9]))] == [[1], [0]]


def test_static_body_is_trained_by_one_process(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body: Any = static_body(load_body(tiny_teacher), ["a text"], dimension=8)
    monkeypatch.setattr(shared_batches, "other_ranks", lambda: OtherRanks(1))
    assert shared_batches.share_batches(body, cast("Any", None), cast("Any", None)) is None
    assert "Training in one of the 2 processes" in caplog.text


def test_predictions_are_those_of_one_process(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train_student(pool_signals(), tiny_student, **QUICK)
    monkeypatch.setattr(encode, "other_ranks", pytest.fail)
    assert len(TorchClassifier(model).predict_proba(["a text"] * 600)) == 600  # `embed` would send the model each time
