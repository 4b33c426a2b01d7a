"""Several teachers: what each comes to, how they are averaged and weighed, and what a resumed run does again."""

from __future__ import annotations

import gc
import json
import logging
import re
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
from synthetic import few_labels, same, weights

from setfit_kd import RunConfig, RunResult, TeacherSignals, distill, load
from setfit_kd.cli import main
from setfit_kd.config import TeacherConfig
from setfit_kd.data import LabeledSet
from setfit_kd.errors import ConfigError
from setfit_kd.evaluation import Evaluation, evaluate_ensemble, measure_quality
from setfit_kd.evaluation.cost import Cost
from setfit_kd.models import load_body, predict_proba
from setfit_kd.models.temperature import at_temperature
from setfit_kd.report import read_summary, verdict
from setfit_kd.report.render import card
from setfit_kd.run_folder import TEACHER
from setfit_kd.teacher import cross_validated_accuracy
from setfit_kd.teacher.ensemble import FOLDS

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

SETFIT, WHOLE = "plain", "transformer-whole"
PLACES = (f"teachers/{SETFIT}", f"teachers/{WHOLE}")
RAN_ON = "cpu"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(folder: Path) -> dict[str, Any]:
    """Without what a clock measures."""
    return {
        name: {figure: value for figure, value in of.items() if figure != "texts_per_second"}
        for name, of in read_json(folder / "metrics.json").items()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> dict[str, Any]:
    """Settings of a small run of two teachers, one of each family, and two students."""
    folder = tmp_path_factory.mktemp("given")
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
class Both:
    """A run of two teachers."""

    folder: Path
    result: RunResult
    teachers: Sequence[str]

    def said(self) -> list[TeacherSignals]:
        return [TeacherSignals.load(self.folder / "scored" / name) for name in (SETFIT, WHOLE)]


@pytest.fixture(scope="module")
def both(run: Run, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("runs") / "both"
    return Both(folder, run(output_dir=folder), base["teacher"])


@pytest.fixture
def copied(both: Both, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be gone on with."""
    return Path(shutil.copytree(both.folder, tmp_path / "run"))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("This was made before.")


@contextmanager
def no_teacher_is_trained() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_teacher", "refine_and_score"):
            patch.setattr(f"setfit_kd.run.teacher_stages.{name}", refuse)
        yield patch


def gone_on_with(both: Both, folder: Path, **settings: Any) -> Both:
    """A copy of a run, gone on with under other settings that make no teacher anew."""
    shutil.copytree(both.folder, folder)
    with no_teacher_is_trained():
        return Both(folder, distill(resume=folder, **settings), both.teachers)


@pytest.fixture(scope="module")
def two_to_one(both: Both, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The same with other weights."""
    return gone_on_with(both, tmp_path_factory.mktemp("runs") / "two-to-one", teacher_weights="2,1")


@pytest.fixture(scope="module")
def cross_validated(both: Both, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The same with weights by what each has not seen."""
    folder = tmp_path_factory.mktemp("runs") / "cross-validated"
    return gone_on_with(both, folder, teacher_weights="cross-validated")


ALL = ("both", "two_to_one", "cross_validated")


@pytest.fixture(params=ALL)
def any_run(request: pytest.FixtureRequest) -> Both:
    found: Both = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def shares(any_run: Both) -> list[float]:
    """What the weights of a run must be."""
    written = any_run.result.config.teacher_weights
    if written is None:
        return [0.5, 0.5]
    if written == "2,1":
        return [2 / 3, 1 / 3]
    accuracies = [read_json(any_run.folder / "weighed" / name / "accuracy.json") for name in (SETFIT, WHOLE)]
    assert len(set(accuracies)) == 2, "weights of which nothing is to be seen"
    return [accuracy / sum(accuracies) for accuracy in accuracies]


# What each is, and what they are together


def test_each_teacher_has_a_folder_of_its_own_and_the_average_has_none(both: Both) -> None:
    assert {path.name for path in (both.folder / "teachers").iterdir()} == {SETFIT, WHOLE}
    assert {path.name for path in (both.folder / "scored").iterdir()} == {SETFIT, WHOLE}
    assert {path.name for path in both.folder.iterdir() if path.is_dir()} == {
        *("teachers", "scored", "students", "baselines", "evaluation")
    }
    assert both.result.teacher is None


@pytest.mark.parametrize("place", PLACES)
def test_each_teacher_predicts_what_was_measured_of_it(both: Both, base: dict[str, Any], place: str) -> None:
    rows = [json.loads(line) for line in Path(base["eval"]).read_text(encoding="utf-8").splitlines()]
    found = predict_proba(load(both.folder / place, device="cpu"), [row["text"] for row in rows])
    np.testing.assert_allclose(found, both.result.evaluations[place].probabilities, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_each_teacher_predicts_what_its_signals_mean(both: Both, place: str) -> None:
    signals = TeacherSignals.load(both.folder / place.replace("teachers", "scored"))
    assert signals.temperature != 1
    said = np.log(np.maximum(signals.probabilities, 1e-30)) / signals.temperature
    meant = np.exp(said) / np.exp(said).sum(axis=1, keepdims=True)
    found = predict_proba(load(both.folder / place, device="cpu"), signals.texts)
    np.testing.assert_allclose(found, meant, atol=1e-4)


def test_the_teachers_are_of_the_families_that_they_were_named_as(both: Both) -> None:
    architectures = [read_json(both.folder / place / "config.json")["architectures"] for place in PLACES]
    assert architectures == [["BertModel"], ["BertForSequenceClassification"]]


def test_every_model_is_measured(both: Both) -> None:
    students = [f"{kind}/{name}" for name in ("layers-1", "static-4") for kind in ("baselines", "students")]
    assert list(read_json(both.folder / "metrics.json")) == [*PLACES, "teacher", *students]
    assert both.result.evaluations[PLACES[0]].quality.agreement is None
    assert both.result.evaluations["students/layers-1"].quality.agreement is not None


def averaged(of: dict[str, Evaluation], folder: Path, shares: list[float]) -> npt.NDArray[np.floating]:
    """What the teachers of a run say of the evaluated texts, averaged as their signals are."""
    said = [TeacherSignals.load(folder / place.replace("teachers", "scored")) for place in PLACES]
    sharp = [at_temperature(of[place].probabilities, 1 / s.temperature) for place, s in zip(PLACES, said, strict=True)]
    return at_temperature(np.average(sharp, axis=0, weights=shares), TeacherSignals.average(said, shares).temperature)


def test_together_they_are_their_average(any_run: Both, shares: list[float]) -> None:
    of = any_run.result.evaluations
    expected = averaged(of, any_run.folder, shares)
    np.testing.assert_allclose(of["teacher"].probabilities, expected, atol=1e-6)
    predicted = np.asarray(expected).argmax(axis=1)
    assert of["teacher"].quality == measure_quality(predicted, of["teacher"].gold, list(of["teacher"].quality.classes))
    for place in PLACES:  # the average is neither of them
        assert np.abs(of["teacher"].probabilities - of[place].probabilities).max() > 0.01


def test_students_are_compared_with_the_average(any_run: Both) -> None:
    of = any_run.result.evaluations
    for name in ("students/layers-1", "baselines/static-4"):
        agreement = np.mean(of[name].predicted == of["teacher"].predicted)
        assert of[name].quality.agreement == pytest.approx(agreement)


def test_the_signals_are_the_average(any_run: Both, shares: list[float]) -> None:
    said = any_run.said()
    expected = TeacherSignals.average(said, shares)
    found = any_run.result.signals
    assert found.texts == expected.texts
    assert found.origin == f"{any_run.teachers[0]} + {any_run.teachers[1]}"
    assert found.temperature == pytest.approx(expected.temperature)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-7)
    by_hand = sum(share * of.probabilities for share, of in zip(shares, said, strict=True))
    np.testing.assert_allclose(found.probabilities, by_hand, atol=1e-6)
    assert found.embeddings is not None
    assert expected.embeddings is not None
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-6)


def test_a_run_tells_the_shares(any_run: Both, shares: list[float]) -> None:
    told = read_json(any_run.folder / "run.json")["teacher_shares"]
    assert told == pytest.approx(dict(zip(any_run.teachers, shares, strict=True)))


def evaluation(n: int, parameters: int, megabytes: float, speed: float, seed: int) -> Evaluation:
    gold = np.arange(n) % 3
    said = np.random.default_rng(seed).dirichlet(np.ones(3), n).astype(np.float32)
    quality = measure_quality(said.argmax(axis=1), gold, "abc")
    return Evaluation(quality, Cost(parameters, megabytes, speed, RAN_ON), said, gold)


def test_sizes_and_times_add_up() -> None:
    alone = [evaluation(30, 10, 1.5, 100, 0), evaluation(30, 5, 0.2, 50, 1)]
    found = evaluate_ensemble(alone, [0.5, 0.5], [1, 1], 1).cost
    # A hundredth and a fiftieth of a second a text.
    assert found == Cost(15, 1.7, 33.3, RAN_ON)


def test_the_average_may_be_better_than_each() -> None:
    gold = np.array([0, 1])
    said = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]], np.float32)
    alone = [
        Evaluation(measure_quality(one.argmax(axis=1), gold, "ab"), Cost(1, 1, 1, RAN_ON), one, gold) for one in said
    ]
    assert [of.quality.accuracy for of in alone] == [0.5, 0.5]
    assert evaluate_ensemble(alone, [1, 1], [1, 1], 1).quality.accuracy == 1
    assert evaluate_ensemble(alone, [9, 1], [1, 1], 1).quality.accuracy == 0.5


def test_the_evaluated_teacher_is_what_students_learn_from() -> None:
    rng = np.random.default_rng(0)
    texts, gold = [f"text {row}" for row in range(200)], rng.integers(3, size=200)
    said = [
        TeacherSignals(texts, rng.dirichlet(np.full(3, 0.5), 200).astype(np.float32), tuple("abc"), temperature=t)
        for t in (6.0, 1.5)
    ]
    average, temperatures = TeacherSignals.average(said, [2, 1]), [of.temperature for of in said]
    calibrated = [at_temperature(of.probabilities, of.temperature).astype(np.float32) for of in said]
    alone = [
        Evaluation(measure_quality(p.argmax(axis=1), gold, "abc"), Cost(1, 1, 1, RAN_ON), p, gold) for p in calibrated
    ]
    found = evaluate_ensemble(alone, [2, 1], temperatures, average.temperature)
    np.testing.assert_array_equal(found.predicted, average.probabilities.argmax(axis=1))
    expected = at_temperature(average.probabilities, average.temperature)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    averaged_at_their_own = np.average(calibrated, axis=0, weights=[2, 1])
    assert (averaged_at_their_own.argmax(axis=1) != found.predicted).any()


@pytest.mark.parametrize("number", [0, 1], ids=[SETFIT, WHOLE])
def test_a_teacher_alone_is_what_it_is_in_company(run: Run, both: Both, number: int, tmp_path: Path) -> None:
    alone = run(teacher=both.teachers[number], student="layers:1", output_dir=tmp_path / "run", baseline=False)
    assert alone.teacher is not None
    one, other = (load(folder, device="cpu") for folder in (tmp_path / "run/teacher", both.folder / PLACES[number]))
    assert same(weights(one), weights(other))
    np.testing.assert_array_equal(one.model_head.coef_, other.model_head.coef_)
    np.testing.assert_array_equal(alone.signals.probabilities, both.said()[number].probabilities)
    of = both.result.evaluations
    np.testing.assert_array_equal(alone.evaluations["teacher"].probabilities, of[PLACES[number]].probabilities)
    # What the other one says is learned, too.
    assert not np.array_equal(alone.evaluations["student"].probabilities, of["students/layers-1"].probabilities)


# Weights


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("1", "teacher_weights: 1 are not as many as the 2 teachers"),
        ("2,1,1", "teacher_weights: 2,1,1 are not as many as the 2 teachers"),
        ("2,0", "must be above 0"),
        ("2,-1", "must be above 0"),
        ("2,nan", "must be above 0"),
        ("2,inf", "must be above 0"),
        ("2;1", "write them as in 2,1, or cross-validated"),
        ("two,one", "write them as in 2,1, or cross-validated"),
        ("", "write them as in 2,1, or cross-validated"),
        ("2,", "write them as in 2,1, or cross-validated"),
        (2, "teacher_weights: "),
    ],
)
def test_weights_that_cannot_be_are_refused(written: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.of(teacher=["one", "other"], teacher_weights=written)


def test_one_teacher_has_one_weight() -> None:
    assert RunConfig.of(teacher="one", teacher_weights="3").teacher_weights == "3"
    with pytest.raises(ConfigError, match="2,1 are not as many as the 1 teachers"):
        RunConfig.of(teacher="one", teacher_weights="2,1")


@pytest.mark.parametrize(
    ("written", "kept"), [("2.0, 1", "2,1"), ("1e0,.5", "1,0.5"), ("cross-validated", "cross-validated")]
)
def test_the_same_weights_are_written_in_one_way(written: str, kept: str) -> None:
    config = RunConfig.of(teacher=["one", "other"], teacher_weights=written)
    assert config.teacher_weights == kept
    assert config == RunConfig.of(teacher=["one", "other"], teacher_weights=kept)


def test_a_teacher_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="teacher: one stands twice"):
        RunConfig.of(teacher=["one", "one"])


# How far one can be trusted


CHEAP = {
    "device": "cpu",
    "precision": "fp32",
    "teacher_steps": 2,
    "teacher_batch_size": 8,
    "teacher_learning_rate": 1e-3,
}


@dataclass
class Parts:
    """What a teacher is trained on and asked of, part after part."""

    trained_on: list[LabeledSet] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)
    said: list[npt.NDArray[np.floating]] = field(default_factory=list)
    begun_from: list[SentenceTransformer] = field(default_factory=list)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    from setfit_kd.models import predict_proba
    from setfit_kd.teacher import train_teacher

    seen = Parts()

    def train(labeled: LabeledSet, body: SentenceTransformer, **how: Any) -> SetFitModel:
        seen.trained_on.append(labeled)
        seen.begun_from.append(body)
        return train_teacher(labeled, body, **how)

    def ask(model: SetFitModel, texts: Sequence[str], **how: Any) -> npt.NDArray[np.floating]:
        seen.asked.append(list(texts))
        seen.said.append(predict_proba(model, texts, **how))
        return seen.said[-1]

    monkeypatch.setattr("setfit_kd.teacher.ensemble.train_teacher", train)
    monkeypatch.setattr("setfit_kd.teacher.ensemble.predict_proba", ask)
    return seen


def test_each_label_is_predicted_once_by_a_teacher_that_has_not_seen_it(parts: Parts, tiny_student: Path) -> None:
    labeled = few_labels(18)
    accuracy = cross_validated_accuracy(labeled, lambda: load_body(tiny_student), config=TeacherConfig.of(**CHEAP))
    assert len(parts.asked) == FOLDS
    assert sorted(text for asked in parts.asked for text in asked) == sorted(labeled.texts)
    for trained_on, asked in zip(parts.trained_on, parts.asked, strict=True):
        assert not set(trained_on.texts) & set(asked)
        assert set(trained_on.texts) | set(asked) == set(labeled.texts)
        assert trained_on.label_names == labeled.label_names
        assert trained_on.counts.min() >= 2  # as much of each class
    label_of = dict(zip(labeled.texts, labeled.labels, strict=True))
    right = [
        said.argmax() == label_of[text]
        for asked, answers in zip(parts.asked, parts.said, strict=True)
        for text, said in zip(asked, answers, strict=True)
    ]
    assert accuracy == np.mean(right)
    assert len({id(body) for body in parts.begun_from}) == FOLDS  # each begins anew


@pytest.mark.parametrize(("labels", "n_parts"), [(8, 0), (11, 0), (12, 3), (20, 4)])
def test_there_are_as_many_parts_as_the_labels_allow(
    parts: Parts, tiny_student: Path, labels: int, n_parts: int
) -> None:
    found = cross_validated_accuracy(
        few_labels(labels), lambda: load_body(tiny_student), config=TeacherConfig.of(**CHEAP)
    )
    assert len(parts.asked) == n_parts
    assert (found is None) == (n_parts == 0)


def test_too_few_labels_weigh_all_teachers_alike(
    run: Run, base: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(teacher_weights="cross-validated", shots=2, eval=None, student="static:2", output_dir=tmp_path / "run")
    assert "There are too few labels to weigh the teachers by: they count alike." in caplog.messages
    assert read_json(tmp_path / "run/run.json")["teacher_shares"] == dict.fromkeys(base["teacher"], 0.5)
    said = [TeacherSignals.load(tmp_path / "run/scored" / name) for name in (SETFIT, WHOLE)]
    np.testing.assert_allclose(result.signals.probabilities, TeacherSignals.average(said).probabilities, atol=1e-7)


# What a resumed run does again


def nothing_is_made(patch: pytest.MonkeyPatch) -> None:
    for name in ("train_teacher", "train_student", "evaluate", "evaluate_ensemble"):
        patch.setattr(f"setfit_kd.run.student_stages.{name}", refuse)
    patch.setattr("setfit_kd.run.teacher_stages.cross_validated_accuracy", refuse)


@pytest.mark.parametrize("name", ["both", "cross_validated"])
def test_a_finished_run_is_taken_whole_from_its_folder(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    before: Both = request.getfixturevalue(name)
    folder = shutil.copytree(before.folder, tmp_path / "run")
    with no_teacher_is_trained() as patch:
        nothing_is_made(patch)
        again = distill(resume=folder)
    assert (folder / "metrics.json").read_bytes() == (before.folder / "metrics.json").read_bytes()
    np.testing.assert_array_equal(again.signals.probabilities, before.result.signals.probabilities)
    told = [read_json(path / "run.json") for path in (folder, before.folder)]
    assert told[0] == told[1]


@pytest.mark.parametrize("name", ["two_to_one", "cross_validated"])
def test_with_other_weights_the_students_are_made_anew_and_no_teacher(
    name: str, both: Both, request: pytest.FixtureRequest
) -> None:
    other: Both = request.getfixturevalue(name)  # a teacher's training would have raised
    stages = [read_json(run.folder / "run.json")["stages"] for run in (both, other)]
    kept = {stage for stage in stages[0] if stages[1].get(stage) == stages[0][stage]}
    scored = {f"scored/{teacher}" for teacher in (SETFIT, WHOLE)}
    assert kept >= {*PLACES, *scored, *(f"evaluation/{place}" for place in PLACES)}
    assert kept.isdisjoint({"students/layers-1", "students/static-4", "evaluation/teacher"})
    students = [load(run.folder / "students/layers-1", device="cpu") for run in (both, other)]
    assert not same(*map(weights, students))


def test_a_teacher_whose_folder_is_damaged_is_trained_again_alone(
    copied: Path, both: Both, caplog: pytest.LogCaptureFixture
) -> None:
    (copied / PLACES[1] / "model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.INFO, "setfit_kd"):
        distill(resume=copied)
    assert f"Stage {PLACES[0]}: taken from" in caplog.text
    assert f"Stage {PLACES[1]}: taken from" not in caplog.text
    assert metrics(copied) == metrics(both.folder)


def test_from_two_teachers_to_one(run: Run, both: Both, copied: Path) -> None:
    distill(resume=copied, teacher=both.teachers[0], student="layers:1", baseline=False)
    assert {path.name for path in copied.iterdir() if path.is_dir()} == {
        *("teacher", "signals", "student", "evaluation")
    }
    assert {path.name for path in (copied / "evaluation").iterdir() if path.is_dir()} == {"teacher", "student"}
    assert list(read_json(copied / "metrics.json")) == ["teacher", "student"]
    assert read_json(copied / "run.json")["teacher_shares"] == {}
    signals = TeacherSignals.load(copied / "signals")
    np.testing.assert_array_equal(signals.probabilities, both.said()[0].probabilities)


def test_weights_that_were_cross_validated_are_dropped_with_the_setting(
    cross_validated: Both, both: Both, tmp_path: Path
) -> None:
    folder = shutil.copytree(cross_validated.folder, tmp_path / "run")
    with no_teacher_is_trained():
        distill(resume=folder, teacher_weights=None)
    assert {path.name for path in folder.iterdir()} == {path.name for path in both.folder.iterdir()}
    assert metrics(folder) == metrics(both.folder)


# Memory


@pytest.mark.parametrize(("student", "is_kept"), [("static:2", True), ("static:2@MODEL", False)])
def test_no_teacher_is_held_while_the_next_is_trained_unless_a_student_is_made_of_it(
    run: Run, base: dict[str, Any], student: str, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.teacher import train_teacher

    model = base["teacher"][0]
    bodies: list[Any] = []
    alive: list[bool] = []

    def train(*args: Any, **kwargs: Any) -> SetFitModel:
        gc.collect()
        alive.extend(body() is not None for body in bodies)
        trained = train_teacher(*args, **kwargs)
        bodies.append(weakref.ref(trained.model_body))
        return trained

    monkeypatch.setattr("setfit_kd.run.teacher_stages.train_teacher", train)
    run(student=student.replace("MODEL", model), baseline=False, eval=None, teacher_steps=1)
    assert alive == [is_kept]
    gc.collect()
    assert [body() for body in bodies] == [None, None]


def test_a_teacher_is_not_held_while_it_is_weighed(
    run: Run, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.teacher import train_teacher

    bodies: list[Any] = []
    alive: list[bool] = []

    def train(*args: Any, **kwargs: Any) -> SetFitModel:
        trained = train_teacher(*args, **kwargs)
        bodies.append(weakref.ref(trained.model_body))
        return trained

    def weigh(*_: Any, **__: Any) -> float:
        gc.collect()
        alive.append(bodies[-1]() is not None)
        return 0.5

    monkeypatch.setattr("setfit_kd.run.teacher_stages.train_teacher", train)
    monkeypatch.setattr("setfit_kd.run.teacher_stages.cross_validated_accuracy", weigh)
    student = f"static:2@{base['teacher'][0]}"
    run(student=student, baseline=False, eval=None, teacher_steps=1, teacher_weights="cross-validated")
    assert alive == [False, False]


# Seeds


def test_several_seeds_of_several_teachers(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(seeds=2, student="static:2", baseline=False, output_dir=folder)
    assert list(result.by_seed) == [0, 1]
    assert {path.name for path in (folder / "seeds/1/teachers").iterdir()} == {SETFIT, WHOLE}
    for of in result.by_seed.values():
        assert list(of) == [*PLACES, "teacher", "student"]
    for place, of in ((folder, result.by_seed[0]), (folder / "seeds/1", result.by_seed[1])):
        np.testing.assert_allclose(of["teacher"].probabilities, averaged(of, place, [0.5, 0.5]), atol=1e-6)
    accuracies = [of["teacher"].quality.accuracy for of in result.by_seed.values()]
    told = read_json(folder / "metrics.json")
    assert told["teacher"]["over_seeds"]["figures"]["accuracy"]["values"] == pytest.approx(accuracies)
    assert set(told["student"]["over_seeds"]["against"]) == {"teacher"}
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "Over 2 seeds" in report
    assert f"{SETFIT} (teacher)" in report


# What is told


def test_the_curves_are_of_the_trainings_that_a_model_came_of(cross_validated: Both) -> None:
    stages = read_json(cross_validated.folder / "run.json")["stages"]
    assert stages[f"weighed/{SETFIT}"]["losses"]
    students = [name for student in ("layers-1", "static-4") for name in (student, f"{student} (baseline)")]
    assert set(read_summary(cross_validated.folder).losses) == {f"{SETFIT} (teacher)", f"{WHOLE} (teacher)", *students}


@pytest.mark.parametrize("kind", ["report.md", "report.html"])
def test_the_report_names_each_teacher_with_its_share(any_run: Both, shares: list[float], kind: str) -> None:
    text = (any_run.folder / kind).read_text(encoding="utf-8").replace("\\", "")
    for name, share in zip(any_run.teachers, shares, strict=True):
        assert f"{name} ({share:.1%})" in text
    for row in (f"{SETFIT} (teacher)", f"{WHOLE} (teacher)", "layers-1 (baseline)"):
        assert row in text
    assert "Teacher: all of them, averaged." in text
    assert "the average of its teachers" in text


def test_the_verdict_is_against_the_average(both: Both) -> None:
    account = read_summary(both.folder)
    assert re.search(r"the average of its teachers|as the average of its teachers is", verdict(account))
    best = max(account.students, key=lambda student: student.evaluation.quality.accuracy)
    of = both.result.evaluations
    against = best.evaluation.quality.accuracy - of[TEACHER].quality.accuracy
    assert best.against["teacher"]["accuracy"].value == pytest.approx(against)
    assert {name.partition(" ")[2] for name in account.evaluations} == {"(teacher)", "(baseline)", ""}


@pytest.mark.parametrize("student", ["layers:1", "static:4"])
def test_a_model_card_names_both_teachers_and_no_path(both: Both, student: str) -> None:
    text = card(read_summary(both.folder), student).replace("\\", "")
    assert f"distilled by setfit-kd from {SETFIT} and whole, which were fine-tuned on 16 labeled texts" in text
    assert str(both.folder.parent) not in text
    assert str(Path(both.teachers[0]).parent) not in text


# The command line


def test_teachers_are_named_one_after_another(
    base: dict[str, Any], two_to_one: Both, tmp_path: Path, passed: list[int]
) -> None:
    command = ["run", *flags(base), "--teacher-weights", "2,1", "--output-dir", tmp_path / "run"]
    planned = invoke(*command, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert "teacher:\n- {}\n- {}\n".format(*base["teacher"]) in planned.stdout
    assert "teacher_weights: 2,1\n" in planned.stdout
    assert not (tmp_path / "run").exists()
    assert not passed
    told = invoke(*command)
    assert told.exit_code == 0, told.stderr
    assert f"Teacher {base['teacher'][0]} has a share of 66.7 %." in told.stderr
    assert [name for name in (f"{SETFIT} (teacher)", "teacher", "static-4") if name not in told.stdout] == []
    assert metrics(tmp_path / "run") == metrics(two_to_one.folder)


def flags(settings: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            found += [part for one in (value if isinstance(value, list) else [value]) for part in (flag, str(one))]
    return found


def test_weights_of_a_wrong_number_end_in_one_line(base: dict[str, Any], tmp_path: Path) -> None:
    result = invoke("run", *flags(base), "--teacher-weights", "1,2,3", "--output-dir", tmp_path / "run")
    assert result.exit_code == ConfigError.exit_code
    assert "1,2,3 are not as many as the 2 teachers" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()
