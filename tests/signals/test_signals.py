"""Signals: what they refuse, what survives a folder, and what an average of teachers means."""

from __future__ import annotations

import errno
import gc
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from setfit_kd import TeacherSignals
from setfit_kd.errors import DataError, OutputError
from setfit_kd.utils import arrays

Floats = npt.NDArray[np.float32]

few = settings(max_examples=30, deadline=None)
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


NAN, INF = float("nan"), float("inf")
GOOD = signals()
GOOD_P, GOOD_E = GOOD.probabilities, vectors(1, 4, 2)


# What is refused


@pytest.mark.parametrize(
    ("probabilities", "embeddings", "message"),
    [
        pytest.param(GOOD_P[:3], None, r"shape \(4, 3\), not \(3, 3\)", id="a row too few"),
        pytest.param(GOOD_P[:, :2], None, r"shape \(4, 3\), not \(4, 2\)", id="a class too few"),
        pytest.param(GOOD_P[:, 0], None, r"shape \(4, 3\), not \(4,\)", id="hard labels"),
        pytest.param(with_row(GOOD_P, 2, [0.5, 0.5, 0.5]), None, "row 3: .*0.5, 0.5, 0.5", id="sum above 1"),
        pytest.param(with_row(GOOD_P, 0, [0.1, 0.1, 0.1]), None, "row 1:", id="sum below 1"),
        pytest.param(with_row(GOOD_P, 3, [NAN, 0.5, 0.5]), None, "row 4:", id="nan"),
        pytest.param(with_row(GOOD_P, 1, [INF, 0, 0]), None, "row 2:", id="infinite"),
        pytest.param(with_row(GOOD_P, 1, [1.5, -0.5, 0]), None, "row 2:", id="negative"),
        pytest.param(np.zeros_like(GOOD_P), None, r"row 1: .*\(4 such rows\)", id="all of them"),
        pytest.param(GOOD_P, GOOD_E[:3], r"embeddings of shape \(4, d\), not \(3, 2\)", id="an embedding too few"),
        pytest.param(GOOD_P, GOOD_E[:, 0], r"embeddings of shape \(4, d\), not \(4,\)", id="flat embeddings"),
        pytest.param(GOOD_P, with_row(GOOD_E, 2, [NAN, 1]), "row 3: the embedding", id="embedding nan"),
        pytest.param(GOOD_P, with_row(GOOD_E, 0, [1, -INF]), "row 1: the embedding", id="embedding infinite"),
    ],
)
def test_parts_that_do_not_fit_are_refused(probabilities: Floats, embeddings: Floats | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TeacherSignals(GOOD.texts, probabilities, GOOD.label_names, embeddings)


def test_rounding_to_half_precision_is_no_reason_to_refuse() -> None:
    probabilities = distributions(0, 200, 7).astype(np.float16).astype(np.float32)
    names = tuple("abcdefg")
    assert len(TeacherSignals(["text"] * 200, probabilities, names)) == 200


def test_embeddings_are_optional_and_length_is_the_number_of_texts() -> None:
    bare = TeacherSignals(GOOD.texts, GOOD_P, GOOD.label_names)
    assert bare.embeddings is None
    assert len(bare) == 4


# To a folder and back


@few
@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=6),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=4, unique=True),
    seeds,
    st.booleans(),
)
def test_a_folder_gives_back_exactly_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], names: list[str], seed: int, bare: bool
) -> None:
    folder = tmp_path_factory.mktemp("signals") / "saved"
    embeddings = None if bare else vectors(seed, len(texts), 3)
    saved = TeacherSignals(texts, distributions(seed, len(texts), len(names)), tuple(names), embeddings, "söme origin")
    saved.save(folder)
    read = TeacherSignals.load(str(folder))
    assert (read.texts, read.label_names, read.origin) == (saved.texts, saved.label_names, saved.origin)
    assert read.probabilities.dtype == np.float32
    np.testing.assert_array_equal(read.probabilities, saved.probabilities)
    if embeddings is None:
        assert read.embeddings is None
    else:
        np.testing.assert_array_equal(read.embeddings, embeddings, strict=True)


def test_texts_of_several_lines_and_of_emoji_survive(tmp_path: Path) -> None:
    texts = ["two\nlines\r\nor three", "🙂 émoji 日本語", " \u2028 \x85 \t", ""]
    TeacherSignals(texts, GOOD_P, GOOD.label_names).save(tmp_path / "saved")
    assert TeacherSignals.load(tmp_path / "saved").texts == texts


def test_arrays_that_are_not_contiguous_survive(tmp_path: Path) -> None:
    wide = vectors(0, 5, 4).T
    TeacherSignals(GOOD.texts, GOOD_P[::-1], GOOD.label_names, wide).save(tmp_path / "saved")
    read = TeacherSignals.load(tmp_path / "saved")
    np.testing.assert_array_equal(read.embeddings, wide)
    np.testing.assert_array_equal(read.probabilities, GOOD_P[::-1])


def array_bytes(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _drop_last_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _write(content: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def _about(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return write


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param("signals.json", Path.unlink, id="no description"),
        pytest.param("texts.jsonl", Path.unlink, id="no texts"),
        pytest.param("probabilities.npy", Path.unlink, id="no probabilities"),
        pytest.param("embeddings.npy", Path.unlink, id="no embeddings"),
        pytest.param("signals.json", _cut, id="description cut off"),
        pytest.param("texts.jsonl", _cut, id="texts cut off"),
        pytest.param("texts.jsonl", _drop_last_line, id="a text lost"),
        pytest.param("probabilities.npy", _cut, id="probabilities cut off"),
        pytest.param("embeddings.npy", _cut, id="embeddings cut off"),
        pytest.param("embeddings.npy", _write(b""), id="embeddings empty"),
        pytest.param("embeddings.npy", _write(b"PK\x03\x04 something else"), id="embeddings foreign"),
        pytest.param("embeddings.npy", _write(array_bytes(GOOD_E[:2])), id="embeddings of another pool"),
        pytest.param("embeddings.npy", _write(array_bytes(np.array(["a"] * 4))), id="embeddings not numbers"),
        pytest.param("embeddings.npy", _write(array_bytes(np.array([{}] * 4))), id="embeddings a pickle"),
        pytest.param("probabilities.npy", _write(array_bytes(GOOD_P[:2])), id="probabilities of another pool"),
        pytest.param("signals.json", _write("{}"), id="description empty"),
        pytest.param("signals.json", _write("[]"), id="description a list"),
        pytest.param("signals.json", _write("null"), id="description null"),
        pytest.param("signals.json", _write(b"\xff\xfe\x00"), id="description binary"),
        pytest.param("signals.json", _about(format=99), id="a later format"),
        pytest.param("signals.json", _about(label_names=None), id="no names"),
        pytest.param("signals.json", _about(label_names=["one"]), id="other names"),
        pytest.param("texts.jsonl", _write("plain text\n" * 4), id="texts not json"),
        pytest.param("texts.jsonl", _write("1\n2\n3\n4\n"), id="texts not texts"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "saved"
    GOOD.save(folder)
    damage(folder / file)
    with pytest.raises(DataError):
        TeacherSignals.load(folder)


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_a_place_without_signals_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=name):
        TeacherSignals.load(tmp_path / name)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    GOOD.save(folder)
    with pytest.raises(OutputError):
        signals(seed=9).save(folder)
    np.testing.assert_array_equal(TeacherSignals.load(folder).probabilities, GOOD_P)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(OutputError):
        GOOD.save(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_missing_parents_are_made_and_no_temporary_stays(tmp_path: Path) -> None:
    GOOD.save(tmp_path / "a" / "b" / "saved")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["saved"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("setfit_kd.signals.signals.save_rows", full)
    with pytest.raises(OutputError, match="ENOSPC"):
        GOOD.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of more than 100 bytes count as large."""
    monkeypatch.setattr(arrays, "MAPPED_BYTES", 100)
    monkeypatch.setattr(arrays, "_PART_ROWS", 7)


@pytest.mark.usefixtures("small_memory")
def test_large_embeddings_are_kept_in_half_precision_and_mapped(tmp_path: Path) -> None:
    rows = vectors(0, 40, 3)
    large = TeacherSignals(["text"] * 40, distributions(0, 40, 2), ("a", "b"), rows)
    large.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "embeddings.npy").stat().st_size < 40 * 3 * 2 + 200
    read = TeacherSignals.load(tmp_path / "saved")
    assert isinstance(read.embeddings, np.memmap)
    np.testing.assert_array_equal(np.asarray(read.embeddings), rows.astype(np.float16), strict=True)
    np.testing.assert_array_equal(read.probabilities, large.probabilities, strict=True)
    read.save(tmp_path / "again")
    np.testing.assert_array_equal(
        np.asarray(read.embeddings), np.asarray(TeacherSignals.load(tmp_path / "again").embeddings)
    )


@pytest.mark.usefixtures("small_memory")
def test_a_large_array_is_filled_on_disk_and_its_file_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    tmp_path = tmp_path / "scratch"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = arrays.large_array((40, 3))
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


@pytest.mark.usefixtures("small_memory")
def test_a_temporary_folder_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrays, "TemporaryDirectory", full)
    with pytest.raises(OutputError, match="Cannot write") as error:
        arrays.large_array((40, 3))
    assert "TMPDIR" in (error.value.hint or "")


@pytest.mark.usefixtures("small_memory")
def test_a_row_that_is_not_finite_is_found_in_a_large_array() -> None:
    rows = with_row(vectors(0, 40, 3), 33, [0, NAN, 0]).astype(np.float16)
    with pytest.raises(DataError, match="row 34"):
        TeacherSignals(["text"] * 40, distributions(0, 40, 2), ("a", "b"), rows)


def test_saved_signals_can_be_moved(tmp_path: Path) -> None:
    GOOD.save(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert TeacherSignals.load(tmp_path / "there").texts == GOOD.texts


# Averages


@few
@given(
    seeds,
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 5), st.floats(0.01, 100)), min_size=1, max_size=4),
    st.booleans(),
)
def test_an_average_has_the_weighted_mean_of_cosines_and_probabilities(
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


@pytest.mark.usefixtures("small_memory")
def test_an_average_of_large_signals_is_kept_on_disk() -> None:
    parts = [signals(seed, n=40, d=d) for seed, d in ((0, 3), (2, 4))]
    mean = TeacherSignals.average(parts)
    assert isinstance(mean.embeddings, np.memmap)
    expected = np.mean([cosines(np.asarray(part.embeddings)) for part in parts], axis=0)
    np.testing.assert_allclose(cosines(np.asarray(mean.embeddings, np.float32)), expected, atol=2e-3)


def test_an_average_does_not_depend_on_a_teachers_scale() -> None:
    one, two = signals(0), signals(10)
    loud = TeacherSignals(two.texts, two.probabilities, two.label_names, np.asarray(two.embeddings) * 1000)
    quiet_mean, loud_mean = (TeacherSignals.average([one, other]).embeddings for other in (two, loud))
    np.testing.assert_allclose(cosines(np.asarray(quiet_mean)), cosines(np.asarray(loud_mean)), atol=1e-5)


def test_an_average_with_a_teacher_without_embeddings_has_none() -> None:
    bare = TeacherSignals(GOOD.texts, GOOD_P, GOOD.label_names, origin="a rule")
    mean = TeacherSignals.average([GOOD, bare])
    assert mean.embeddings is None
    assert mean.origin == "a teacher + a rule"


@pytest.mark.parametrize(
    ("other", "weights"),
    [
        pytest.param(TeacherSignals([*GOOD.texts[:3], "?"], GOOD_P, GOOD.label_names), None, id="other texts"),
        pytest.param(TeacherSignals(GOOD.texts[::-1], GOOD_P, GOOD.label_names), None, id="another order"),
        pytest.param(TeacherSignals(GOOD.texts, GOOD_P, GOOD.label_names[::-1]), None, id="other classes"),
        pytest.param(signals(n=3), None, id="fewer texts"),
        pytest.param(signals(classes=2), None, id="fewer classes"),
        pytest.param(GOOD, [1.0], id="a weight too few"),
        pytest.param(GOOD, [1.0, 0.0], id="weight zero"),
        pytest.param(GOOD, [2.0, -1.0], id="negative weight"),
        pytest.param(GOOD, [1.0, NAN], id="weight nan"),
    ],
)
def test_what_cannot_be_averaged_is_refused(other: TeacherSignals, weights: list[float] | None) -> None:
    with pytest.raises(DataError):
        TeacherSignals.average([GOOD, other], weights)
