"""Quality against scikit-learn and hand-computed values, and cost against exact counts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from checks import assert_refused, invoke
from conftest import newswire
from hypothesis import given, settings
from hypothesis import strategies as st

from setfit_kd import evaluate
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.evaluation.measure import Evaluation, class_table, count_parameters, evaluation_table
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.export.bundle import export_bundle
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import fit_head, set_thresholds
from setfit_kd.models.io import new_model, save_model
from setfit_kd.tasks.classification import MULTI_LABEL

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Ints = npt.NDArray[np.int64]

NAMES = ("Business", "Sci/Tech", "Sports", "World")
ROWS = newswire("eval")[:20]
DATA = LabeledSet([row["text"] for row in ROWS], np.array([NAMES.index(row["label"]) for row in ROWS]), NAMES)
MULTI_DATA = LabeledSet(DATA.texts, np.random.default_rng(1).random((20, 4)) < 0.4, NAMES)


def ints(values: Sequence[int]) -> Ints:
    return np.array(values, np.int64)


@pytest.fixture
def model(student_body: SentenceTransformer) -> SetFitModel:
    rng = np.random.default_rng(0)
    classifier = new_model(student_body, NAMES)
    classifier.model_head = fit_head(
        rng.normal(size=(40, 16)).astype(np.float32), rng.dirichlet(np.ones(4), 40).astype(np.float32)
    )
    return classifier


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_quality_matches_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

    predicted, gold = ints([pair[0] for pair in pairs]), ints([pair[1] for pair in pairs])
    quality = measure_quality(predicted, gold, NAMES)
    present = sorted(set(gold.tolist()))
    assert quality.accuracy == pytest.approx(accuracy_score(gold, predicted))
    expected = f1_score(gold, predicted, labels=present, average="macro", zero_division=0)
    assert quality.macro_f1 == pytest.approx(expected)
    for i, name in enumerate(NAMES):
        options: dict[str, Any] = {"labels": [i], "average": "macro", "zero_division": 0}
        assert quality.classes[name].precision == pytest.approx(precision_score(gold, predicted, **options))
        assert quality.classes[name].recall == pytest.approx(recall_score(gold, predicted, **options))
        assert quality.classes[name].f1 == pytest.approx(f1_score(gold, predicted, **options))
        assert quality.classes[name].support == (gold == i).sum()
    counts = [[int(((gold == i) & (predicted == j)).sum()) for j in range(4)] for i in range(4)]
    assert quality.confusion == counts
    assert quality.micro_f1 is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of scikit-learn, for labels without gold texts
@settings(max_examples=30)
@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_multi_label_quality_matches_scikit_learn(n: int, share: float, seed: int) -> None:
    from sklearn import metrics

    rng = np.random.default_rng(seed)
    gold, probabilities = rng.random((n, 4)) < share, rng.random((n, 4)).astype(np.float32).round(1)
    predicted, teacher = probabilities >= 0.5, rng.random((n, 4)) < 0.5
    quality = measure_quality(predicted, gold, NAMES, teacher, probabilities=probabilities)
    occurs, is_labeled = gold.any(axis=0), gold.any(axis=1)
    precisions = [metrics.average_precision_score(gold[:, i], probabilities[:, i]) for i in range(4)]

    def mean(values: Any) -> float:
        return float(np.mean(np.array(values)[occurs])) if occurs.any() else 0

    assert quality.accuracy == pytest.approx(metrics.accuracy_score(gold, predicted))
    assert quality.macro_f1 == pytest.approx(mean(metrics.f1_score(gold, predicted, average=None, zero_division=0)))
    assert quality.micro_f1 == pytest.approx(metrics.f1_score(gold, predicted, average="micro", zero_division=0))
    both, sizes = (gold & predicted).sum(axis=1), gold.sum(axis=1) + predicted.sum(axis=1)
    assert quality.sample_f1 == pytest.approx(np.where(sizes == 0, 1, 2 * both / np.maximum(sizes, 1)).mean())
    assert quality.average_precision == pytest.approx(mean(precisions))
    if is_labeled.any():
        rows = gold[is_labeled], probabilities[is_labeled]
        assert quality.label_ranking == pytest.approx(metrics.label_ranking_average_precision_score(*rows))
    else:
        assert quality.label_ranking is None
    assert quality.agreement == pytest.approx((predicted == teacher).all(axis=1).mean())
    assert quality.confusion == [[int((gold[:, i] & predicted[:, j]).sum()) for j in range(4)] for i in range(4)]
    columns = metrics.precision_recall_fscore_support(gold, predicted, zero_division=0)
    for i, label in enumerate(quality.classes.values()):
        assert (label.precision, label.recall, label.f1, label.support) == pytest.approx([c[i] for c in columns])
        assert label.average_precision == pytest.approx(precisions[i])
        assert label.brier == pytest.approx(np.square(probabilities[:, i] - gold[:, i]).mean())


def test_parameters_include_body_and_head(model: SetFitModel, student_body: SentenceTransformer) -> None:
    from setfit import SetFitHead, SetFitModel

    expected = sum(parameter.numel() for parameter in student_body.parameters()) + 16 * 4 + 4
    head = SetFitHead(in_features=16, out_features=4, device="cpu")
    for classifier in (model, SetFitModel(student_body, head, labels=list(NAMES))):
        assert count_parameters(classifier) == expected


def test_evaluation_matches_model_predictions(model: SetFitModel, tmp_path: Path) -> None:
    evaluation = evaluate(model, DATA)
    expected = predict_proba(model, DATA.texts)
    np.testing.assert_allclose(evaluation.probabilities, expected, atol=1e-6)
    np.testing.assert_array_equal(evaluation.predicted, expected.argmax(axis=1))
    assert evaluation.quality == measure_quality(expected.argmax(axis=1), DATA.labels, NAMES)
    assert evaluation.cost.parameters == count_parameters(model)
    assert evaluation.cost.texts_per_second > 0
    assert evaluation.cost.device == "cpu"

    save_model(model, tmp_path / "saved")
    size = sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*") if path.is_file()) / 1e6
    assert evaluation.cost.megabytes == pytest.approx(size, abs=0.06)
    assert evaluate(model, DATA, folder=tmp_path / "saved").cost.megabytes == pytest.approx(size, abs=0.06)


@pytest.fixture
def multi_model(student_body: SentenceTransformer) -> SetFitModel:
    rng = np.random.default_rng(0)
    classifier = new_model(student_body, NAMES, MULTI_LABEL)
    targets = (rng.random((40, 4)) < 0.5).astype(np.float32)
    head = fit_head(rng.normal(size=(40, 16)).astype(np.float32), targets, task=MULTI_LABEL)
    classifier.model_head = set_thresholds(head, np.array([0.3, 0.5, 0.7, 0.9]))
    return classifier


def test_multi_label_evaluation_uses_thresholds_of_model(multi_model: SetFitModel, tmp_path: Path) -> None:
    labels = [[NAMES[i] for i in np.flatnonzero(row)] for row in MULTI_DATA.labels]
    evaluation = evaluate(multi_model, {"text": DATA.texts, "label": labels})
    predicted = predict_proba(multi_model, DATA.texts) >= [0.3, 0.5, 0.7, 0.9]
    np.testing.assert_array_equal(evaluation.predicted, predicted)
    assert evaluation.quality.accuracy == (predicted == MULTI_DATA.labels).all(axis=1).mean()
    body = sum(parameter.numel() for parameter in multi_model.model_body.parameters())
    assert evaluation.cost.parameters == body + 4 * 17
    evaluation.save(tmp_path / "evaluation")
    np.testing.assert_array_equal(Evaluation.load(tmp_path / "evaluation").predicted, predicted)
    with pytest.raises(ConfigError, match="one label per text"):
        evaluation.as_dict(target_accuracy=0.9)

    headings, [row] = evaluation_table({"a": evaluation})
    assert headings == ["", "macro-F1", "95% CI", "micro-F1", "exact match", "parameters", "MB", "texts/s"]
    values = [evaluation.quality.macro_f1, evaluation.quality.micro_f1, evaluation.quality.accuracy]
    assert [row[1], *row[3:5]] == [f"{value:.1%}" for value in values]
    headings, rows = class_table(evaluation)
    shown = ["precision", "recall", "F1", "average precision", "calibration error"]
    assert headings == ["label", "threshold", *shown, "texts"]
    assert [row[:2] for row in rows] == list(map(list, zip(NAMES, ["0.30", "0.50", "0.70", "0.90"], strict=True)))
    assert [row[0] for row in class_table(evaluation, 2)[1]] == sorted(
        NAMES, key=lambda name: evaluation.quality.classes[name].f1
    )[:2]


def test_command_shows_multi_label_metrics_of_model_and_bundle(multi_model: SetFitModel, tmp_path: Path) -> None:
    save_model(multi_model, tmp_path / "model")
    export_bundle(multi_model, tmp_path / "bundle", texts=DATA.texts, min_agreement=0.5)
    labels = [[NAMES[i] for i in np.flatnonzero(row)] for row in MULTI_DATA.labels]
    rows = [{"text": text, "label": names} for text, names in zip(DATA.texts, labels, strict=True)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name in ("model", "bundle"):
        result = invoke("evaluate", tmp_path / name, "--eval", tmp_path / "eval.jsonl")
        assert result.exit_code == 0, result.stderr
        lines = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()]
        [world] = [line for line in lines if line[0] == "World"]
        assert world[1] == "0.90"
        assert world[-1] == str(MULTI_DATA.counts[3])
        assert re.search(r"macro-F1 .*micro-F1 ", result.stdout)
        assert re.search(r"^Average precision [0-9.]+%, sample-F1 [0-9.]+%\.$", result.stdout, re.MULTILINE)
    result = invoke("evaluate", tmp_path / "bundle", "--eval", tmp_path / "eval.jsonl", "--target-accuracy", 0.9)
    assert_refused(result, "A target accuracy needs a classifier with one label per text")


def test_agreement_uses_teacher_evaluation(model: SetFitModel) -> None:
    student = evaluate(model, {"text": DATA.texts, "label": [NAMES[label] for label in DATA.labels]})
    assert student.quality == evaluate(model, DATA).quality
    assert student.quality.agreement is None
    probabilities = student.probabilities.copy()
    probabilities[:5] = np.roll(probabilities[:5], 1, axis=1)
    teacher = Evaluation(student.quality, student.cost, probabilities, student.gold)
    evaluation = evaluate(model, DATA, teacher=teacher)
    assert evaluation.quality.agreement == pytest.approx(0.75)
    values = evaluation.as_dict(target_accuracy=0.0)
    assert {"accuracy", "macro_f1", "classes", "confusion", "agreement", "parameters", "megabytes"} <= values.keys()
    assert values["classes"]["World"]["support"] == int((DATA.labels == 3).sum())
    assert values["agreement_interval"][0] <= 0.75 <= values["agreement_interval"][1]
    assert values["answering"]["coverage"] == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LabeledSet(DATA.texts, DATA.labels, NAMES[::-1]), "World, Sports"),
        ({"text": ["a text"], "label": ["Weather"]}, "'Weather'"),
        (LabeledSet([], ints([]), NAMES), "contains no texts"),
        (DATA.take(range(5)), "evaluated on 20 texts"),
        (MULTI_DATA, "is multi-label, but the model is single-label"),
    ],
)
def test_unsuitable_sets_are_rejected(model: SetFitModel, data: Any, message: str) -> None:
    teacher = None if "20" not in message else evaluate(model, DATA)
    with pytest.raises(DataError, match=message):
        evaluate(model, data, teacher=teacher)


def test_single_label_set_is_rejected_by_multi_label_model(multi_model: SetFitModel) -> None:
    with pytest.raises(DataError, match="is single-label, but the model is multi-label"):
        evaluate(multi_model, DATA)
    with pytest.raises(DataError, match="is single-label; expected multi-label"):
        evaluate(multi_model, {"text": ["a text"], "label": ["World"]})
