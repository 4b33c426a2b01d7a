"""Tests of `TeacherSignals`: validation, saving and loading, and averages of several teachers."""

from __future__ import annotations

import errno
import gc
import io
import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
from checks import read_tree
from hypothesis import example, given, settings
from hypothesis import strategies as st

from setfit_kd import TeacherSignals
from setfit_kd.errors import DataError, OutputError
from setfit_kd.utils import arrays

Floats = npt.NDArray[np.float32]

few = settings(max_examples=30)
seeds = st.integers(0, 2**32 - 1)


def distributions(seed: int, n: int, classes: int) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), size=n).astype(np.float32)


def vectors(seed: int, n: int, d: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def signals(seed: int = 0, n: int = 4, classes: int = 3, d: int = 5) -> TeacherSignals:
    names = tuple(f"class {i}" for i in range(classes))
    return TeacherSignals(
        [f"text {i}" for i in range(n)], distributions(seed, n, classes), names, vectors(seed + 1, n, d)
    )


def cosines(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    product: npt.NDArray[np.float64] = unit @ unit.T
    return product


def with_row(array: Floats, row: int, values: list[float]) -> Floats:
    changed: Floats = array.copy()
    changed[row] = values
    return changed


NAN = float("nan")
VALID = signals()
PROBABILITIES, EMBEDDINGS = VALID.probabilities, vectors(1, 4, 2)


# Validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probabilities": PROBABILITIES[:, 0]}, r"shape \(4, 3\) .*, got \(4,\)"),
        ({"probabilities": with_row(PROBABILITIES, 2, [0.5, 0.5, 0.5])}, "Row 3 .*0.5, 0.5, 0.5"),
        ({"probabilities": with_row(PROBABILITIES, 3, [NAN, 0.5, 0.5])}, "Row 4 "),
        ({"probabilities": with_row(PROBABILITIES, 1, [1.5, -0.5, 0])}, "Row 2 "),
        ({"embeddings": EMBEDDINGS[:3]}, r"embeddings of shape \(4, d\) .*, got \(3, 2\)"),
        ({"embeddings": EMBEDDINGS[:, 0]}, r"embeddings of shape \(4, d\) .*, got \(4,\)"),
        ({"embeddings": with_row(EMBEDDINGS, 2, [NAN, 1])}, "Row 3 of the embeddings"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"label_names": ("a", "a", "b")}, "must be distinct"),
    ],
)
def test_invalid_values_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(VALID, **changes)


def test_probabilities_rounded_to_fp16_are_accepted() -> None:
    probabilities = distributions(0, 200, 7).astype(np.float16).astype(np.float32)
    assert len(TeacherSignals(["text"] * 200, probabilities, tuple("abcdefg"))) == 200


# Saving and loading


@few
@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=6),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=4, unique=True),
    seeds,
    st.booleans(),
)
@example(["two\nlines\r\nor three", "🙂 émoji 日本語", " \u2028 \x85 \t", ""], ["a"], 0, True)
def test_load_restores_saved_signals(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], names: list[str], seed: int, has_embeddings: bool
) -> None:
    folder = tmp_path_factory.mktemp("signals") / "a" / "saved"
    embeddings = vectors(seed, 3, len(texts)).T if has_embeddings else None
    saved = TeacherSignals(texts, distributions(seed, len(texts), len(names)), tuple(names), embeddings, "söme origin")
    saved.save(folder)
    loaded = TeacherSignals.load(str(folder))
    assert (loaded.texts, loaded.label_names, loaded.origin) == (saved.texts, saved.label_names, saved.origin)
    assert loaded.probabilities.dtype == np.float32
    np.testing.assert_array_equal(loaded.probabilities, saved.probabilities)
    if embeddings is None:
        assert loaded.embeddings is None
    else:
        np.testing.assert_array_equal(loaded.embeddings, embeddings, strict=True)


def array_bytes(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


VALID_METADATA = {"format": 2, "label_names": VALID.label_names, "origin": "", "embeddings": True, "temperature": 1.0,
                  "task": "single-label"}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("signals.json", None),
        ("signals.json", b"[]"),
        ("signals.json", b"\xff\xfe\x00"),
        ("signals.json", json.dumps({**VALID_METADATA, "format": 99}).encode()),
        ("signals.json", json.dumps({**VALID_METADATA, "label_names": None}).encode()),
        ("texts.jsonl", b'"a"\n"b"\n"c"\n"cut o'),
        ("texts.jsonl", b'"a"\n"b"\n"c"\n'),
        ("texts.jsonl", b"1\n2\n3\n4\n"),
        ("embeddings.npy", b""),
        ("embeddings.npy", array_bytes(EMBEDDINGS)[:-9]),
        ("embeddings.npy", array_bytes(EMBEDDINGS[:2])),
        ("embeddings.npy", array_bytes(np.array(["a"] * 4))),
        ("embeddings.npy", array_bytes(np.array([{}] * 4))),
        ("embeddings.npy", array_bytes(EMBEDDINGS).replace(b"(4, 2)", b"((4, 2")),
    ],
    ids=count(),
)
def test_damaged_folder_is_rejected(tmp_path: Path, file: str, content: bytes | None) -> None:
    folder = tmp_path / "saved"
    VALID.save(folder)
    (folder / "signals.json").write_text(json.dumps(VALID_METADATA))
    TeacherSignals.load(folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(DataError):
        TeacherSignals.load(folder)


def test_save_does_not_overwrite(tmp_path: Path) -> None:
    VALID.save(tmp_path / "saved")
    before = read_tree(tmp_path)
    with pytest.raises(OutputError):
        signals(seed=9).save(tmp_path / "saved")
    assert read_tree(tmp_path) == before


@pytest.fixture
def low_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat arrays of more than 100 bytes as large."""
    monkeypatch.setattr(arrays, "MAX_IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(arrays, "_CHUNK_ROWS", 7)


@pytest.mark.usefixtures("low_memory_limit")
def test_large_embeddings_are_memory_mapped_fp16(tmp_path: Path) -> None:
    rows = vectors(0, 40, 3)
    large = TeacherSignals(["text"] * 40, distributions(0, 40, 2), ("a", "b"), rows)
    large.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "embeddings.npy").stat().st_size < 40 * 3 * 2 + 200
    loaded = TeacherSignals.load(tmp_path / "saved")
    assert isinstance(loaded.embeddings, np.memmap)
    np.testing.assert_array_equal(np.asarray(loaded.embeddings), rows.astype(np.float16), strict=True)
    np.testing.assert_array_equal(loaded.probabilities, large.probabilities, strict=True)


@pytest.mark.usefixtures("low_memory_limit")
def test_file_of_a_large_array_is_deleted_with_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = arrays.allocate_array((40, 3))
    assert array.dtype == np.float16
    array[5] = 1
    view = array[5:]
    del array
    gc.collect()
    np.testing.assert_array_equal(view[0], [1, 1, 1])
    assert len(list(tmp_path.iterdir())) == 1
    del view
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("low_memory_limit")
def test_error_if_the_temporary_folder_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(arrays, "TemporaryDirectory", Mock(side_effect=error))
    with pytest.raises(OutputError, match="Cannot write") as raised:
        arrays.allocate_array((40, 3))
    assert "TMPDIR" in (raised.value.hint or "")


@pytest.mark.usefixtures("low_memory_limit")
def test_non_finite_row_in_a_large_array_is_rejected() -> None:
    rows = with_row(vectors(0, 40, 3), 33, [0, NAN, 0]).astype(np.float16)
    with pytest.raises(DataError, match="Row 34"):
        TeacherSignals(["text"] * 40, distributions(0, 40, 2), ("a", "b"), rows)


# Averages


@few
@given(
    seeds,
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 5), st.floats(0.01, 100)), min_size=1, max_size=4),
    st.booleans(),
)
def test_average_has_weighted_mean_probabilities_and_cosines(
    seed: int, n: int, teachers: list[tuple[int, float]], weighted: bool
) -> None:
    parts = [signals(seed=seed + 2 * i, n=n, d=d) for i, (d, _) in enumerate(teachers)]
    weights = [weight for _, weight in teachers] if weighted else None
    mean = TeacherSignals.average(parts, weights)
    assert mean.embeddings is not None
    assert mean.embeddings.shape == (n, sum(d for d, _ in teachers))
    expected_cosines = np.average([cosines(np.asarray(part.embeddings)) for part in parts], axis=0, weights=weights)
    np.testing.assert_allclose(cosines(mean.embeddings), expected_cosines, atol=1e-5)
    expected = np.average([part.probabilities for part in parts], axis=0, weights=weights)
    np.testing.assert_allclose(mean.probabilities, expected, atol=1e-6)
    assert mean.probabilities.dtype == mean.embeddings.dtype == np.float32
    assert (mean.texts, mean.label_names) == (parts[0].texts, parts[0].label_names)


@pytest.mark.usefixtures("low_memory_limit")
def test_average_of_large_signals_is_memory_mapped() -> None:
    parts = [signals(seed, n=40, d=d) for seed, d in ((0, 3), (2, 4))]
    mean = TeacherSignals.average(parts)
    assert isinstance(mean.embeddings, np.memmap)
    expected = np.mean([cosines(np.asarray(part.embeddings)) for part in parts], axis=0)
    np.testing.assert_allclose(cosines(np.asarray(mean.embeddings, np.float32)), expected, atol=2e-3)


def test_average_has_no_embeddings_if_a_teacher_has_none() -> None:
    mean = TeacherSignals.average([VALID, replace(VALID, embeddings=None, origin="a rule")])
    assert mean.embeddings is None
    assert mean.origin == "a teacher + a rule"


@pytest.mark.parametrize(
    ("teachers", "weights", "message"),
    [
        ([], None, "empty list"),
        ([VALID, replace(VALID, texts=[*VALID.texts[:3], "?"])], None, "different texts or classes"),
        ([VALID, replace(VALID, label_names=VALID.label_names[::-1])], None, "different texts or classes"),
        ([VALID, VALID], [1.0], "2 positive weights"),
        ([VALID, VALID], [1.0, 0.0], "2 positive weights"),
        ([VALID, VALID], [1.0, NAN], "2 positive weights"),
    ],
)
def test_incompatible_signals_are_not_averaged(
    teachers: list[TeacherSignals], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        TeacherSignals.average(teachers, weights)
