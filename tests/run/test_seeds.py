"""Runs with several seeds: mean and deviation over draws and trainings."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from conftest import FAST, newswire
from hypothesis import given
from hypothesis import strategies as st

from setfit_kd import RunResult, distill
from setfit_kd.cli import main
from setfit_kd.errors import ConfigError, DataError, OutputError
from setfit_kd.evaluation import Evaluation, Spread, over_seeds
from setfit_kd.report import read_summary, write_report

FIGURES = {"accuracy", "macro_f1", "ece", "brier"}

Run = Callable[..., RunResult]


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tiny_student: Path) -> Run:
    small = {"pool_size": 48, "shots": 4, "epochs": 1, "batch_size": 16, "cache": False}
    sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
    base = {**FAST, **small, **sources, "teacher": str(tiny_teacher), "student": str(tiny_student)}

    def run(**others: Any) -> RunResult:
        return distill(**{**base, **others})

    return run


@pytest.fixture(scope="module")
def three(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the seeds 5, 6 and 7."""
    folder = tmp_path_factory.mktemp("runs") / "three"
    run(seed=5, seeds=3, output_dir=folder)
    return folder


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    for model in found.values():
        model.pop("texts_per_second")
    return found


def test_each_seed_is_the_run_that_it_would_be_alone(run: Run, three: Path, tmp_path: Path) -> None:
    of_three = metrics(three)
    assert all(set(model.pop("over_seeds")) == {"figures", "against"} for model in of_three.values())
    for seed, folder, found in ((5, three, of_three), (6, three / "seeds/6", metrics(three / "seeds/6"))):
        run(seed=seed, output_dir=tmp_path / str(seed))
        assert metrics(tmp_path / str(seed)) == found, folder
    assert sorted(path.name for path in (three / "seeds").iterdir()) == ["6", "7"]


def test_mean_and_deviation_are_those_of_the_runs(three: Path) -> None:
    runs = [metrics(three), metrics(three / "seeds/6"), metrics(three / "seeds/7")]
    assert len({json.dumps(run["student"]["confusion"]) for run in runs}) > 1
    for name, told in runs[0].items():
        spread = told["over_seeds"]
        assert set(spread["figures"]) == FIGURES | (set() if name == "teacher" else {"agreement"})
        for figure, of in spread["figures"].items():
            values = [run[name][figure] for run in runs]
            assert of["values"] == pytest.approx(values)
            assert (of["mean"], of["std"]) == pytest.approx((fmean(values), stdev(values)))
        assert set(spread["against"]) == ({"teacher", "baseline"} if name == "student" else set())
        for other, figures in spread["against"].items():
            for figure, of in figures.items():
                less = [run[name][figure] - run[other][figure] for run in runs]
                assert of["values"] == pytest.approx(less)
                assert of["std"] == pytest.approx(stdev(less))


def test_a_finished_run_is_given_more_seeds_and_nothing_is_made_twice(run: Run, three: Path, tmp_path: Path) -> None:
    run(seed=5, output_dir=tmp_path / "run")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("model.safetensors")}
    distill(resume=tmp_path / "run", seeds=2)
    assert metrics(tmp_path / "run/seeds/6") == metrics(three / "seeds/6")
    run(seed=5, seeds=3, resume=tmp_path / "run", output_dir=None)
    assert metrics(tmp_path / "run") == metrics(three)
    assert made
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_a_run_that_is_stopped_within_another_seed_goes_on_there(
    run: Run, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Evaluation.save
    saved: list[Path] = []

    def stop(self: Evaluation, folder: Path) -> None:
        if "seeds/6" in str(folder) and folder.name == "student" and not saved:
            saved.append(folder)
            raise KeyboardInterrupt
        save(self, folder)

    monkeypatch.setattr(Evaluation, "save", stop)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(seed=5, seeds=3, output_dir=folder)
    assert not json.loads((folder / "run.json").read_text())["finished"]
    assert not (folder / "metrics.json").exists()
    with pytest.raises(DataError, match="has not come to its end"):
        read_summary(folder)
    teacher = folder / "seeds/6/teacher/model.safetensors"
    before = teacher.stat().st_mtime_ns
    distill(resume=folder)
    assert metrics(folder) == metrics(three)
    assert teacher.stat().st_mtime_ns == before


def test_the_log_tells_of_what_seed_and_stage_a_line_is(three: Path) -> None:
    stages = [re.match(r"\S+ \S+ \w+ +(\S+): ", line) for line in (three / "run.log").read_text().splitlines()]
    found = {match[1] for match in stages if match}
    assert {"run", "teacher", "student", "seeds/6/teacher", "seeds/7/evaluation/student"} <= found
    of_six = {line.split()[3] for line in (three / "seeds/6/run.log").read_text().splitlines()}
    assert "seeds/6/teacher:" in of_six
    assert not any(stage.startswith("seeds/7") for stage in of_six)


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["broken", "gone"])
def test_a_seed_whose_folder_is_damaged_is_gone_through_again(
    run: Run, three: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = shutil.copytree(three, tmp_path / "run")
    file = folder / "seeds/6" / name
    file.unlink() if damage == "gone" else file.write_text("{")
    distill(resume=folder)
    assert metrics(folder) == metrics(three)
    assert yaml.safe_load((folder / "seeds/6/config.yaml").read_text())["overwrite"] is False


def test_another_seed_that_fails_takes_nothing_from_a_finished_run(
    run: Run, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(three, tmp_path / "run")

    def fail(*_: Any, **__: Any) -> None:
        raise OutputError("The disk is full.")

    monkeypatch.setattr("setfit_kd.run.teacher_stages.train_teacher", fail)
    with pytest.raises(OutputError):
        distill(resume=folder, seeds=4)
    assert metrics(folder) == metrics(three)
    assert read_summary(folder).about.seeds == [5, 6, 7]


def test_seeds_that_are_no_part_of_a_run_any_more_are_taken_away(run: Run, three: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(three, tmp_path / "run")
    distill(resume=folder, seeds=2)
    assert [path.name for path in (folder / "seeds").iterdir()] == ["6"]
    distill(resume=folder, seeds=1)
    assert not (folder / "seeds").exists()


def test_a_new_run_takes_the_other_seeds_of_an_earlier_one_away(run: Run, three: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(three, tmp_path / "run")
    run(seed=5, output_dir=folder, overwrite=True)
    assert not (folder / "seeds").exists()
    assert "over_seeds" not in metrics(folder)["student"]


def test_without_a_folder_and_with_several_students(run: Run, tiny_teacher: Path) -> None:
    rows = newswire("train")
    few = [(row["text"], row["label"]) for row in rows[:40]]
    result = run(labeled=few, unlabeled=[row["text"] for row in rows[40:]], seeds=2, student=["layers:0,1", "layers:1"])
    assert list(result.by_seed) == [0, 1]
    assert result.by_seed[0] == result.evaluations
    compared = {name: set(found.against) for name, found in result.over_seeds.items()}
    students = ("students/layers-0-1", "students/layers-1")
    assert {name for name, others in compared.items() if others} == set(students)
    assert all(compared[name] == {"teacher", "baseline"} for name in students)
    assert len(compared) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds: "),
        ({"seeds": 101}, "seeds: "),
        ({"seeds": 2, "seed": 2**32 - 1}, "there is no seed 4294967296"),
        ({"seeds": 2, "eval": None}, "nothing to measure them on"),
    ],
)
def test_what_cannot_be_gone_through_is_refused_at_once(
    run: Run, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(output_dir=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_the_report_tells_of_all_seeds(three: Path) -> None:
    told = metrics(three)
    page, text = (three / "report.html").read_text(), (three / "report.md").read_text()
    student = told["student"]["over_seeds"]["figures"]["accuracy"]
    for written in (page, text):
        assert "Over 3 seeds" in written
        assert f"{100 * student['mean']:.1f} ± {100 * student['std']:.1f}" in written
        assert "the seeds 5 to 7" in written
    assert all(f"{value:.1%}" in text for value in student["values"])


def test_a_report_needs_every_seed(three: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(three, tmp_path / "run")
    shutil.rmtree(folder / "seeds/7/evaluation/student")
    with pytest.raises(DataError, match=r"seeds/7/evaluation/student holds no whole evaluation"):
        write_report(folder)


def test_the_screen_shows_mean_and_deviation(three: Path) -> None:
    result = CliRunner().invoke(main, ["run", "--resume", str(three)])
    assert result.exit_code == 0, result.output
    of = metrics(three)["student"]["over_seeds"]["against"]["teacher"]["accuracy"]
    assert "3 seeds" in result.output
    assert f"{100 * of['mean']:+.1f} ± {100 * of['std']:.1f}" in result.output
    planned = CliRunner().invoke(main, ["run", "--resume", str(three), "--dry-run"])
    assert "over 3 seeds" in planned.output


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_a_spread_is_that_of_numpy(values: list[float]) -> None:
    found = Spread.of(values)
    assert (found.mean, found.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=1e-12)


def test_no_model_is_compared_with_what_is_not_there(three: Path) -> None:
    teacher = Evaluation.load(three / "evaluation/teacher")
    found = over_seeds([{"teacher": teacher}, {"teacher": teacher}], {})
    assert found["teacher"].against == {}
    assert found["teacher"].figures["accuracy"].std == 0
