"""Search for the settings of teacher and student."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_refused, invoke
from conftest import FAST

from setfit_kd import distill, load
from setfit_kd.config.run import RunConfig
from setfit_kd.errors import ConfigError, DataError, TrainingError, UnavailableError
from setfit_kd.run.search import Space, Trial, best_trial, search
from setfit_kd.run_folder.manifest import DIVERGED
from setfit_kd.teacher.cross_fitting import CrossFit, cross_fit

SOURCES: Any = {"labeled": "bundled:newswire", "unlabeled": "bundled:newswire"}


@pytest.fixture
def settings(tiny_teacher: Path, tiny_student: Path) -> dict[str, Any]:
    return {**FAST, **SOURCES, "pool_size": 200, "teacher": str(tiny_teacher), "student": str(tiny_student)}


def test_search_starts_with_the_initial_settings_and_finds_better_ones() -> None:
    def run(number: int, settings: dict[str, Any]) -> Trial:
        assert number == len(tried)
        tried.append(settings)
        return Trial(settings, abs(np.log(settings["x"] / 50)) + settings["n"])

    def sample(trial: Any) -> dict[str, Any]:
        return {"n": trial.suggest_int("n", 1, 8, log=True), "x": trial.suggest_float("x", 1, 100, log=True)}

    tried: list[dict[str, Any]] = []
    trials = search(30, Space({"n": 4, "x": 2.0}, sample), run, seed=0)
    assert trials[0].settings == tried[0] == {"n": 4, "x": 2.0}
    best = best_trial(trials).settings
    assert best["n"] == 1
    assert 25 < best["x"] < 100
    first, tried = tried, []
    search(30, Space({"n": 4, "x": 2.0}, sample), run, seed=0)
    assert tried == first


def test_trial_is_restored_from_its_folder(tmp_path: Path) -> None:
    trial = Trial({"teacher_steps": 20, "teacher_learning_rate": 6e-5}, 0.25)
    trial.save(tmp_path / "trial")
    assert Trial.load(tmp_path / "trial") == trial
    (tmp_path / "trial" / "trial.json").write_text('{"settings": 1}')
    with pytest.raises(DataError, match=r"Cannot read .*trial\.json"):
        Trial.load(tmp_path / "trial")


def test_log_loss_is_of_calibrated_predictions() -> None:
    probabilities = np.array([[0.8, 0.2]] * 8 + [[0.2, 0.8]] * 2 + [[np.nan, np.nan]], np.float32)
    predictions = CrossFit(probabilities, np.array([0] * 6 + [1] * 4 + [0]))
    shares = predictions.calibrated.probabilities[:10]
    expected = -np.log(shares[np.arange(10), predictions.labels[:10]]).mean()
    assert predictions.log_loss == pytest.approx(expected, abs=1e-6)
    assert predictions.log_loss < 0.7


def test_run_uses_the_best_settings_of_each_search(settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    trials = distill(**settings, search=3, output_dir=run).trials
    assert {stage: len(each) for stage, each in trials.items()} == {"teacher": 3, "student": 3}
    assert trials["teacher"][0].settings == {"teacher_steps": 4, "teacher_learning_rate": 1e-3}
    assert trials["student"][0].settings == {"epochs": 1, "learning_rate": 1e-3}
    best = {stage: best_trial(each).settings for stage, each in trials.items()}
    expected = distill(**{**settings, **best["teacher"], **best["student"]})
    probabilities = np.load(run / "signals" / "probabilities.npy")
    np.testing.assert_array_equal(probabilities, expected.signals.probabilities)
    texts = expected.signals.texts[:20]
    np.testing.assert_allclose(load(run).predict_proba(texts), expected.student.predict_proba(texts), atol=1e-6)
    report = (run / "report.html").read_text()
    assert "Search for settings" in report
    assert report.count(">chosen<") == 2

    # A resumed run repeats no trial, and more trials continue the search.
    for n_trials in (3, 4):
        (run / "run.log").unlink()
        other = distill(**SOURCES, resume=run, search=n_trials).trials
        is_other_teacher = best_trial(other["teacher"]).settings != best["teacher"]
        n_new = {3: 0, 4: 1 + (4 if is_other_teacher else 1)}[n_trials]
        assert (run / "run.log").read_text().count("Trial ") == n_new
        assert {stage: each[:3] for stage, each in other.items() if stage == "teacher"} == {
            "teacher": trials["teacher"]
        }


def test_dry_run_lists_the_search(settings: dict[str, Any]) -> None:
    names = ("labeled", "unlabeled", "teacher", "student", "shots")
    flags = [part for name in names for part in (f"--{name}", str(settings[name]))]
    stages = [invoke("run", *flags, "--search", n, "--dry-run").output.partition("stage")[2] for n in (0, 3)]
    assert ["search" in text for text in stages] == [False, True]


def test_trial_that_diverges_is_not_chosen(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(labeled: Any, load_body: Any, *, config: RunConfig) -> CrossFit:
        if config.teacher_steps != 4:
            raise TrainingError("The loss is not finite.")
        return cross_fit(labeled, load_body, config=config)

    monkeypatch.setattr("setfit_kd.run.stages.cross_fit", fail)
    run = tmp_path / "run"
    trials = distill(**settings, search=3, output_dir=run).trials["teacher"]
    assert [trial.loss == DIVERGED for trial in trials] == [False, True, True]
    assert ">diverged<" in (run / "report.html").read_text()


def test_baseline_keeps_the_initial_settings(settings: dict[str, Any]) -> None:
    options = {**settings, "eval": "bundled:newswire"}
    expected, actual = (distill(**{**options, "search": n}).evaluations["baseline"].predicted for n in (0, 2))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("family", ["", "transformer:"])
def test_search_with_signals_is_of_the_student_only(
    settings: dict[str, Any], tiny_student: Path, tmp_path: Path, family: str
) -> None:
    distill(**settings, output_dir=tmp_path / "teacher")
    signals = tmp_path / "signals.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "teacher" / "signals" / "texts.jsonl").read_text().splitlines()]
    probabilities = np.load(tmp_path / "teacher" / "signals" / "probabilities.npy").tolist()
    names = json.loads((tmp_path / "teacher" / "signals" / "signals.json").read_text())["label_names"]
    lines = [
        json.dumps({"text": text, "probabilities": dict(zip(names, values, strict=True))})
        for text, values in zip(rows, probabilities, strict=True)
    ]
    signals.write_text("\n".join(lines))
    options = {**FAST, "student": f"{family}{tiny_student}", "shots": None}
    result = distill(signals=str(signals), search=2, **options)
    assert list(result.trials) == ["student"]


def test_few_texts_are_not_searched(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    distill(**{**settings, "shots": 2, "pool_size": 40}, search=2)
    assert "too few labels to search for settings of the teacher" in caplog.text
    assert "too few pool texts to search for settings of the student" in caplog.text


def test_search_expects_one_teacher_and_one_student() -> None:
    with pytest.raises(ConfigError, match="search: expected one teacher and one student"):
        RunConfig.of(student=["a", "b"], search=3)
    assert_refused(invoke("run", "--preset", "newswire", "--search", "-1"), "search")


def test_missing_optuna_is_named(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UnavailableError, match="needs optuna") as error:
        distill(**settings, search=3)
    assert "setfit-kd[search]" in str(error.value.hint)
