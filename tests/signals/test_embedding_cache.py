"""Tests of the embedding cache: when it is used, and that its problems never fail a run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checks import truncate_file
from conftest import FAST, newswire

from setfit_kd import distill, score
from setfit_kd.models.bodies import load_body
from setfit_kd.models.heads import fit_head
from setfit_kd.models.io import new_model
from setfit_kd.signals import embedding_cache as cache
from setfit_kd.utils import arrays
from setfit_kd.utils.arrays import load_rows
from setfit_kd.utils.files import CACHE_VARIABLE, cache_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

TEXTS = [row["text"] for row in newswire("train")[:9]]


@pytest.fixture
def folder() -> Path:
    """Folder of the cached embeddings, which does not exist yet."""
    return Path(os.environ[CACHE_VARIABLE]) / "embeddings"


@pytest.fixture
def teacher(student_body: SentenceTransformer) -> SetFitModel:
    model = new_model(student_body, ("a", "b"))
    model.model_head = fit_head(student_body.encode(TEXTS), np.eye(2)[np.arange(len(TEXTS)) % 2])
    return model


@pytest.fixture
def encode_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of texts in each call of `encode_tokens`."""
    from setfit_kd.models import encode as encode_module

    counts: list[int] = []
    encode_tokens = encode_module.encode_tokens

    def count(forward: Any, tokens: Any, *limits: Any, **options: Any) -> Any:
        counts.append(len(tokens))
        return encode_tokens(forward, tokens, *limits, **options)

    monkeypatch.setattr(encode_module, "encode_tokens", count)
    return counts


def cached_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.npy") if path.is_file()]


def embeddings(teacher: SetFitModel, texts: list[str] | None = None, *, use_cache: bool = True) -> npt.NDArray[Any]:
    signals = score(teacher, TEXTS if texts is None else texts, cache=use_cache)
    return np.asanyarray(signals.embeddings)


def test_equal_teacher_and_texts_are_embedded_once(
    teacher: SetFitModel, folder: Path, tiny_student: Path, encode_calls: list[int]
) -> None:
    uncached = score(teacher, TEXTS)
    assert not folder.exists()
    reloaded = new_model(load_body(tiny_student), ("a", "b"))
    reloaded.model_head = fit_head(np.asarray(uncached.embeddings), np.eye(2)[np.arange(len(TEXTS)) % 2])
    reloaded.model_body.encode("a text")
    encode_calls.clear()
    for signals in (score(teacher, TEXTS, cache=True), score(teacher, TEXTS, cache=True, encode_batch_size=3)):
        assert signals.texts == TEXTS
        np.testing.assert_array_equal(np.asarray(signals.embeddings), np.asarray(uncached.embeddings))
        np.testing.assert_array_equal(signals.probabilities, uncached.probabilities)
    embeddings(reloaded)
    assert encode_calls == [len(TEXTS)]


def change_weight(model: SetFitModel) -> None:
    with torch.no_grad():
        [*_, bias] = [value for name, value in model.model_body.named_parameters() if "output.LayerNorm.bias" in name]
        bias[0] += 1e-4


def change_normalization(model: SetFitModel) -> None:
    model.normalize_embeddings = True


@pytest.mark.parametrize("change", [change_weight, change_normalization])
def test_changed_teacher_embeds_again(
    teacher: SetFitModel, folder: Path, encode_calls: list[int], change: Callable[[SetFitModel], None]
) -> None:
    before = embeddings(teacher)
    change(teacher)
    expected = embeddings(teacher, use_cache=False)
    encode_calls.clear()
    np.testing.assert_array_equal(embeddings(teacher), expected)
    assert encode_calls == [len(TEXTS)]
    assert np.abs(expected - before).max() > 0
    assert len(cached_files(folder)) == 2


@pytest.mark.parametrize(
    "texts", [TEXTS[::-1], [TEXTS[0] + TEXTS[1][:1], TEXTS[1][1:], *TEXTS[2:]]], ids=["order", "boundary"]
)
def test_other_texts_are_embedded_again(teacher: SetFitModel, encode_calls: list[int], texts: list[str]) -> None:
    embeddings(teacher)
    expected = embeddings(teacher, texts, use_cache=False)
    encode_calls.clear()
    np.testing.assert_array_equal(embeddings(teacher, texts), expected)
    assert encode_calls == [len(texts)]


def test_large_cached_embeddings_are_memory_mapped(
    teacher: SetFitModel, encode_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "MAX_IN_MEMORY_BYTES", 100)
    computed, cached = embeddings(teacher), embeddings(teacher)
    assert encode_calls == [len(TEXTS)]
    assert isinstance(cached, np.memmap)
    assert cached.dtype == np.float16
    np.testing.assert_array_equal(np.asarray(computed), np.asarray(cached))


def replace_file_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_folder_by_file(file: Path) -> None:
    shutil.rmtree(file.parent)
    file.parent.write_text("other content")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate_file,
    "without checksum": lambda file: file.with_suffix(".sha256").unlink(),
    "link": lambda file: file.symlink_to(file.rename(file.parents[2] / "elsewhere.npy")),
    "link to a folder": lambda file: file.parent.symlink_to(file.parent.rename(file.parents[2] / "elsewhere")),
    "folder": replace_file_by_folder,
    "file": replace_folder_by_file,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entry_is_replaced(
    teacher: SetFitModel,
    folder: Path,
    encode_calls: list[int],
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = embeddings(teacher).copy()
    [file] = cached_files(folder)
    assert not caplog.text
    damage(file)
    np.testing.assert_array_equal(embeddings(teacher), expected)
    assert f"Cannot use the cached embeddings in {file.parent}" in caplog.text
    assert not any(path.is_symlink() for path in (file, file.parent))
    assert all(path.exists() for path in folder.parent.glob("elsewhere*"))
    np.testing.assert_array_equal(load_rows(file), expected)
    np.testing.assert_array_equal(embeddings(teacher), expected)
    assert len(encode_calls) == 2


@pytest.mark.parametrize(("name", "n_embedded"), [("save_rows", 2), ("_prune", 1), ("os.utime", 1)])
def test_cache_that_cannot_be_written_is_read(
    teacher: SetFitModel, encode_calls: list[int], monkeypatch: pytest.MonkeyPatch, name: str, n_embedded: int
) -> None:
    expected = embeddings(teacher, use_cache=False)
    encode_calls.clear()
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(f"setfit_kd.signals.embedding_cache.{name}", Mock(side_effect=error))
    for _ in range(2):
        np.testing.assert_array_equal(embeddings(teacher), expected)
    assert len(encode_calls) == n_embedded


def test_file_at_the_path_of_the_cache_does_not_fail(teacher: SetFitModel, folder: Path) -> None:
    folder.write_text("other content")
    np.testing.assert_array_equal(embeddings(teacher), embeddings(teacher, use_cache=False))
    assert folder.read_text() == "other content"


def test_least_recently_used_entries_are_removed_first(
    teacher: SetFitModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[text] for text in TEXTS[:5]]
    entries: list[Path] = []
    for age, part in enumerate(texts[:4]):
        embeddings(teacher, part)
        [entry] = {file.parent for file in cached_files(folder)} - set(entries)
        entries.append(entry)
        os.utime(entry, (1000 + age, 1000 + age))
    size = cache.cache_bytes() // 4
    embeddings(teacher, texts[0])  # used just now
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size)
    embeddings(teacher, texts[4])
    assert [entry.exists() for entry in entries] == [True, False, False, True]
    assert len(cached_files(folder)) == 3


def test_too_large_embeddings_are_not_cached(
    teacher: SetFitModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", embeddings(teacher, TEXTS[:3]).nbytes)
    embeddings(teacher)
    assert len(cached_files(folder)) == 1


def test_pruning_removes_unfinished_entries_and_keeps_other_files(
    teacher: SetFitModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = folder / f".{'0' * 32}.{'0' * 8}"
    for file in (folder / "notes" / "a.txt", folder / "b.txt", folder / ".part" / "c.npy", unfinished / "d.npy"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(100))
    os.utime(unfinished, (1000, 1000))
    assert cache.cache_bytes() == 100
    monkeypatch.setattr(cache, "MAX_BYTES", embeddings(teacher).nbytes + 200)
    embeddings(teacher, TEXTS[1:])
    names = {file.name for file in folder.rglob("*") if file.is_file()}
    assert names == {"a.txt", "b.txt", "c.npy", "embeddings.npy", "embeddings.sha256"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({CACHE_VARIABLE: "/named", "XDG_CACHE_HOME": "/xdg"}, "/named"),
        ({CACHE_VARIABLE: "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/setfit-kd"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/setfit-kd"),
    ],
)
def test_environment_selects_the_folder(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_other_library_version_embeds_again(
    teacher: SetFitModel, encode_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings(teacher)
    monkeypatch.setattr(cache, "version", lambda library: "99" if library == "torch" else "1")
    embeddings(teacher)
    assert encode_calls == [len(TEXTS)] * 2


def test_no_cache_without_home_folder(
    teacher: SetFitModel, encode_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert (cache_folder(), cache.cache_bytes()) == (None, 0)
    embeddings(teacher)
    embeddings(teacher)
    assert encode_calls == [len(TEXTS)] * 2


def test_run_caches_embeddings_unless_disabled(tiny_teacher: Path, folder: Path) -> None:
    def small_run(cache: bool) -> Any:
        settings = {**FAST, "teacher": str(tiny_teacher), "student": "layers:1", "pool_size": 64, "cache": cache}
        return distill("bundled:newswire", "bundled:newswire", **settings)

    uncached = small_run(False)
    assert not folder.exists()
    cached = small_run(True)  # the same seed trains the same teacher
    [file] = cached_files(folder)
    assert load_rows(file).shape == (64 + 32, 32)
    np.testing.assert_array_equal(cached.signals.probabilities, uncached.signals.probabilities)
