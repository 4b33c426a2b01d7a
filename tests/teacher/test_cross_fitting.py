"""Cross-fitting: held-out predictions of the labeled texts, calibration and estimates without an evaluation set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
from checks import invoke
from conftest import FAST, Run, newswire
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import few_labels

from setfit_kd import distill
from setfit_kd.config.stages import TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.evaluation.estimates import Estimate, estimate_student, estimate_teacher
from setfit_kd.evaluation.metrics import Interval
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import load_head
from setfit_kd.teacher import cross_fitting
from setfit_kd.teacher.cross_fitting import FOLDS, CrossFit, cross_fit
from setfit_kd.teacher.train import train_teacher
from setfit_kd.utils.files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from setfit import SetFitModel


@pytest.mark.parametrize("n_rare", [0, 2])
def test_each_label_is_predicted_once_without_training_on_it(
    tiny_student: Path, n_rare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of a class with two labels are always trained on."""
    labeled = few_labels(18)
    kept = np.flatnonzero(labeled.labels != 0)
    labeled = labeled.take(np.append(kept, np.flatnonzero(labeled.labels == 0)[: n_rare or None]))
    is_rare = labeled.counts[labeled.labels] == 2
    held_out: list[tuple[list[str], Any]] = []
    train = Mock(side_effect=train_teacher)

    def predict(model: SetFitModel, texts: Sequence[str], **options: Any) -> Any:
        held_out.append((list(texts), predict_proba(model, texts, **options)))
        return held_out[-1][1]

    monkeypatch.setattr(cross_fitting, "train_teacher", train)
    monkeypatch.setattr(cross_fitting, "predict_proba", predict)
    config = TeacherConfig.of(device="cpu", precision="fp32", teacher_steps=2, teacher_batch_size=8)
    result = cross_fit(labeled, lambda: load_body(tiny_student), config=config)
    assert len({id(call.args[1]) for call in train.call_args_list}) == len(held_out) == FOLDS  # each has a new body
    for call, (texts, _) in zip(train.call_args_list, held_out, strict=True):
        training_set: LabeledSet = call.args[0]
        assert sorted([*training_set.texts, *texts]) == sorted(labeled.texts)
        assert training_set.counts.min() >= 2
    row_of = {text: row for texts, rows in held_out for text, row in zip(texts, rows, strict=True)}
    assert set(row_of) == {text for text, rare in zip(labeled.texts, is_rare, strict=True) if not rare}
    for text, row, rare in zip(labeled.texts, result.probabilities, is_rare, strict=True):
        np.testing.assert_array_equal(row, np.full(len(row), np.nan) if rare else row_of[text])
    predicted = result.predicted()
    assert result.accuracy == (predicted.probabilities.argmax(axis=1) == predicted.labels).mean()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sets", ["BA CA DA B B C C D D _", "AB AB AC AC A D D", "A A A B B B AB AB _ _ _"])
def test_every_fold_keeps_two_texts_of_each_of_several_labels(sets: str, seed: int) -> None:
    rows = np.array([[name in some for name in "ABCD"] for some in sets.split()])
    labeled = LabeledSet(sets.split(), rows[:, rows.any(axis=0)], tuple(np.array(list("ABCD"))[rows.any(axis=0)]))
    held_out = [row for _, rows in cross_fitting._folds(labeled, seed) for row in rows]
    assert len(held_out) == len(set(held_out))
    for training, _ in cross_fitting._folds(labeled, seed):
        assert (labeled.take(training).counts >= 2).all()


def test_too_few_labels_give_no_predictions() -> None:
    labeled = few_labels(6)
    result = cross_fit(labeled, Mock(side_effect=AssertionError), config=TeacherConfig.of())
    assert np.isnan(result.probabilities).all()
    assert (result.accuracy, result.temperature) == (None, 1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.floats(0.4, 2.5))
def test_temperature_calibrates_many_predictions_and_stays_near_one_for_few(
    seed: int, n_classes: int, true_temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(4000, n_classes))
    scaled = np.exp(logits / true_temperature)
    cumulated = np.cumsum(scaled / scaled.sum(axis=1, keepdims=True), axis=1)
    labels = np.minimum((rng.random((4000, 1)) > cumulated).sum(axis=1), n_classes - 1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    many = CrossFit(probabilities.astype(np.float32), labels)
    few = CrossFit(many.probabilities[:4], labels[:4])
    assert many.temperature == pytest.approx(true_temperature, rel=0.25)
    assert abs(np.log(few.temperature)) < 0.4
    np.testing.assert_array_equal(many.calibrated.probabilities.argmax(axis=1), many.probabilities.argmax(axis=1))
    assert many.calibrated.temperature == pytest.approx(1, rel=0.1)


def test_classes_without_a_correct_prediction_are_unrecognized() -> None:
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [np.nan] * 3], np.float32)
    assert CrossFit(probabilities, np.array([0, 0, 1, 2])).unrecognized.tolist() == [1, 2]


def test_predictions_are_unchanged_after_saving_and_loading(tmp_path: Path) -> None:
    labeled = few_labels(12)
    probabilities = np.full((12, len(labeled.label_names)), np.nan, np.float32)
    probabilities[:5] = 1 / len(labeled.label_names)
    CrossFit(probabilities, labeled.labels).save(tmp_path / "x")
    np.testing.assert_array_equal(CrossFit.load(tmp_path / "x", labeled).probabilities, probabilities)
    for damage in (lambda file: np.save(file, probabilities[:3]), lambda file: file.write_bytes(b"x"), Path.unlink):
        damage(tmp_path / "x" / "probabilities.npy")
        with pytest.raises(DataError, match="Cannot read the predictions in"):
            CrossFit.load(tmp_path / "x", labeled)


# Estimates


def test_estimate_of_teacher_is_a_mean_of_two_accuracies() -> None:
    probabilities = np.array([[0.9, 0.1]] * 8 + [[0.2, 0.8]] * 2, np.float32)
    labels = np.array([0] * 7 + [1] + [1, 1])
    estimate = estimate_teacher(probabilities, labels, 0.7)
    assert estimate.accuracy.value == pytest.approx(0.25 * 0.9 + 0.75 * 0.7)
    assert estimate.accuracy.low < 0.75 < estimate.accuracy.high <= 1
    assert estimate.macro_f1 is not None
    assert estimate.macro_f1.value == pytest.approx((14 / 15 + 4 / 5) / 2)
    assert estimate.ece == pytest.approx(0.2 * 0.2 + 0.8 * 0.025, abs=1e-6)
    assert estimate_teacher(probabilities, labels, None).accuracy.value == pytest.approx(0.9)


def test_student_loses_where_both_models_together_prefer_the_class_of_the_teacher() -> None:
    teacher = Estimate(Interval(0.8, 0.7, 0.9))
    targets = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    assert estimate_student(teacher, targets, targets) == Estimate(teacher.accuracy, agreement=1.0)
    other = targets.copy()
    other[0] = 0.4, 0.6  # teacher: 0.6 - 0.4; student, at half the weight: (0.4 - 0.6) / 2
    estimate = estimate_student(teacher, other, targets)
    assert estimate.agreement == 0.75
    assert estimate.accuracy.value == pytest.approx(0.8 - 0.1 / 4)
    assert estimate.accuracy.low == pytest.approx(0.7 - 0.1 / 4)


# Runs


@pytest.fixture(scope="module")
def base(tiny_teacher: Path) -> dict[str, Any]:
    """Settings of a small run with an evaluation set."""
    rows, held_out = newswire("train"), newswire("eval")
    sources = {"labeled": rows[:80], "unlabeled": [row["text"] for row in rows[80:140]], "eval": held_out[:20]}
    return {**FAST, **sources, "teacher": str(tiny_teacher), "student": "static:4", "batch_size": 16, "cache": False}


@pytest.fixture(scope="module")
def estimated_run(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(eval=None, calibrate=True, output_dir=folder)
    return folder


def test_run_without_evaluation_set_reports_estimates(estimated_run: Path) -> None:
    metrics = read_json(estimated_run / "metrics.json")
    assert list(metrics) == ["teacher", "student"]
    assert all(values["estimated"] for values in metrics.values())
    assert set(metrics["teacher"]) == {
        "estimated",
        "accuracy",
        "accuracy_interval",
        "macro_f1",
        "macro_f1_interval",
        "ece",
    }
    assert set(metrics["student"]) == {"estimated", "accuracy", "accuracy_interval", "agreement"}
    page = (estimated_run / "report.html").read_text(encoding="utf-8")
    assert "Estimated quality" in page
    for values in metrics.values():
        assert f"{values['accuracy']:.1%}" in page


def test_run_warns_of_classes_that_cannot_be_learned(
    run: Run, base: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rare = [{"text": text, "label": "Rare"} for text in ("An odd text", "Another one")]
    run(eval=None, calibrate=True, shots=None, labeled=[*base["labeled"][:60], *rare])
    assert "No labeled text of these classes is recognized by a teacher" in caplog.text
    assert "Rare (2 labels)" in caplog.text


def test_evaluation_set_replaces_estimates_without_training(
    estimated_run: Path, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = shutil.copytree(estimated_run, tmp_path / "run"), {n: base[n] for n in ("labeled", "unlabeled")}
    for name in ("cross_fit", "refine_and_score", "train_student"):
        monkeypatch.setattr(f"setfit_kd.run.stages.{name}", Mock(side_effect=AssertionError("trained again")))
    with monkeypatch.context() as patch:
        patch.setattr("setfit_kd.run.stages.predict_proba", Mock(side_effect=AssertionError("predicted again")))
        assert distill(resume=folder, **data).metrics == read_json(estimated_run / "metrics.json")
    result = distill(resume=folder, eval=base["eval"], baseline=False, **data)
    assert "estimated" not in result.metrics["student"]
    assert not result.estimates


def test_calibration_keeps_the_predicted_classes(run: Run, tmp_path: Path) -> None:
    results = {}
    for calibrate in (True, False):
        folder = tmp_path / str(calibrate)
        results[calibrate] = run(calibrate=calibrate, refine="none", baseline=False, output_dir=folder)
        heads = [load_head(folder / name) for name in ("teacher/trained_head", "signals/head")]
        assert heads[0] is not None
        assert heads[1] is not None
        ratio = np.unique(np.round(heads[0].coef_ / heads[1].coef_, 6))
        assert len(ratio) == 1
        assert (ratio[0] != 1) == calibrate
    probabilities = [result.signals.probabilities for result in results.values()]
    assert np.abs(probabilities[0] - probabilities[1]).max() > 1e-3
    np.testing.assert_array_equal(*(rows.argmax(axis=1) for rows in probabilities))


def test_estimates_are_printed(run: Run, tmp_path: Path, tiny_teacher: Path) -> None:
    for name, rows in (("few", newswire("train")[:32]), ("pool", newswire("train")[32:80])):
        lines = ["text,label"] + [f'"{row["text"].replace(chr(34), "")}",{row["label"]}' for row in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8")
    flags = ["--teacher", tiny_teacher, "--student", "static:2", "--device", "cpu", "--precision", "fp32"]
    flags += ["--teacher-steps", "2", "--epochs", "1", "--no-bundle", "--output-dir", tmp_path / "run"]
    result = invoke("run", "--labeled", tmp_path / "few.csv", "--unlabeled", tmp_path / "pool.csv", *flags)
    assert result.exit_code == 0, result.stderr
    assert "quality can only be estimated" in result.stderr
    assert "estimated" in result.stdout
    assert "agreement" in result.stdout
