"""Runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import FAST

from setfit_kd import distill
from setfit_kd.cli import main
from setfit_kd.errors import DataError
from setfit_kd.report import compare

NEWSWIRE = "bundled:newswire"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    other = folder / "other.csv"
    other.write_text("text,label\nThe bank sells its shares,Business\nThe team wins the cup,Sports\n", encoding="utf-8")
    settings: dict[str, tuple[str | None, dict[str, int]]] = {
        "one": (NEWSWIRE, {}),
        "two": (NEWSWIRE, {"seed": 1}),
        "other": (str(other), {}),
        "blind": (None, {}),
    }
    for name, (evaluation, more) in settings.items():
        every: dict[str, Any] = {**FAST, "pool_size": 48, "baseline": False, **more}
        models: dict[str, Any] = {"teacher": str(tiny_teacher), "student": str(tiny_student)}
        distill(NEWSWIRE, NEWSWIRE, evaluation, output_dir=folder / name, **{**models, **every})
    return {name: folder / name for name in settings}


def test_the_first_runs_student_is_what_the_others_are_held_to(runs: dict[str, Path]) -> None:
    found = compare([runs["one"], runs["two"], runs["other"]])
    assert [(one.run.name, one.name) for one in found] == [
        (run, model) for run in ("one", "two", "other") for model in ("teacher", "student")
    ]
    reference = found[1].evaluation
    for one in found[:4]:
        if one is found[1]:
            assert one.difference is None
            continue
        assert one.difference is not None
        assert one.difference.value == pytest.approx(one.evaluation.quality.accuracy - reference.quality.accuracy)
        assert one.difference.low <= one.difference.value <= one.difference.high
    assert [one.difference for one in found[4:]] == [None, None]  # evaluated on other texts


def test_the_command_shows_a_row_a_model(runs: dict[str, Path]) -> None:
    result = CliRunner().invoke(main, ["compare", str(runs["one"]), str(runs["two"])])
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.rstrip().splitlines()
    rows = lines[-4:]
    assert {"run", "model", "accuracy", "difference"} <= set(" ".join(lines[:-4]).split())
    assert [row.split()[:2] for row in rows] == [
        [str(runs[run]), model] for run in ("one", "two") for model in ("teacher", "student")
    ]


@pytest.mark.parametrize(("name", "wrong"), [("blind", "was not evaluated"), ("nowhere", "There is no run in")])
def test_what_cannot_be_compared_is_told(name: str, wrong: str, runs: dict[str, Path]) -> None:
    folder = runs["one"].parent / name
    with pytest.raises(DataError, match=wrong):
        compare([runs["one"], folder])
    result = CliRunner().invoke(main, ["compare", str(folder)])
    assert result.exit_code == 2
    assert wrong in result.stderr
