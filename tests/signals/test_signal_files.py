"""Signals from a file: what anybody's probabilities must be like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import newswire
from hypothesis import given
from hypothesis import strategies as st

from setfit_kd import TeacherSignals, train_student
from setfit_kd.errors import DataError
from setfit_kd.inference.predict import Predictions, predictions_file
from setfit_kd.signals.files import read_signals

NAMES = ["Sports", "Sci/Tech", "Wirtschaft, usw."]
TEXTS = [row["text"] for row in newswire("train")[:6]]
SAID = np.random.default_rng(0).dirichlet(np.ones(3), 6).astype(np.float32)


def row(text: str = "a text", **other: Any) -> dict[str, Any]:
    return {"text": text, "probabilities": {"a": 0.25, "b": 0.75}, **other}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_what_predict_writes_is_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"said.{ending}"
    with predictions_file(path, NAMES) as write:
        write(Predictions([*TEXTS], [NAMES[i] for i in SAID.argmax(axis=1)], SAID, [{}] * len(TEXTS)))
    found = read_signals(path)
    assert (found.texts, found.label_names, found.embeddings) == (TEXTS, tuple(NAMES), None)
    assert found.origin == str(path)
    np.testing.assert_allclose(found.probabilities, SAID, atol=2e-6)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-6)


def test_embeddings_and_maps_of_parquet(tmp_path: Path) -> None:
    said = [list(zip(NAMES, one.tolist(), strict=True)) for one in SAID]
    vectors = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    columns = {
        "text": pa.array(TEXTS),
        "probabilities": pa.array(said, pa.map_(pa.string(), pa.float32())),
        "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), tmp_path / "said.parquet")
    found = read_signals(tmp_path / "said.parquet")
    np.testing.assert_allclose(found.probabilities, SAID, atol=1e-6)
    np.testing.assert_array_equal(found.embeddings, vectors)


def test_labels_may_come_in_another_order_in_each_row(tmp_path: Path) -> None:
    other = {"text": "b", "probabilities": {"b": 0.9, "a": 0.1}}
    found = read_signals(written(tmp_path / "x.jsonl", row(), other))
    np.testing.assert_allclose(found.probabilities, [[0.25, 0.75], [0.1, 0.9]])


@given(st.lists(st.integers(0, 100), min_size=2, max_size=6).filter(any))
def test_rounded_probabilities_are_made_to_sum_to_1(tmp_path_factory: pytest.TempPathFactory, parts: list[int]) -> None:
    rounded = {f"label {i}": round(part / sum(parts), 3) for i, part in enumerate(parts)}
    path = written(tmp_path_factory.mktemp("x") / "x.jsonl", row(probabilities=rounded))
    assert read_signals(path).probabilities.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": None}, "no text"),
        ({"text": " \u200b"}, "the text is empty"),
        ({"text": 3}, "not a string"),
        ({"probabilities": None}, "no probabilities"),
        ({"probabilities": [0.5, 0.5]}, "no probabilities"),
        ({"probabilities": {"a": 1.0}}, "the label 'b' is only in the first row"),
        ({"probabilities": {"a": 0.5, "b": 0.25, "c": 0.25}}, "the label 'c' is not in the first row"),
        ({"probabilities": {"a": 0.5, "b": 0.4}}, r"sum to 0\.9"),
        ({"probabilities": {"a": 1.5, "b": -0.5}}, r"the probability of 'a' is 1\.5"),
        ({"probabilities": {"a": 1, "b": -0.005}}, r"the probability of 'b' is -0\.005"),
        ({"probabilities": {"a": float("nan"), "b": 0.5}}, "the probability of 'a' is nan"),
        ({"probabilities": {"a": float("inf"), "b": 0.5}}, "the probability of 'a' is inf"),
        ({"probabilities": {"a": "half", "b": 0.5}}, "the probability of 'a' is 'half'"),
        ({"probabilities": {"a": True, "b": 0.0}}, "the probability of 'a' is True"),
        ({"probabilities": {"a": 10**400, "b": 0.0}}, "the probability of 'a' is 1000"),
        ({"embedding": [1.0]}, "no embedding of 2 numbers"),
        ({"embedding": None}, "no embedding of 2 numbers"),
        ({"embedding": "[1, 2]"}, "no embedding of 2 numbers"),
        ({"embedding": [1.0, float("inf")]}, "not of finite numbers"),
        ({"embedding": [1.0, "x"]}, "not of finite numbers"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    good = row(embedding=[1.0, 2.0])
    path = written(tmp_path / "x.jsonl", good, {**good, **bad}, good)
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2: .*{message}"):
        read_signals(path)


def test_embeddings_are_of_all_rows_or_of_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: an embedding, where the first row has none"):
        read_signals(written(tmp_path / "x.jsonl", row(), row(embedding=[1.0])))
    broken: list[Any] = [[], "[1, 2]", 3]
    for nothing in broken:
        with pytest.raises(DataError, match="the embedding of the first row is no list of numbers"):
            read_signals(written(tmp_path / "x.jsonl", row(embedding=nothing)))


def test_many_such_rows_are_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", row(), *[row(text="")] * 9)
    with pytest.raises(DataError, match=r"line 2: the text is empty; line 3: .* and 6 more"):
        read_signals(path)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"text": "a", "label": "b"}, "has the columns 'text', 'label'"),
        ({"sentence": "a", "probabilities": {"a": 1.0, "b": 0.0}}, "has the columns 'sentence', 'probabilities'"),
        ({"text": "a", "probabilities": {"a": 1.0}}, "tells of 1 label"),
        ({"text": "a", "probabilities": {}}, "tells of 0 label"),
    ],
)
def test_a_file_without_signals_is_refused(tmp_path: Path, first: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_signals(written(tmp_path / "x.jsonl", first))


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.docx"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("" if name == "x.jsonl" else "a\nb\n")
    with pytest.raises(DataError, match=name):
        read_signals(tmp_path / name)


def test_there_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read"):
        read_signals(tmp_path / "gone.jsonl")


def test_a_student_is_trained_from_them(tmp_path: Path, tiny_student: Path) -> None:
    rows = newswire("train")[:48]
    labels = sorted({one["label"] for one in rows})
    told = [
        {"text": one["text"], "probabilities": {name: float(name == one["label"]) for name in labels}} for one in rows
    ]
    signals = read_signals(written(tmp_path / "x.jsonl", *told))
    assert isinstance(signals, TeacherSignals)
    student = train_student(signals, tiny_student, device="cpu", precision="fp32", objective="soft-labels", epochs=8,
                            learning_rate=1e-2, batch_size=16)  # fmt: skip
    assert list(student.labels) == labels
    right = sum(said == one["label"] for said, one in zip(student.predict(signals.texts), rows, strict=True))
    assert right >= 40
