"""Runs with several seeds: mean and standard deviation over sampling and training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml
from checks import invoke
from conftest import FAST, Run, newswire

from setfit_kd import distill
from setfit_kd.errors import ConfigError, DataError, OutputError
from setfit_kd.evaluation.measure import Evaluation
from setfit_kd.report.summary import read_summary


@pytest.fixture(scope="module")
def base(tiny_teacher: Path, tiny_student: Path) -> dict[str, Any]:
    small = {"pool_size": 48, "shots": 4, "epochs": 1, "batch_size": 16, "cache": False}
    sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
    return {**FAST, **small, **sources, "teacher": str(tiny_teacher), "student": str(tiny_student)}


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
        agreement = set() if name == "teacher" else {"agreement"}
        assert set(summary["figures"]) == {"accuracy", "macro_f1", "ece", "brier", *agreement}
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
    save, folder = Evaluation.save, tmp_path / "run"

    def stop(self: Evaluation, folder: Path) -> None:
        if "seeds/6" in str(folder) and folder.name == "student":
            raise KeyboardInterrupt
        save(self, folder)

    monkeypatch.setattr(Evaluation, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(seed=5, seeds=3, output_dir=folder)
    monkeypatch.setattr(Evaluation, "save", save)
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
    stages = set(re.findall(r"^\S+ \S+ \w+ +(\S+): ", (three_seeds / "run.log").read_text(), re.MULTILINE))
    assert {"run", "teacher", "student", "seeds/6/teacher", "seeds/7/evaluation/student"} <= stages
    stages_of_6 = {line.split()[3] for line in (three_seeds / "seeds/6/run.log").read_text().splitlines()}
    assert "seeds/6/teacher:" in stages_of_6
    assert not any(stage.startswith("seeds/7") for stage in stages_of_6)


@pytest.mark.parametrize(("name", "content"), [("run.json", "{"), ("config.yaml", "{"), ("config.yaml", None)])
def test_seed_with_a_damaged_folder_runs_again(three_seeds: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = shutil.copytree(three_seeds, tmp_path / "run")
    file = folder / "seeds/6" / name
    file.write_text(content) if content else file.unlink()
    distill(resume=folder)
    assert read_metrics(folder) == read_metrics(three_seeds)
    assert yaml.safe_load((folder / "seeds/6/config.yaml").read_text())["overwrite"] is False


def test_number_of_seeds_of_a_finished_run_can_change(
    three_seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(three_seeds, tmp_path / "run")

    def fail(*_: Any, **__: Any) -> None:
        raise OutputError("The disk is full.")

    monkeypatch.setattr("setfit_kd.run.stages.train_teacher", fail)
    with pytest.raises(OutputError):
        distill(resume=folder, seeds=4)
    assert read_metrics(folder) == read_metrics(three_seeds)
    assert read_summary(folder).manifest.seeds == [5, 6, 7]
    distill(resume=folder, seeds=2)
    assert [path.name for path in (folder / "seeds").iterdir()] == ["6"]
    distill(resume=folder, seeds=1)
    assert not (folder / "seeds").exists()


def test_several_students_without_a_folder(run: Run, tiny_teacher: Path) -> None:
    rows = newswire("train")
    labeled = [(row["text"], row["label"]) for row in rows[:40]]
    pool = [row["text"] for row in rows[40:]]
    result = run(labeled=labeled, unlabeled=pool, seeds=2, student=["layers:0,1", "layers:1"])
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


def test_report_and_output_show_mean_and_standard_deviation(three_seeds: Path) -> None:
    summary = read_metrics(three_seeds)["student"]["over_seeds"]
    accuracy, spread = summary["figures"]["accuracy"], summary["against"]["teacher"]["accuracy"]
    page = (three_seeds / "report.html").read_text()
    for part in ("Results over 3 seeds", f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f}", "seeds 5 to 7"):
        assert part in page
    assert all(f"{value:.1%}" in page for value in accuracy["values"])
    result = invoke("run", "--resume", three_seeds)
    assert result.exit_code == 0, result.output
    assert "3 seeds" in result.output
    assert f"{100 * spread['mean']:+.1f} ± {100 * spread['std']:.1f}" in result.output
