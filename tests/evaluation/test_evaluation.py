"""Quality against scikit-learn and hand-computed values, and cost against exact counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import newswire
from hypothesis import given, settings
from hypothesis import strategies as st

from setfit_kd import evaluate
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.evaluation.measure import Evaluation, count_parameters
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import fit_head
from setfit_kd.models.io import new_model, save_model

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Ints = npt.NDArray[np.int64]

NAMES = ("Business", "Sci/Tech", "Sports", "World")
ROWS = newswire("eval")[:20]
DATA = LabeledSet([row["text"] for row in ROWS], np.array([NAMES.index(row["label"]) for row in ROWS]), NAMES)


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
    ],
)
def test_unsuitable_sets_are_rejected(model: SetFitModel, data: Any, message: str) -> None:
    teacher = None if "20" not in message else evaluate(model, DATA)
    with pytest.raises(DataError, match=message):
        evaluate(model, data, teacher=teacher)
