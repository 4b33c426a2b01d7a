"""Several teachers: their models and average, weights, cross-validation, resumed runs, memory and reports."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
from checks import invoke
from conftest import FAST, Run, newswire
from synthetic import equal_weights, weights

from setfit_kd import RunConfig, RunResult, TeacherSignals, distill, load
from setfit_kd.errors import ConfigError
from setfit_kd.evaluation.measure import Cost, Evaluation, evaluate_ensemble
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import at_temperature
from setfit_kd.report.render import render_card, verdict
from setfit_kd.report.summary import read_summary
from setfit_kd.run.inputs import load_run_data
from setfit_kd.teacher.train import train_teacher
from setfit_kd.utils.files import read_json

if TYPE_CHECKING:
    from setfit import SetFitModel

NAMES = SETFIT, TRANSFORMER = "plain", "transformer-whole"
TEACHERS = (f"teachers/{SETFIT}", f"teachers/{TRANSFORMER}")


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read the metrics, without the measured speed."""
    return {
        name: {metric: value for metric, value in model_metrics.items() if metric != "texts_per_second"}
        for name, model_metrics in read_json(folder / "metrics.json").items()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> dict[str, Any]:
    """Settings of a small run of two teachers, one of each family, and two students."""
    folder = tmp_path_factory.mktemp("inputs")
    train, held_out = newswire("train"), newswire("eval")
    sources = {"labeled": train[:120], "unlabeled": train[120:160], "eval": held_out[:30]}
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shutil.copytree(tiny_teacher, folder / SETFIT)
    shutil.copytree(tiny_student, folder / "whole")
    return {
        **FAST,
        **{name: str(folder / f"{name}.jsonl") for name in sources},
        "teacher": [str(folder / SETFIT), f"transformer:{folder / 'whole'}"],
        "student": ["layers:1", "static:4"],
        "shots": 4,
        "batch_size": 16,
        "cache": False,
    }


class TeachersRun(NamedTuple):
    """A run of two teachers."""

    folder: Path
    result: RunResult
    teachers: list[str]

    def load_signals(self) -> list[TeacherSignals]:
        return [TeacherSignals.load(self.folder / "scored" / name) for name in NAMES]


@pytest.fixture(scope="module")
def equal_weights_run(run: Run, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TeachersRun:
    folder = tmp_path_factory.mktemp("runs") / "equal-weights"
    return TeachersRun(folder, run(output_dir=folder), base["teacher"])


STAGES = ("train_teacher", "refine_and_score", "cross_fit", "train_student", "evaluate_ensemble")


@contextmanager
def fail_if_called(*names: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            message = "This stage should have been loaded."
            patch.setattr(f"setfit_kd.run.stages.{name}", Mock(side_effect=AssertionError(message)))
        yield


def resume_copy(equal_weights_run: TeachersRun, folder: Path, **settings: Any) -> TeachersRun:
    """Resume a copy of a run with other settings, without training a teacher."""
    shutil.copytree(equal_weights_run.folder, folder)
    with fail_if_called("refine_and_score"):
        return TeachersRun(folder, distill(resume=folder, **settings), equal_weights_run.teachers)


@pytest.fixture(scope="module")
def fixed_weights_run(equal_weights_run: TeachersRun, tmp_path_factory: pytest.TempPathFactory) -> TeachersRun:
    """The same run with weights 2 and 1."""
    return resume_copy(equal_weights_run, tmp_path_factory.mktemp("runs") / "fixed-weights", teacher_weights="2,1")


@pytest.fixture(scope="module")
def cross_validated_run(equal_weights_run: TeachersRun, tmp_path_factory: pytest.TempPathFactory) -> TeachersRun:
    """The same run with weights from cross-validation."""
    folder = tmp_path_factory.mktemp("runs") / "cross-validated"
    return resume_copy(equal_weights_run, folder, teacher_weights="cross-validated")


@pytest.fixture(params=["equal_weights_run", "fixed_weights_run", "cross_validated_run"])
def any_run(request: pytest.FixtureRequest) -> TeachersRun:
    teachers_run: TeachersRun = request.getfixturevalue(request.param)
    return teachers_run


@pytest.fixture
def shares(any_run: TeachersRun) -> list[float]:
    """The expected weights of a run."""
    setting = any_run.result.config.teacher_weights
    if setting is None:
        return [0.5, 0.5]
    if setting == "2,1":
        return [2 / 3, 1 / 3]
    labels = load_run_data(any_run.result.config).labeled.labels
    predicted = [np.load(any_run.folder / "cross_fitted" / name / "probabilities.npy") for name in NAMES]
    accuracies = [(rows.argmax(axis=1) == labels).mean() for rows in predicted]
    return [accuracy / sum(accuracies) for accuracy in accuracies]


# Each teacher and their average


def test_each_teacher_is_saved_and_evaluated(equal_weights_run: TeachersRun) -> None:
    folder, evaluations = equal_weights_run.folder, equal_weights_run.result.evaluations
    assert {path.name for path in (folder / "teachers").iterdir()} == set(NAMES)
    subfolders = {path.name for path in folder.iterdir() if path.is_dir()}
    assert subfolders == {"teachers", "scored", "students", "baselines", "evaluation"}
    assert equal_weights_run.result.teacher is None
    architectures = [read_json(folder / name / "config.json")["architectures"] for name in TEACHERS]
    assert architectures == [["BertModel"], ["BertForSequenceClassification"]]
    students = [f"{kind}/{name}" for name in ("layers-1", "static-4") for kind in ("baselines", "students")]
    assert list(read_json(folder / "metrics.json")) == [*TEACHERS, "teacher", *students]
    assert evaluations[TEACHERS[0]].quality.agreement is None
    texts = [row["text"] for row in newswire("eval")[:30]]
    for name, signals in zip(TEACHERS, equal_weights_run.load_signals(), strict=True):
        model = load(folder / name, device="cpu")
        np.testing.assert_allclose(predict_proba(model, texts), evaluations[name].probabilities, atol=1e-5)
        assert signals.temperature != 1
        calibrated = at_temperature(signals.probabilities[-16:], signals.temperature)  # of the labeled texts
        np.testing.assert_allclose(predict_proba(model, signals.texts[-16:]), calibrated, atol=1e-4)


def average_teachers(evaluations: dict[str, Evaluation], folder: Path, shares: list[float]) -> Any:
    """Average the teachers' probabilities on the evaluation set in the same way as their signals."""
    signals = [TeacherSignals.load(folder / name.replace("teachers", "scored")) for name in TEACHERS]
    sharp = [
        at_temperature(evaluations[name].probabilities, 1 / s.temperature)
        for name, s in zip(TEACHERS, signals, strict=True)
    ]
    average = np.average(sharp, axis=0, weights=shares)
    return at_temperature(average, TeacherSignals.average(signals, shares).temperature)


def test_signals_evaluated_teacher_and_report_show_the_average(any_run: TeachersRun, shares: list[float]) -> None:
    evaluations, signals, teacher_signals = any_run.result.evaluations, any_run.result.signals, any_run.load_signals()
    expected = average_teachers(evaluations, any_run.folder, shares)
    teacher = evaluations["teacher"]
    np.testing.assert_allclose(teacher.probabilities, expected, atol=1e-6)
    assert teacher.quality == measure_quality(expected.argmax(axis=1), teacher.gold, list(teacher.quality.classes))
    for name in TEACHERS:  # the average differs from each teacher
        assert np.abs(teacher.probabilities - evaluations[name].probabilities).max() > 0.01
    for name in ("students/layers-1", "baselines/static-4"):
        agreement = np.mean(evaluations[name].predicted == teacher.predicted)
        assert evaluations[name].quality.agreement == pytest.approx(agreement)
    average = TeacherSignals.average(teacher_signals, shares)
    assert signals.texts == average.texts
    assert signals.origin == f"{any_run.teachers[0]} + {any_run.teachers[1]}"
    assert signals.temperature == pytest.approx(average.temperature)
    weighted_sum = sum(share * s.probabilities for share, s in zip(shares, teacher_signals, strict=True))
    np.testing.assert_allclose(signals.probabilities, weighted_sum, atol=1e-6)
    np.testing.assert_allclose(np.asarray(signals.embeddings), np.asarray(average.embeddings), atol=1e-6)
    recorded = read_json(any_run.folder / "run.json")["teacher_shares"]
    assert recorded == pytest.approx(dict(zip(any_run.teachers, shares, strict=True)))
    report = (any_run.folder / "report.html").read_text(encoding="utf-8").replace("\\", "")
    rows = [f"{name} ({share:.1%})" for name, share in recorded.items()]
    rows += [f"{SETFIT} (teacher)", f"{TRANSFORMER} (teacher)", "layers-1 (baseline)"]
    for text in (*rows, "Teacher: the average of all teachers.", "the average of its teachers"):
        assert text in report


def test_ensemble_can_be_more_accurate_than_each_teacher_and_costs_are_summed() -> None:
    probabilities = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]], np.float32)
    costs, gold = [Cost(10, 1.5, 100, "cpu"), Cost(5, 0.2, 50, "cpu")], np.array([0, 1])
    evaluations = [
        Evaluation(measure_quality(p.argmax(axis=1), gold, "ab"), cost, p, gold)
        for p, cost in zip(probabilities, costs, strict=True)
    ]
    assert [evaluation.quality.accuracy for evaluation in evaluations] == [0.5, 0.5]
    ensemble = evaluate_ensemble(evaluations, [1, 1], [1, 1], 1)
    assert ensemble.quality.accuracy == 1
    assert ensemble.cost == Cost(15, 1.7, 33.3, "cpu")  # 1/100 + 1/50 seconds per text
    assert evaluate_ensemble(evaluations, [9, 1], [1, 1], 1).quality.accuracy == 0.5


def test_teacher_does_not_depend_on_other_teachers(run: Run, equal_weights_run: TeachersRun, tmp_path: Path) -> None:
    alone = run(teacher=equal_weights_run.teachers[1], student="layers:1", output_dir=tmp_path / "run", baseline=False)
    assert alone.teacher is not None
    folders = (tmp_path / "run/teacher", equal_weights_run.folder / TEACHERS[1])
    assert equal_weights(*(weights(load(folder, device="cpu")) for folder in folders))
    np.testing.assert_array_equal(alone.signals.probabilities, equal_weights_run.load_signals()[1].probabilities)
    together = equal_weights_run.result.evaluations
    np.testing.assert_array_equal(alone.evaluations["teacher"].probabilities, together[TEACHERS[1]].probabilities)
    # The student also learns from the other teacher.
    assert not np.array_equal(alone.evaluations["student"].probabilities, together["students/layers-1"].probabilities)


# Weights


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("2,1,1", "teacher_weights: number of weights must be 2, one per teacher, got 2,1,1"),
        ("2,0", "must be positive and finite"),
        ("2,nan", "must be positive and finite"),
        ("two,one", "weights must be numbers such as 2,1, or cross-validated"),
        (2, "teacher_weights: "),
    ],
)
def test_invalid_teacher_weights_raise_error(setting: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.of(teacher=["one", "other"], teacher_weights=setting)


def test_teacher_weights_are_normalized() -> None:
    assert RunConfig.of(teacher="one", teacher_weights="3").teacher_weights == "3"
    for setting, normalized in (("2.0, 1", "2,1"), ("1e0,.5", "1,0.5"), ("cross-validated", "cross-validated")):
        assert RunConfig.of(teacher=["one", "other"], teacher_weights=setting).teacher_weights == normalized


def test_duplicate_teacher_raises_error() -> None:
    with pytest.raises(ConfigError, match="teacher: one is listed twice"):
        RunConfig.of(teacher=["one", "one"])


# Cross-validation


def test_too_few_labels_give_equal_teacher_weights(
    run: Run, base: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(teacher_weights="cross-validated", shots=2, eval=None, student="static:2", output_dir=tmp_path / "run")
    assert "There are too few labels to cross-validate the teachers: they are weighted equally." in caplog.messages
    assert read_json(tmp_path / "run/run.json")["teacher_shares"] == dict.fromkeys(base["teacher"], 0.5)


# Resumed runs


def test_resuming_finished_run_loads_every_stage(cross_validated_run: TeachersRun, tmp_path: Path) -> None:
    folder = shutil.copytree(cross_validated_run.folder, tmp_path / "run")
    with fail_if_called(*STAGES, "evaluate"):
        result = distill(resume=folder)
    np.testing.assert_array_equal(result.signals.probabilities, cross_validated_run.result.signals.probabilities)
    for file in ("metrics.json", "run.json"):
        assert read_json(folder / file) == read_json(cross_validated_run.folder / file)


def test_other_weights_retrain_students_but_not_teachers(
    equal_weights_run: TeachersRun, fixed_weights_run: TeachersRun
) -> None:
    runs = (equal_weights_run, fixed_weights_run)
    before, after = (read_json(run.folder / "run.json")["stages"] for run in runs)
    loaded = {stage for stage in before if after.get(stage) == before[stage]}
    assert loaded >= {f"{kind}/{name}" for kind in ("teachers", "scored", "evaluation/teachers") for name in NAMES}
    assert loaded.isdisjoint({"students/layers-1", "students/static-4", "evaluation/teacher"})
    assert not equal_weights(*(weights(load(run.folder / "students/layers-1", device="cpu")) for run in runs))


def test_resuming_with_one_of_two_teachers(equal_weights_run: TeachersRun, tmp_path: Path) -> None:
    folder = shutil.copytree(equal_weights_run.folder, tmp_path / "run")
    distill(resume=folder, teacher=equal_weights_run.teachers[0], student="layers:1", baseline=False)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"teacher", "signals", "student", "evaluation"}
    assert list(read_json(folder / "metrics.json")) == ["teacher", "student"]
    assert read_json(folder / "run.json")["teacher_shares"] == {}
    signals = TeacherSignals.load(folder / "signals")
    np.testing.assert_array_equal(signals.probabilities, equal_weights_run.load_signals()[0].probabilities)


@pytest.mark.parametrize(
    ("student", "settings", "alive"),
    [
        ("static:2", {}, [True]),
        ("static:2@MODEL", {}, [False]),
    ],
)
def test_first_teacher_stays_in_memory_only_if_student_needs_it(
    run: Run, base: dict[str, Any], student: str, settings: Any, alive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is recorded in the training of the second teacher."""
    bodies: list[Any] = []
    is_alive: list[bool] = []

    def train(*args: Any, **kwargs: Any) -> SetFitModel:
        gc.collect()
        is_alive.extend(body() is not None for body in bodies)
        teacher = train_teacher(*args, **kwargs)
        bodies.append(weakref.ref(teacher.model_body))
        return teacher

    monkeypatch.setattr("setfit_kd.run.stages.train_teacher", train)
    student = student.replace("MODEL", base["teacher"][0])
    run(student=student, baseline=False, eval=None, teacher_steps=1, **settings)
    assert is_alive == alive
    gc.collect()
    assert [body() for body in bodies] == [None, None]


def test_several_seeds_with_several_teachers(run: Run, tmp_path: Path) -> None:
    result = run(seeds=2, student="static:2", baseline=False, output_dir=tmp_path / "run")
    for evaluations, folder in zip(result.by_seed.values(), (tmp_path / "run", tmp_path / "run/seeds/1"), strict=True):
        expected = average_teachers(evaluations, folder, [0.5, 0.5])
        np.testing.assert_allclose(evaluations["teacher"].probabilities, expected, atol=1e-6)


def test_verdict_and_model_card_name_the_teachers_and_losses_exclude_cross_validation(
    equal_weights_run: TeachersRun, cross_validated_run: TeachersRun
) -> None:
    assert set(read_summary(cross_validated_run.folder).losses) == {
        *(f"{name} (teacher)" for name in NAMES),
        *(f"{name}{suffix}" for name in ("layers-1", "static-4") for suffix in ("", " (baseline)")),
    }
    summary = read_summary(equal_weights_run.folder)
    assert "the average of its teachers" in verdict(summary)
    for student in ("layers:1", "static:4"):
        text = render_card(summary, student).replace("\\", "")
        assert f"distilled by setfit-kd from {SETFIT} and whole, which were fine-tuned on 16 labeled texts" in text
        assert str(equal_weights_run.folder.parent) not in text
        assert str(Path(equal_weights_run.teachers[0]).parent) not in text


def test_several_teacher_flags(
    base: dict[str, Any], fixed_weights_run: TeachersRun, tmp_path: Path, forward_batch_sizes: list[int]
) -> None:
    settings = {name: value for name, value in base.items() if name not in ("cache", "bundle", "calibrate")}
    values = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    flags = [f"--{name.replace('_', '-')}={value}" for name, items in values.items() for value in items]
    command = [
        "run",
        *flags,
        "--no-cache",
        "--no-bundle",
        "--no-calibrate",
        "--output-dir",
        tmp_path / "run",
        "--teacher-weights",
    ]
    dry_run = invoke(*command, "2,1", "--dry-run")
    assert dry_run.exit_code == 0, dry_run.stderr
    assert "teacher:\n- {}\n- {}\n".format(*base["teacher"]) in dry_run.stdout
    assert "teacher_weights: 2,1\n" in dry_run.stdout
    assert not (tmp_path / "run").exists()
    assert not forward_batch_sizes
    result = invoke(*command, "2,1")
    assert result.exit_code == 0, result.stderr
    assert f"Weights of the teachers: {base['teacher'][0]} 66.7%, " in result.stderr
    rows = [line for line in result.stdout.splitlines() if line.count("%") > 1]
    names = [*(f"{name} (teacher)" for name in NAMES), "teacher"]
    names += [f"{name}{suffix}" for name in ("layers-1", "static-4") for suffix in (" (baseline)", "")]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == names
    assert f"setfit-kd predict {tmp_path / 'run'}/students/" in result.stdout
    assert read_metrics(tmp_path / "run") == read_metrics(fixed_weights_run.folder)
