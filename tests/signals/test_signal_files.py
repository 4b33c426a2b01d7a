"""Tests of reading signals from files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import newswire
from hypothesis import given
from hypothesis import strategies as st

from setfit_kd.errors import DataError
from setfit_kd.inference.predict import Prediction, write_predictions
from setfit_kd.signals.files import read_signals

NAMES = ["Sports", "Sci/Tech", "Wirtschaft, usw."]
TEXTS = [row["text"] for row in newswire("train")[:6]]
PROBABILITIES = np.random.default_rng(0).dirichlet(np.ones(3), 6).astype(np.float32)


def row(text: str = "a text", **fields: Any) -> dict[str, Any]:
    return {"text": text, "probabilities": {"a": 0.25, "b": 0.75}, **fields}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet"])
def test_read_predictions(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"predictions.{extension}"
    rows = zip(TEXTS, PROBABILITIES, strict=True)
    classifier: Any = SimpleNamespace(labels=NAMES, task="single-label", takes_pairs=False)
    write_predictions(path, [[Prediction(text, NAMES[row.argmax()], row, {}) for text, row in rows]], classifier)
    signals = read_signals(path)
    assert (signals.texts, signals.label_names, signals.embeddings) == (TEXTS, tuple(NAMES), None)
    assert signals.origin == str(path)
    np.testing.assert_allclose(signals.probabilities, PROBABILITIES, atol=2e-6)
    np.testing.assert_allclose(signals.probabilities.sum(axis=1), 1, atol=1e-6)


def test_read_embeddings_and_maps_from_parquet(tmp_path: Path) -> None:
    maps = [list(zip(NAMES, distribution.tolist(), strict=True)) for distribution in PROBABILITIES]
    vectors = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    columns = {
        "text": pa.array(TEXTS),
        "probabilities": pa.array(maps, pa.map_(pa.string(), pa.float32())),
        "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), tmp_path / "signals.parquet")
    signals = read_signals(tmp_path / "signals.parquet")
    np.testing.assert_allclose(signals.probabilities, PROBABILITIES, atol=1e-6)
    np.testing.assert_array_equal(signals.embeddings, vectors)


@given(st.lists(st.integers(0, 100), min_size=2, max_size=6).filter(any))
def test_rounded_probabilities_are_normalized(tmp_path_factory: pytest.TempPathFactory, shares: list[int]) -> None:
    rounded = {f"label {i}": round(share / sum(shares), 3) for i, share in enumerate(shares)}
    path = write_rows(tmp_path_factory.mktemp("x") / "x.jsonl", row(probabilities=rounded))
    assert read_signals(path).probabilities.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": " \u200b"}, "the text is empty"),
        ({"probabilities": None}, "no probabilities"),
        ({"probabilities": {"a": 1.0}}, "the label 'b' is only in the first row"),
        ({"probabilities": {"a": 0.5, "b": 0.25, "c": 0.25}}, "the label 'c' is not in the first row"),
        ({"probabilities": {"a": 0.5, "b": 0.4}}, r"must sum to 1, got 0\.9"),
        ({"probabilities": {"a": 1.5, "b": -0.5}}, r"the probability of 'a' must be between 0 and 1, got 1\.5"),
        ({"probabilities": {"a": "half", "b": 0.5}}, "the probability of 'a' must be between 0 and 1, got 'half'"),
        ({"probabilities": {"a": True, "b": 0.0}}, "the probability of 'a' must be between 0 and 1, got True"),
        ({"probabilities": {"a": 10**400, "b": 0.0}}, "the probability of 'a' must be between 0 and 1, got 1000"),
        ({"embedding": "[1, 2]"}, "expected an embedding of 2 numbers"),
        ({"embedding": [1.0, float("inf")]}, "only finite numbers"),
    ],
)
def test_unusable_row_is_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    valid = row(embedding=[1.0, 2.0])
    path = write_rows(tmp_path / "x.jsonl", valid, {**valid, **changes}, valid)
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2: .*{message}"):
        read_signals(path)


def test_embeddings_must_be_in_all_rows_or_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: unexpected embedding: the first row has none"):
        read_signals(write_rows(tmp_path / "x.jsonl", row(), row(embedding=[1.0])))
    with pytest.raises(DataError, match="the embedding of the first row must be a list of numbers, got"):
        read_signals(write_rows(tmp_path / "x.jsonl", row(embedding="[1, 2]")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "a", "has the columns 'text', with probabilities of 0 labels"),
        ("x.jsonl", '{"sentence": "a", "probabilities": {"a": 1.0, "b": 0.0}}', "has the columns 'sentence'"),
        ("x.jsonl", '{"text": "a", "probabilities": {"a": 1.0}}', "with probabilities of 1 labels"),
        ("x.csv", "text,probability_a,probability_b\n", "has no rows"),
    ],
)
def test_file_without_signals_is_rejected(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_signals(tmp_path / name)
