"""Comparison of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import FAST

from setfit_kd import distill
from setfit_kd.cli import main
from setfit_kd.errors import DataError
from setfit_kd.report.comparison import compare

NEWSWIRE = "bundled:newswire"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    other_texts = folder / "other.csv"
    other_texts.write_text(
        "text,label\nThe bank sells its shares,Business\nThe team wins the cup,Sports\n", encoding="utf-8"
    )
    settings: dict[str, tuple[str | None, dict[str, int]]] = {
        "one": (NEWSWIRE, {}),
        "two": (NEWSWIRE, {"seed": 1}),
        "other": (str(other_texts), {}),
        "unevaluated": (None, {}),
    }
    models: dict[str, Any] = {"teacher": str(tiny_teacher), "student": str(tiny_student)}
    for name, (evaluation, changes) in settings.items():
        run_settings: dict[str, Any] = {**models, **FAST, "pool_size": 48, "baseline": False, **changes}
        distill(NEWSWIRE, NEWSWIRE, evaluation, output_dir=folder / name, **run_settings)
    return {name: folder / name for name in settings}


def test_difference_is_to_student_of_first_run(runs: dict[str, Path]) -> None:
    models = compare([runs["one"], runs["two"], runs["other"]])
    assert [(model.run.name, model.name) for model in models] == [
        (run, name) for run in ("one", "two", "other") for name in ("teacher", "student")
    ]
    reference = models[1].evaluation
    for model in models[:4]:
        if model is models[1]:
            assert model.difference is None
            continue
        assert model.difference is not None
        assert model.difference.value == pytest.approx(model.evaluation.quality.accuracy - reference.quality.accuracy)
        assert model.difference.low <= model.difference.value <= model.difference.high
    assert [model.difference for model in models[4:]] == [None, None]  # evaluated on other texts


def test_command_prints_one_row_per_model(runs: dict[str, Path]) -> None:
    result = CliRunner().invoke(main, ["compare", str(runs["one"]), str(runs["two"])])
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.rstrip().splitlines()
    rows = lines[-4:]
    assert {"run", "model", "accuracy", "difference"} <= set(" ".join(lines[:-4]).split())
    assert [row.split()[:2] for row in rows] == [
        [str(runs[run]), model] for run in ("one", "two") for model in ("teacher", "student")
    ]


@pytest.mark.parametrize(("name", "message"), [("unevaluated", "was not evaluated"), ("nowhere", "Found no run in")])
def test_explains_runs_that_cannot_be_compared(name: str, message: str, runs: dict[str, Path]) -> None:
    folder = runs["one"].parent / name
    with pytest.raises(DataError, match=message):
        compare([runs["one"], folder])
    result = CliRunner().invoke(main, ["compare", str(folder)])
    assert result.exit_code == 2
    assert message in result.stderr
