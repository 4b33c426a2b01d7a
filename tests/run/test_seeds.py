"""Runs with several seeds: mean and standard deviation over sampling and training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import FAST, newswire

from setfit_kd import RunResult, distill
from setfit_kd.cli import main
from setfit_kd.errors import ConfigError, DataError, OutputError
from setfit_kd.evaluation.measure import Evaluation
from setfit_kd.report.render import write_report
from setfit_kd.report.summary import read_summary

METRICS = {"accuracy", "macro_f1", "ece", "brier"}

Run = Callable[..., RunResult]


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tiny_student: Path) -> Run:
    small = {"pool_size": 48, "shots": 4, "epochs": 1, "batch_size": 16, "cache": False}
    sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
    base = {**FAST, **small, **sources, "teacher": str(tiny_teacher), "student": str(tiny_student)}

    def run(**settings: Any) -> RunResult:
        return distill(**{**base, **settings})

    return run


@pytest.fixture(scope="module")
def three_seeds(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the seeds 5, 6 and 7."""
    folder = tmp_path_factory.mktemp("runs") / "three-seeds"
    run(seed=5, seeds=3, output_dir=folder)
    return folder


def read_metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    for values in metrics.values():
        values.pop("texts_per_second")
    return metrics


def test_each_seed_equals_a_run_with_this_seed(run: Run, three_seeds: Path, tmp_path: Path) -> None:
    first = read_metrics(three_seeds)
    assert all(set(values.pop("over_seeds")) == {"figures", "against"} for values in first.values())
    second = read_metrics(three_seeds / "seeds/6")
    for seed, metrics in ((5, first), (6, second)):
        run(seed=seed, output_dir=tmp_path / str(seed))
        assert read_metrics(tmp_path / str(seed)) == metrics, seed
    assert sorted(path.name for path in (three_seeds / "seeds").iterdir()) == ["6", "7"]


def test_mean_and_standard_deviation_over_the_seeds(three_seeds: Path) -> None:
    runs = [read_metrics(three_seeds / folder) for folder in ("", "seeds/6", "seeds/7")]
    assert len({json.dumps(run["student"]["confusion"]) for run in runs}) > 1
    for name, metrics in runs[0].items():
        summary = metrics["over_seeds"]
        assert set(summary["figures"]) == METRICS | (set() if name == "teacher" else {"agreement"})
        for metric, spread in summary["figures"].items():
            values = [run[name][metric] for run in runs]
            assert spread["values"] == pytest.approx(values)
            assert (spread["mean"], spread["std"]) == pytest.approx((fmean(values), stdev(values)))
        assert set(summary["against"]) == ({"teacher", "baseline"} if name == "student" else set())
        for reference, spreads in summary["against"].items():
            for metric, spread in spreads.items():
                differences = [run[name][metric] - run[reference][metric] for run in runs]
                assert spread["values"] == pytest.approx(differences)
                assert spread["std"] == pytest.approx(stdev(differences))


def test_adding_seeds_to_a_finished_run_trains_nothing_twice(run: Run, three_seeds: Path, tmp_path: Path) -> None:
    run(seed=5, output_dir=tmp_path / "run")
    modified = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("model.safetensors")}
    distill(resume=tmp_path / "run", seeds=2)
    assert read_metrics(tmp_path / "run/seeds/6") == read_metrics(three_seeds / "seeds/6")
    run(seed=5, seeds=3, resume=tmp_path / "run", output_dir=None)
    assert read_metrics(tmp_path / "run") == read_metrics(three_seeds)
    assert modified
    assert {path: path.stat().st_mtime_ns for path in modified} == modified


def test_run_interrupted_in_another_seed_resumes_there(
    run: Run, three_seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(DataError, match="is not finished"):
        read_summary(folder)
    teacher = folder / "seeds/6/teacher/model.safetensors"
    before = teacher.stat().st_mtime_ns
    distill(resume=folder)
    assert read_metrics(folder) == read_metrics(three_seeds)
    assert teacher.stat().st_mtime_ns == before


def test_log_lines_name_seed_and_stage(three_seeds: Path) -> None:
    matches = [re.match(r"\S+ \S+ \w+ +(\S+): ", line) for line in (three_seeds / "run.log").read_text().splitlines()]
    stages = {match[1] for match in matches if match}
    assert {"run", "teacher", "student", "seeds/6/teacher", "seeds/7/evaluation/student"} <= stages
    stages_of_6 = {line.split()[3] for line in (three_seeds / "seeds/6/run.log").read_text().splitlines()}
    assert "seeds/6/teacher:" in stages_of_6
    assert not any(stage.startswith("seeds/7") for stage in stages_of_6)


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["invalid", "missing"])
def test_seed_with_a_damaged_folder_runs_again(
    run: Run, three_seeds: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = shutil.copytree(three_seeds, tmp_path / "run")
    file = folder / "seeds/6" / name
    file.unlink() if damage == "missing" else file.write_text("{")
    distill(resume=folder)
    assert read_metrics(folder) == read_metrics(three_seeds)
    assert yaml.safe_load((folder / "seeds/6/config.yaml").read_text())["overwrite"] is False


def test_failure_of_another_seed_keeps_the_finished_run(
    run: Run, three_seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(three_seeds, tmp_path / "run")

    def fail(*_: Any, **__: Any) -> None:
        raise OutputError("The disk is full.")

    monkeypatch.setattr("setfit_kd.run.stages.train_teacher", fail)
    with pytest.raises(OutputError):
        distill(resume=folder, seeds=4)
    assert read_metrics(folder) == read_metrics(three_seeds)
    assert read_summary(folder).manifest.seeds == [5, 6, 7]


def test_seeds_that_are_no_longer_requested_are_removed(run: Run, three_seeds: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(three_seeds, tmp_path / "run")
    distill(resume=folder, seeds=2)
    assert [path.name for path in (folder / "seeds").iterdir()] == ["6"]
    distill(resume=folder, seeds=1)
    assert not (folder / "seeds").exists()


def test_several_students_without_a_folder(run: Run, tiny_teacher: Path) -> None:
    rows = newswire("train")
    labeled = [(row["text"], row["label"]) for row in rows[:40]]
    result = run(
        labeled=labeled, unlabeled=[row["text"] for row in rows[40:]], seeds=2, student=["layers:0,1", "layers:1"]
    )
    assert list(result.by_seed) == [0, 1]
    assert result.by_seed[0] == result.evaluations
    references = {name: set(summary.against) for name, summary in result.over_seeds.items()}
    students = ("students/layers-0-1", "students/layers-1")
    assert {name for name, roles in references.items() if roles} == set(students)
    assert all(references[name] == {"teacher", "baseline"} for name in students)
    assert len(references) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds: "),
        ({"seeds": 101}, "seeds: "),
        ({"seeds": 2, "seed": 2**32 - 1}, "all seeds must be less than 4294967296, got 4294967296"),
        ({"seeds": 2, "eval": None}, "requires an evaluation set"),
    ],
)
def test_invalid_seeds_raise_before_anything_is_written(
    run: Run, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(output_dir=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_report_contains_all_seeds(three_seeds: Path) -> None:
    metrics = read_metrics(three_seeds)
    page = (three_seeds / "report.html").read_text()
    student = metrics["student"]["over_seeds"]["figures"]["accuracy"]
    assert "Results over 3 seeds" in page
    assert f"{100 * student['mean']:.1f} ± {100 * student['std']:.1f}" in page
    assert "the seeds 5 to 7" in page
    assert all(f"{value:.1%}" in page for value in student["values"])


def test_report_requires_every_seed(three_seeds: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(three_seeds, tmp_path / "run")
    shutil.rmtree(folder / "seeds/7/evaluation/student")
    with pytest.raises(DataError, match=r"Cannot read the evaluation in .*seeds/7/evaluation/student"):
        write_report(folder)


def test_output_shows_mean_and_standard_deviation(three_seeds: Path) -> None:
    result = CliRunner().invoke(main, ["run", "--resume", str(three_seeds)])
    assert result.exit_code == 0, result.output
    spread = read_metrics(three_seeds)["student"]["over_seeds"]["against"]["teacher"]["accuracy"]
    assert "3 seeds" in result.output
    assert f"{100 * spread['mean']:+.1f} ± {100 * spread['std']:.1f}" in result.output
    planned = CliRunner().invoke(main, ["run", "--resume", str(three_seeds), "--dry-run"])
    assert "with 3 seeds" in planned.output
