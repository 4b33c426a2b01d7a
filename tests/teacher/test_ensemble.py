"""Several teachers: their models and average, weights, cross-validation, resumed runs, memory and reports."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from conftest import FAST, Run, newswire
from synthetic import equal_weights, few_labels, weights

from setfit_kd import RunConfig, RunResult, TeacherSignals, distill, load
from setfit_kd.cli import main
from setfit_kd.config.stages import TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import ConfigError
from setfit_kd.evaluation.cost import Cost
from setfit_kd.evaluation.measure import Evaluation, evaluate_ensemble
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.temperature import at_temperature
from setfit_kd.report.render import render_card, verdict
from setfit_kd.report.summary import read_summary
from setfit_kd.run_folder.names import TEACHER
from setfit_kd.teacher.ensemble import MAX_FOLDS, cross_validated_accuracy

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

SETFIT, TRANSFORMER = "plain", "transformer-whole"
TEACHERS = (f"teachers/{SETFIT}", f"teachers/{TRANSFORMER}")
DEVICE = "cpu"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


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


@dataclass(frozen=True)
class TeachersRun:
    """A run of two teachers."""

    folder: Path
    result: RunResult
    teachers: Sequence[str]

    def load_signals(self) -> list[TeacherSignals]:
        return [TeacherSignals.load(self.folder / "scored" / name) for name in (SETFIT, TRANSFORMER)]


@pytest.fixture(scope="module")
def equal_weights_run(run: Run, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TeachersRun:
    folder = tmp_path_factory.mktemp("runs") / "equal-weights"
    return TeachersRun(folder, run(output_dir=folder), base["teacher"])


@pytest.fixture
def run_copy(equal_weights_run: TeachersRun, tmp_path: Path) -> Path:
    """A copy of the run's folder, to resume from."""
    return Path(shutil.copytree(equal_weights_run.folder, tmp_path / "run"))


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("This stage should have been loaded.")


@contextmanager
def fail_if_teacher_is_trained() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_teacher", "refine_and_score"):
            patch.setattr(f"setfit_kd.run.teacher_stages.{name}", fail)
        yield patch


def resume_copy(equal_weights_run: TeachersRun, folder: Path, **settings: Any) -> TeachersRun:
    """Resume a copy of a run with other settings, without training a teacher."""
    shutil.copytree(equal_weights_run.folder, folder)
    with fail_if_teacher_is_trained():
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


RUNS = ("equal_weights_run", "fixed_weights_run", "cross_validated_run")


@pytest.fixture(params=RUNS)
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
    accuracies = [read_json(any_run.folder / "weighed" / name / "accuracy.json") for name in (SETFIT, TRANSFORMER)]
    assert len(set(accuracies)) == 2, "the test needs different weights"
    return [accuracy / sum(accuracies) for accuracy in accuracies]


# Each teacher and their average


def test_each_teacher_has_a_folder(equal_weights_run: TeachersRun) -> None:
    assert {path.name for path in (equal_weights_run.folder / "teachers").iterdir()} == {SETFIT, TRANSFORMER}
    assert {path.name for path in (equal_weights_run.folder / "scored").iterdir()} == {SETFIT, TRANSFORMER}
    assert {path.name for path in equal_weights_run.folder.iterdir() if path.is_dir()} == {
        *("teachers", "scored", "students", "baselines", "evaluation")
    }
    assert equal_weights_run.result.teacher is None


@pytest.mark.parametrize("name", TEACHERS)
def test_saved_teacher_reproduces_its_evaluation(
    equal_weights_run: TeachersRun, base: dict[str, Any], name: str
) -> None:
    rows = [json.loads(line) for line in Path(base["eval"]).read_text(encoding="utf-8").splitlines()]
    model = load(equal_weights_run.folder / name, device="cpu")
    probabilities = predict_proba(model, [row["text"] for row in rows])
    np.testing.assert_allclose(probabilities, equal_weights_run.result.evaluations[name].probabilities, atol=1e-5)


@pytest.mark.parametrize("name", TEACHERS)
def test_saved_teacher_predicts_calibrated_signals(equal_weights_run: TeachersRun, name: str) -> None:
    signals = TeacherSignals.load(equal_weights_run.folder / name.replace("teachers", "scored"))
    assert signals.temperature != 1
    logits = np.log(np.maximum(signals.probabilities, 1e-30)) / signals.temperature
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = predict_proba(load(equal_weights_run.folder / name, device="cpu"), signals.texts)
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)


def test_teachers_have_the_requested_architectures(equal_weights_run: TeachersRun) -> None:
    architectures = [read_json(equal_weights_run.folder / name / "config.json")["architectures"] for name in TEACHERS]
    assert architectures == [["BertModel"], ["BertForSequenceClassification"]]


def test_every_model_is_evaluated(equal_weights_run: TeachersRun) -> None:
    students = [f"{kind}/{name}" for name in ("layers-1", "static-4") for kind in ("baselines", "students")]
    assert list(read_json(equal_weights_run.folder / "metrics.json")) == [*TEACHERS, "teacher", *students]
    assert equal_weights_run.result.evaluations[TEACHERS[0]].quality.agreement is None
    assert equal_weights_run.result.evaluations["students/layers-1"].quality.agreement is not None


def average_teachers(evaluations: dict[str, Evaluation], folder: Path, shares: list[float]) -> npt.NDArray[np.floating]:
    """Average the teachers' probabilities on the evaluation set in the same way as their signals."""
    signals = [TeacherSignals.load(folder / name.replace("teachers", "scored")) for name in TEACHERS]
    sharp = [
        at_temperature(evaluations[name].probabilities, 1 / s.temperature)
        for name, s in zip(TEACHERS, signals, strict=True)
    ]
    return at_temperature(
        np.average(sharp, axis=0, weights=shares), TeacherSignals.average(signals, shares).temperature
    )


def test_evaluated_teacher_is_the_average(any_run: TeachersRun, shares: list[float]) -> None:
    evaluations = any_run.result.evaluations
    expected = average_teachers(evaluations, any_run.folder, shares)
    teacher = evaluations["teacher"]
    np.testing.assert_allclose(teacher.probabilities, expected, atol=1e-6)
    predicted = np.asarray(expected).argmax(axis=1)
    assert teacher.quality == measure_quality(predicted, teacher.gold, list(teacher.quality.classes))
    for name in TEACHERS:  # the average differs from each teacher
        assert np.abs(teacher.probabilities - evaluations[name].probabilities).max() > 0.01


def test_agreement_is_measured_with_the_average(any_run: TeachersRun) -> None:
    evaluations = any_run.result.evaluations
    for name in ("students/layers-1", "baselines/static-4"):
        agreement = np.mean(evaluations[name].predicted == evaluations["teacher"].predicted)
        assert evaluations[name].quality.agreement == pytest.approx(agreement)


def test_signals_are_the_average(any_run: TeachersRun, shares: list[float]) -> None:
    teacher_signals = any_run.load_signals()
    expected = TeacherSignals.average(teacher_signals, shares)
    signals = any_run.result.signals
    assert signals.texts == expected.texts
    assert signals.origin == f"{any_run.teachers[0]} + {any_run.teachers[1]}"
    assert signals.temperature == pytest.approx(expected.temperature)
    np.testing.assert_allclose(signals.probabilities, expected.probabilities, atol=1e-7)
    weighted_sum = sum(share * s.probabilities for share, s in zip(shares, teacher_signals, strict=True))
    np.testing.assert_allclose(signals.probabilities, weighted_sum, atol=1e-6)
    assert signals.embeddings is not None
    assert expected.embeddings is not None
    np.testing.assert_allclose(signals.embeddings, expected.embeddings, atol=1e-6)


def test_manifest_contains_teacher_shares(any_run: TeachersRun, shares: list[float]) -> None:
    recorded = read_json(any_run.folder / "run.json")["teacher_shares"]
    assert recorded == pytest.approx(dict(zip(any_run.teachers, shares, strict=True)))


def random_evaluation(n: int, parameters: int, megabytes: float, speed: float, seed: int) -> Evaluation:
    gold = np.arange(n) % 3
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(3), n).astype(np.float32)
    quality = measure_quality(probabilities.argmax(axis=1), gold, "abc")
    return Evaluation(quality, Cost(parameters, megabytes, speed, DEVICE), probabilities, gold)


def test_costs_of_ensemble_are_summed() -> None:
    evaluations = [random_evaluation(30, 10, 1.5, 100, 0), random_evaluation(30, 5, 0.2, 50, 1)]
    cost = evaluate_ensemble(evaluations, [0.5, 0.5], [1, 1], 1).cost
    # 1/100 + 1/50 seconds per text.
    assert cost == Cost(15, 1.7, 33.3, DEVICE)


def test_average_can_be_more_accurate_than_each_teacher() -> None:
    gold = np.array([0, 1])
    probabilities = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]], np.float32)
    evaluations = [
        Evaluation(measure_quality(p.argmax(axis=1), gold, "ab"), Cost(1, 1, 1, DEVICE), p, gold) for p in probabilities
    ]
    assert [evaluation.quality.accuracy for evaluation in evaluations] == [0.5, 0.5]
    assert evaluate_ensemble(evaluations, [1, 1], [1, 1], 1).quality.accuracy == 1
    assert evaluate_ensemble(evaluations, [9, 1], [1, 1], 1).quality.accuracy == 0.5


def test_evaluated_ensemble_matches_averaged_signals() -> None:
    rng = np.random.default_rng(0)
    texts, gold = [f"text {row}" for row in range(200)], rng.integers(3, size=200)
    signals = [
        TeacherSignals(texts, rng.dirichlet(np.full(3, 0.5), 200).astype(np.float32), tuple("abc"), temperature=t)
        for t in (6.0, 1.5)
    ]
    average, temperatures = TeacherSignals.average(signals, [2, 1]), [s.temperature for s in signals]
    calibrated = [at_temperature(s.probabilities, s.temperature).astype(np.float32) for s in signals]
    evaluations = [
        Evaluation(measure_quality(p.argmax(axis=1), gold, "abc"), Cost(1, 1, 1, DEVICE), p, gold) for p in calibrated
    ]
    ensemble = evaluate_ensemble(evaluations, [2, 1], temperatures, average.temperature)
    np.testing.assert_array_equal(ensemble.predicted, average.probabilities.argmax(axis=1))
    expected = at_temperature(average.probabilities, average.temperature)
    np.testing.assert_allclose(ensemble.probabilities, expected, atol=1e-5)
    calibrated_average = np.average(calibrated, axis=0, weights=[2, 1])
    assert (calibrated_average.argmax(axis=1) != ensemble.predicted).any()


@pytest.mark.parametrize("number", [0, 1], ids=[SETFIT, TRANSFORMER])
def test_teacher_does_not_depend_on_other_teachers(
    run: Run, equal_weights_run: TeachersRun, number: int, tmp_path: Path
) -> None:
    alone = run(
        teacher=equal_weights_run.teachers[number], student="layers:1", output_dir=tmp_path / "run", baseline=False
    )
    assert alone.teacher is not None
    trained_alone, trained_together = (
        load(folder, device="cpu") for folder in (tmp_path / "run/teacher", equal_weights_run.folder / TEACHERS[number])
    )
    assert equal_weights(weights(trained_alone), weights(trained_together))
    np.testing.assert_array_equal(trained_alone.model_head.coef_, trained_together.model_head.coef_)
    np.testing.assert_array_equal(alone.signals.probabilities, equal_weights_run.load_signals()[number].probabilities)
    together = equal_weights_run.result.evaluations
    np.testing.assert_array_equal(alone.evaluations["teacher"].probabilities, together[TEACHERS[number]].probabilities)
    # The student also learns from the other teacher.
    assert not np.array_equal(alone.evaluations["student"].probabilities, together["students/layers-1"].probabilities)


# Weights


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("1", "teacher_weights: number of weights must be 2, one per teacher, got 1"),
        ("2,1,1", "teacher_weights: number of weights must be 2, one per teacher, got 2,1,1"),
        ("2,0", "must be positive and finite"),
        ("2,-1", "must be positive and finite"),
        ("2,nan", "must be positive and finite"),
        ("2,inf", "must be positive and finite"),
        ("2;1", "weights must be numbers such as 2,1, or cross-validated"),
        ("two,one", "weights must be numbers such as 2,1, or cross-validated"),
        ("", "weights must be numbers such as 2,1, or cross-validated"),
        ("2,", "weights must be numbers such as 2,1, or cross-validated"),
        (2, "teacher_weights: "),
    ],
)
def test_invalid_teacher_weights_raise_error(setting: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.of(teacher=["one", "other"], teacher_weights=setting)


def test_single_teacher_needs_single_weight() -> None:
    assert RunConfig.of(teacher="one", teacher_weights="3").teacher_weights == "3"
    with pytest.raises(ConfigError, match="number of weights must be 1, one per teacher, got 2,1"):
        RunConfig.of(teacher="one", teacher_weights="2,1")


@pytest.mark.parametrize(
    ("setting", "normalized"), [("2.0, 1", "2,1"), ("1e0,.5", "1,0.5"), ("cross-validated", "cross-validated")]
)
def test_teacher_weights_are_normalized(setting: str, normalized: str) -> None:
    config = RunConfig.of(teacher=["one", "other"], teacher_weights=setting)
    assert config.teacher_weights == normalized
    assert config == RunConfig.of(teacher=["one", "other"], teacher_weights=normalized)


def test_duplicate_teacher_raises_error() -> None:
    with pytest.raises(ConfigError, match="teacher: one is listed twice"):
        RunConfig.of(teacher=["one", "one"])


# Cross-validation


CHEAP = {
    "device": "cpu",
    "precision": "fp32",
    "teacher_steps": 2,
    "teacher_batch_size": 8,
    "teacher_learning_rate": 1e-3,
}


@dataclass
class FoldRecord:
    """Training data, predicted texts, probabilities and initial body of each fold."""

    training_sets: list[LabeledSet] = field(default_factory=list)
    predicted_texts: list[list[str]] = field(default_factory=list)
    probabilities: list[npt.NDArray[np.floating]] = field(default_factory=list)
    initial_bodies: list[SentenceTransformer] = field(default_factory=list)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> FoldRecord:
    from setfit_kd.models.encode import predict_proba
    from setfit_kd.teacher.train import train_teacher

    record = FoldRecord()

    def train(labeled: LabeledSet, body: SentenceTransformer, **settings: Any) -> SetFitModel:
        record.training_sets.append(labeled)
        record.initial_bodies.append(body)
        return train_teacher(labeled, body, **settings)

    def predict(model: SetFitModel, texts: Sequence[str], **settings: Any) -> npt.NDArray[np.floating]:
        record.predicted_texts.append(list(texts))
        record.probabilities.append(predict_proba(model, texts, **settings))
        return record.probabilities[-1]

    monkeypatch.setattr("setfit_kd.teacher.ensemble.train_teacher", train)
    monkeypatch.setattr("setfit_kd.teacher.ensemble.predict_proba", predict)
    return record


def test_each_label_is_predicted_once_without_training_on_it(folds: FoldRecord, tiny_student: Path) -> None:
    labeled = few_labels(18)
    accuracy = cross_validated_accuracy(labeled, lambda: load_body(tiny_student), config=TeacherConfig.of(**CHEAP))
    assert len(folds.predicted_texts) == MAX_FOLDS
    assert sorted(text for texts in folds.predicted_texts for text in texts) == sorted(labeled.texts)
    for training_set, texts in zip(folds.training_sets, folds.predicted_texts, strict=True):
        assert not set(training_set.texts) & set(texts)
        assert set(training_set.texts) | set(texts) == set(labeled.texts)
        assert training_set.label_names == labeled.label_names
        assert training_set.counts.min() >= 2  # the folds are stratified
    label_of = dict(zip(labeled.texts, labeled.labels, strict=True))
    correct = [
        row.argmax() == label_of[text]
        for texts, probabilities in zip(folds.predicted_texts, folds.probabilities, strict=True)
        for text, row in zip(texts, probabilities, strict=True)
    ]
    assert accuracy == np.mean(correct)
    assert len({id(body) for body in folds.initial_bodies}) == MAX_FOLDS  # each fold has a new body


@pytest.mark.parametrize(("n_labels", "n_folds"), [(8, 0), (11, 0), (12, 3), (20, 4)])
def test_number_of_folds_depends_on_labels_per_class(
    folds: FoldRecord, tiny_student: Path, n_labels: int, n_folds: int
) -> None:
    accuracy = cross_validated_accuracy(
        few_labels(n_labels), lambda: load_body(tiny_student), config=TeacherConfig.of(**CHEAP)
    )
    assert len(folds.predicted_texts) == n_folds
    assert (accuracy is None) == (n_folds == 0)


def test_too_few_labels_give_equal_teacher_weights(
    run: Run, base: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(teacher_weights="cross-validated", shots=2, eval=None, student="static:2", output_dir=tmp_path / "run")
    assert "There are too few labels to cross-validate the teachers: they are weighted equally." in caplog.messages
    assert read_json(tmp_path / "run/run.json")["teacher_shares"] == dict.fromkeys(base["teacher"], 0.5)
    expected = TeacherSignals.average(
        [TeacherSignals.load(tmp_path / "run/scored" / name) for name in (SETFIT, TRANSFORMER)]
    )
    np.testing.assert_allclose(result.signals.probabilities, expected.probabilities, atol=1e-7)


# Resumed runs


def fail_if_stage_is_run(patch: pytest.MonkeyPatch) -> None:
    for name in ("train_teacher", "train_student", "evaluate", "evaluate_ensemble"):
        patch.setattr(f"setfit_kd.run.student_stages.{name}", fail)
    patch.setattr("setfit_kd.run.teacher_stages.cross_validated_accuracy", fail)


@pytest.mark.parametrize("name", ["equal_weights_run", "cross_validated_run"])
def test_resuming_finished_run_loads_every_stage(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    before: TeachersRun = request.getfixturevalue(name)
    folder = shutil.copytree(before.folder, tmp_path / "run")
    with fail_if_teacher_is_trained() as patch:
        fail_if_stage_is_run(patch)
        result = distill(resume=folder)
    assert (folder / "metrics.json").read_bytes() == (before.folder / "metrics.json").read_bytes()
    np.testing.assert_array_equal(result.signals.probabilities, before.result.signals.probabilities)
    assert read_json(folder / "run.json") == read_json(before.folder / "run.json")


@pytest.mark.parametrize("name", ["fixed_weights_run", "cross_validated_run"])
def test_other_weights_retrain_students_but_not_teachers(
    name: str, equal_weights_run: TeachersRun, request: pytest.FixtureRequest
) -> None:
    other: TeachersRun = request.getfixturevalue(name)  # fails if a teacher is trained
    stages = [read_json(run.folder / "run.json")["stages"] for run in (equal_weights_run, other)]
    loaded = {stage for stage in stages[0] if stages[1].get(stage) == stages[0][stage]}
    scored = {f"scored/{teacher}" for teacher in (SETFIT, TRANSFORMER)}
    assert loaded >= {*TEACHERS, *scored, *(f"evaluation/{teacher}" for teacher in TEACHERS)}
    assert loaded.isdisjoint({"students/layers-1", "students/static-4", "evaluation/teacher"})
    students = [load(run.folder / "students/layers-1", device="cpu") for run in (equal_weights_run, other)]
    assert not equal_weights(*map(weights, students))


def test_only_teacher_with_damaged_folder_is_retrained(
    run_copy: Path, equal_weights_run: TeachersRun, caplog: pytest.LogCaptureFixture
) -> None:
    (run_copy / TEACHERS[1] / "model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.INFO, "setfit_kd"):
        distill(resume=run_copy)
    assert f"Stage {TEACHERS[0]}: loaded from" in caplog.text
    assert f"Stage {TEACHERS[1]}: loaded from" not in caplog.text
    assert read_metrics(run_copy) == read_metrics(equal_weights_run.folder)


def test_resuming_with_one_of_two_teachers(run: Run, equal_weights_run: TeachersRun, run_copy: Path) -> None:
    distill(resume=run_copy, teacher=equal_weights_run.teachers[0], student="layers:1", baseline=False)
    assert {path.name for path in run_copy.iterdir() if path.is_dir()} == {
        *("teacher", "signals", "student", "evaluation")
    }
    assert {path.name for path in (run_copy / "evaluation").iterdir() if path.is_dir()} == {"teacher", "student"}
    assert list(read_json(run_copy / "metrics.json")) == ["teacher", "student"]
    assert read_json(run_copy / "run.json")["teacher_shares"] == {}
    signals = TeacherSignals.load(run_copy / "signals")
    np.testing.assert_array_equal(signals.probabilities, equal_weights_run.load_signals()[0].probabilities)


def test_cross_validation_results_are_removed_with_the_setting(
    cross_validated_run: TeachersRun, equal_weights_run: TeachersRun, tmp_path: Path
) -> None:
    folder = shutil.copytree(cross_validated_run.folder, tmp_path / "run")
    with fail_if_teacher_is_trained():
        distill(resume=folder, teacher_weights=None)
    assert {path.name for path in folder.iterdir()} == {path.name for path in equal_weights_run.folder.iterdir()}
    assert read_metrics(folder) == read_metrics(equal_weights_run.folder)


# Memory


@pytest.mark.parametrize(("student", "is_needed"), [("static:2", True), ("static:2@MODEL", False)])
def test_first_teacher_stays_in_memory_only_if_student_needs_it(
    run: Run, base: dict[str, Any], student: str, is_needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.teacher.train import train_teacher

    model = base["teacher"][0]
    bodies: list[Any] = []
    alive: list[bool] = []

    def train(*args: Any, **kwargs: Any) -> SetFitModel:
        gc.collect()
        alive.extend(body() is not None for body in bodies)
        teacher = train_teacher(*args, **kwargs)
        bodies.append(weakref.ref(teacher.model_body))
        return teacher

    monkeypatch.setattr("setfit_kd.run.teacher_stages.train_teacher", train)
    run(student=student.replace("MODEL", model), baseline=False, eval=None, teacher_steps=1)
    assert alive == [is_needed]
    gc.collect()
    assert [body() for body in bodies] == [None, None]


def test_teacher_is_not_in_memory_during_its_cross_validation(
    run: Run, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.teacher.train import train_teacher

    bodies: list[Any] = []
    alive: list[bool] = []

    def train(*args: Any, **kwargs: Any) -> SetFitModel:
        teacher = train_teacher(*args, **kwargs)
        bodies.append(weakref.ref(teacher.model_body))
        return teacher

    def cross_validate(*_: Any, **__: Any) -> float:
        gc.collect()
        alive.append(bodies[-1]() is not None)
        return 0.5

    monkeypatch.setattr("setfit_kd.run.teacher_stages.train_teacher", train)
    monkeypatch.setattr("setfit_kd.run.teacher_stages.cross_validated_accuracy", cross_validate)
    student = f"static:2@{base['teacher'][0]}"
    run(student=student, baseline=False, eval=None, teacher_steps=1, teacher_weights="cross-validated")
    assert alive == [False, False]


# Seeds


def test_several_seeds_with_several_teachers(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(seeds=2, student="static:2", baseline=False, output_dir=folder)
    assert list(result.by_seed) == [0, 1]
    assert {path.name for path in (folder / "seeds/1/teachers").iterdir()} == {SETFIT, TRANSFORMER}
    for evaluations in result.by_seed.values():
        assert list(evaluations) == [*TEACHERS, "teacher", "student"]
    for seed_folder, evaluations in ((folder, result.by_seed[0]), (folder / "seeds/1", result.by_seed[1])):
        expected = average_teachers(evaluations, seed_folder, [0.5, 0.5])
        np.testing.assert_allclose(evaluations["teacher"].probabilities, expected, atol=1e-6)
    accuracies = [evaluations["teacher"].quality.accuracy for evaluations in result.by_seed.values()]
    saved_metrics = read_json(folder / "metrics.json")
    assert saved_metrics["teacher"]["over_seeds"]["figures"]["accuracy"]["values"] == pytest.approx(accuracies)
    assert set(saved_metrics["student"]["over_seeds"]["against"]) == {"teacher"}
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "Results over 2 seeds" in report
    assert f"{SETFIT} (teacher)" in report


# Reports


def test_loss_curves_exclude_cross_validation(cross_validated_run: TeachersRun) -> None:
    stages = read_json(cross_validated_run.folder / "run.json")["stages"]
    assert stages[f"weighed/{SETFIT}"]["losses"]
    students = [name for student in ("layers-1", "static-4") for name in (student, f"{student} (baseline)")]
    assert set(read_summary(cross_validated_run.folder).losses) == {
        f"{SETFIT} (teacher)",
        f"{TRANSFORMER} (teacher)",
        *students,
    }


@pytest.mark.parametrize("kind", ["report.md", "report.html"])
def test_report_lists_each_teacher_with_its_weight(any_run: TeachersRun, shares: list[float], kind: str) -> None:
    text = (any_run.folder / kind).read_text(encoding="utf-8").replace("\\", "")
    for name, share in zip(any_run.teachers, shares, strict=True):
        assert f"{name} ({share:.1%})" in text
    for row in (f"{SETFIT} (teacher)", f"{TRANSFORMER} (teacher)", "layers-1 (baseline)"):
        assert row in text
    assert "Teacher: the average of all teachers." in text
    assert "the average of its teachers" in text


def test_verdict_compares_with_the_average(equal_weights_run: TeachersRun) -> None:
    summary = read_summary(equal_weights_run.folder)
    assert "the average of its teachers" in verdict(summary)
    best = max(summary.students, key=lambda student: student.evaluation.quality.accuracy)
    teacher = equal_weights_run.result.evaluations[TEACHER]
    difference = best.evaluation.quality.accuracy - teacher.quality.accuracy
    assert best.differences["teacher"]["accuracy"].value == pytest.approx(difference)
    assert {name.partition(" ")[2] for name in summary.evaluations} == {"(teacher)", "(baseline)", ""}


@pytest.mark.parametrize("student", ["layers:1", "static:4"])
def test_model_card_names_both_teachers_without_paths(equal_weights_run: TeachersRun, student: str) -> None:
    text = render_card(read_summary(equal_weights_run.folder), student).replace("\\", "")
    assert f"distilled by setfit-kd from {SETFIT} and whole, which were fine-tuned on 16 labeled texts" in text
    assert str(equal_weights_run.folder.parent) not in text
    assert str(Path(equal_weights_run.teachers[0]).parent) not in text


# Command line


def test_several_teacher_flags(
    base: dict[str, Any], fixed_weights_run: TeachersRun, tmp_path: Path, forward_batch_sizes: list[int]
) -> None:
    command = ["run", *flags(base), "--teacher-weights", "2,1", "--output-dir", tmp_path / "run"]
    dry_run = invoke(*command, "--dry-run")
    assert dry_run.exit_code == 0, dry_run.stderr
    assert "teacher:\n- {}\n- {}\n".format(*base["teacher"]) in dry_run.stdout
    assert "teacher_weights: 2,1\n" in dry_run.stdout
    assert not (tmp_path / "run").exists()
    assert not forward_batch_sizes
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    assert f"Teacher {base['teacher'][0]}: weight 66.7%." in result.stderr
    assert [name for name in (f"{SETFIT} (teacher)", "teacher", "static-4") if name not in result.stdout] == []
    assert read_metrics(tmp_path / "run") == read_metrics(fixed_weights_run.folder)


def flags(settings: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [argument for item in values for argument in (flag, str(item))]
    return arguments


def test_wrong_number_of_weights_prints_an_error(base: dict[str, Any], tmp_path: Path) -> None:
    result = invoke("run", *flags(base), "--teacher-weights", "1,2,3", "--output-dir", tmp_path / "run")
    assert result.exit_code == ConfigError.exit_code
    assert "number of weights must be 2, one per teacher, got 1,2,3" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()
