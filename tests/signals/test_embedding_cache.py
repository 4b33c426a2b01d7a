"""Embeddings kept on disk: taken from there when nothing has changed, and never in the way."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import FAST, newswire

from setfit_kd import distill, score
from setfit_kd.models import fit_head, load_body, new_model
from setfit_kd.signals import embedding_cache as cache
from setfit_kd.utils import arrays
from setfit_kd.utils.arrays import load_rows, save_rows
from setfit_kd.utils.files import CACHE_VARIABLE, cache_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel


TEXTS = [row["text"] for row in newswire("train")[:9]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where embeddings are kept; not made yet."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept" / "embeddings"


@pytest.fixture
def teacher(student_body: SentenceTransformer) -> SetFitModel:
    model = new_model(student_body, ("a", "b"))
    model.model_head = fit_head(student_body.encode(TEXTS), np.eye(2)[np.arange(len(TEXTS)) % 2])
    return model


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each pass through a body had."""
    from sentence_transformers import SentenceTransformer

    counts: list[int] = []
    encode = SentenceTransformer.encode

    def count(self: SentenceTransformer, texts: Any, **settings: Any) -> Any:
        counts.append(len(texts))
        return encode(self, texts, **settings)

    monkeypatch.setattr(SentenceTransformer, "encode", count)
    return counts


def kept(folder: Path) -> list[Path]:
    """The rows that the cache holds, the oldest first."""
    files = [path for path in folder.rglob("*.npy") if path.is_file()]
    return sorted(files, key=lambda path: path.parent.stat().st_mtime)


def embeddings(teacher: SetFitModel, texts: list[str] | None = None) -> npt.NDArray[np.floating]:
    signals = score(teacher, TEXTS if texts is None else texts, cache=True)
    assert signals.embeddings is not None
    return signals.embeddings


# What is taken from it


def test_the_same_teacher_and_texts_are_embedded_once(teacher: SetFitModel, folder: Path, encoded: list[int]) -> None:
    plain = score(teacher, TEXTS)
    assert not folder.exists()
    encoded.clear()
    for signals in (score(teacher, TEXTS, cache=True), score(teacher, TEXTS, cache=True, encode_batch_size=3)):
        assert signals.texts == TEXTS
        np.testing.assert_array_equal(np.asarray(signals.embeddings), np.asarray(plain.embeddings))
        np.testing.assert_array_equal(signals.probabilities, plain.probabilities)
    assert encoded == [len(TEXTS)]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "used_before",
    [False, True],
)
def test_a_teacher_loaded_anew_is_the_same_teacher(
    teacher: SetFitModel, tiny_student: Path, encoded: list[int], used_before: bool
) -> None:
    embeddings(teacher)
    twin = new_model(load_body(tiny_student), ("a", "b"))
    twin.model_head = teacher.model_head
    if used_before:
        twin.model_body.encode("a text")
    encoded.clear()
    embeddings(twin)
    embeddings(twin)
    assert not encoded


def test_another_head_needs_no_other_embeddings(teacher: SetFitModel, folder: Path, encoded: list[int]) -> None:
    rows = embeddings(teacher)
    teacher.model_head = fit_head(rows, np.eye(2)[np.arange(len(TEXTS)) % 2][::-1])
    embeddings(teacher)
    assert encoded == [len(TEXTS)]


def weight(model: SetFitModel) -> None:
    with torch.no_grad():
        [*_, bias] = [value for name, value in model.model_body.named_parameters() if "output.LayerNorm.bias" in name]
        bias[0] += 1e-4


def length(model: SetFitModel) -> None:
    model.model_body.max_seq_length = 7


def normalise(model: SetFitModel) -> None:
    model.normalize_embeddings = True


def prompt(model: SetFitModel) -> None:
    model.model_body.prompts = {"query": "What of "}
    model.model_body.default_prompt_name = "query"


def pooling(model: SetFitModel) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    model.model_body[1] = Pooling(16, "cls")


def more_modules(model: SetFitModel) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    model.model_body.append(Normalize())


def tokenizer(model: SetFitModel) -> None:
    backend: Any = model.model_body.tokenizer
    backend.backend_tokenizer.normalizer = None  # the vocabulary has no capital letters


def activation(model: SetFitModel) -> None:
    """As another config of the same weights would have it."""
    encoder: Any = model.model_body[0]
    encoder.auto_model.config.hidden_act = "relu"
    for layer in encoder.auto_model.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.ReLU()


@pytest.mark.parametrize("change", [weight, length, normalise, prompt, pooling, more_modules, tokenizer, activation])
def test_another_teacher_embeds_anew(
    teacher: SetFitModel, folder: Path, encoded: list[int], change: Callable[[SetFitModel], None]
) -> None:
    before = embeddings(teacher)
    change(teacher)
    expected = np.asarray(score(teacher, TEXTS).embeddings)
    encoded.clear()
    np.testing.assert_array_equal(embeddings(teacher), expected)
    assert encoded == [len(TEXTS)]
    assert np.abs(expected - before).max() > 0
    assert len(kept(folder)) == 2


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param([*TEXTS[:-1], TEXTS[-1] + "."], id="a text changed"),
        pytest.param([*TEXTS, "more"], id="a text more"),
        pytest.param(TEXTS[:-1], id="a text less"),
        pytest.param(TEXTS[::-1], id="another order"),
        pytest.param([TEXTS[0] + TEXTS[1][:1], TEXTS[1][1:], *TEXTS[2:]], id="another border between texts"),
    ],
)
def test_other_texts_are_embedded_anew(
    teacher: SetFitModel, folder: Path, encoded: list[int], texts: list[str]
) -> None:
    embeddings(teacher)
    expected = np.asarray(score(teacher, texts).embeddings)
    encoded.clear()
    np.testing.assert_array_equal(embeddings(teacher, texts), expected)
    assert encoded == [len(texts)]
    np.testing.assert_array_equal(embeddings(teacher), np.asarray(score(teacher, TEXTS).embeddings))


@pytest.mark.usefixtures("folder")
def test_large_embeddings_are_mapped_from_the_cache(
    teacher: SetFitModel, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "MAPPED_BYTES", 100)
    first, again = embeddings(teacher), embeddings(teacher)
    assert encoded == [len(TEXTS)]
    assert isinstance(again, np.memmap)
    assert again.dtype == np.float16
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))


# What stands there may be anything


def shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def overwritten(file: Path) -> None:
    file.write_bytes(b"not an array" * 50)


def header_open(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"(9, 16)", b"((9, 16"))


def of_objects(file: Path) -> None:
    np.save(file, np.array([{}, []], dtype=object), allow_pickle=True)


def of_integers(file: Path) -> None:
    np.save(file, np.zeros((len(TEXTS), 16), np.int64))


def too_few_rows(file: Path) -> None:
    save_rows(np.zeros((len(TEXTS) - 1, 16), np.float32), file)


def too_flat(file: Path) -> None:
    save_rows(np.zeros(len(TEXTS), np.float32), file)


def too_narrow(file: Path) -> None:
    save_rows(np.zeros((len(TEXTS), 5), np.float32), file)


def not_finite(file: Path) -> None:
    save_rows(np.full((len(TEXTS), 16), np.nan, np.float32), file)


def permuted(file: Path) -> None:
    save_rows(load_rows(file)[::-1], file)


def without_checksum(file: Path) -> None:
    file.with_suffix(".sha256").unlink()


def linked(file: Path) -> None:
    file.symlink_to(file.rename(file.parents[3] / "elsewhere.npy"))


def linked_folder(file: Path) -> None:
    file.parent.symlink_to(file.parent.rename(file.parents[3] / "elsewhere"))


def gone(file: Path) -> None:
    file.unlink()


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_file_for_the_folder(file: Path) -> None:
    shutil.rmtree(file.parent)
    file.parent.write_text("mine")


@pytest.mark.parametrize(
    "damage",
    [
        shortened,
        emptied,
        overwritten,
        header_open,
        of_objects,
        of_integers,
        too_few_rows,
        too_flat,
        too_narrow,
        not_finite,
        permuted,
        without_checksum,
        linked,
        linked_folder,
        gone,
        a_folder,
        a_file_for_the_folder,
    ],
)
def test_a_file_that_is_not_right_is_replaced(
    teacher: SetFitModel,
    folder: Path,
    encoded: list[int],
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = embeddings(teacher).copy()
    [file] = kept(folder)
    assert not caplog.text
    damage(file)
    np.testing.assert_array_equal(embeddings(teacher), expected)
    assert len(encoded) == 2
    assert f"Cached embeddings in {file.parent} cannot be used" in caplog.text
    assert not any(path.is_symlink() for path in (file, file.parent))
    assert all(path.exists() for path in folder.parents[1].glob("elsewhere*"))
    np.testing.assert_array_equal(load_rows(file), expected)
    np.testing.assert_array_equal(embeddings(teacher), expected)
    assert len(encoded) == 2


def test_any_damage_to_a_file_is_survived(teacher: SetFitModel, folder: Path) -> None:
    embeddings(teacher)
    [file] = kept(folder)
    good, rng = file.read_bytes(), random.Random(0)
    for _ in range(40):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 2, 5])):
            bad[rng.randrange(128)] = rng.choice(b"()' 9\n\x00\xff")
        file.write_bytes(bad)
        assert embeddings(teacher).shape == (len(TEXTS), 16)


# What it may not do


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refused(*_: Any, **__: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(("name", "failure"), [("save_rows", full), ("save_rows", refused), ("_prune", refused)])
def test_a_disk_that_cannot_be_written_does_not_matter(
    teacher: SetFitModel, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, failure: Callable[..., None]
) -> None:
    expected = np.asarray(score(teacher, TEXTS).embeddings)
    monkeypatch.setattr(cache, name, failure)
    np.testing.assert_array_equal(embeddings(teacher), expected)
    if name == "save_rows":
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("place", ["kept", "kept/embeddings"])
def test_a_file_in_the_folders_place_does_not_matter(teacher: SetFitModel, folder: Path, place: str) -> None:
    file = folder.parent.parent / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    expected = np.asarray(score(teacher, TEXTS).embeddings)
    np.testing.assert_array_equal(embeddings(teacher), expected)
    assert file.read_text() == "mine"


def test_a_cache_that_may_only_be_read_is_read(
    teacher: SetFitModel, folder: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings(teacher)
    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(cache, "save_rows", refused)
    embeddings(teacher)
    assert len(encoded) == 1


# What it may hold


def test_what_was_not_used_for_longest_goes_first(
    teacher: SetFitModel, folder: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[text] for text in TEXTS[:5]]
    places: list[Path] = []
    for age, part in enumerate(texts[:4]):
        embeddings(teacher, part)
        [place] = {file.parent for file in kept(folder)} - set(places)
        places.append(place)
        os.utime(place, (1000 + age, 1000 + age))
    size = cache.cache_bytes() // 4
    embeddings(teacher, texts[0])  # used just now
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size)
    embeddings(teacher, texts[4])
    assert [place.exists() for place in places] == [True, False, False, True]
    assert len(kept(folder)) == 3
    encoded.clear()
    for part in (texts[0], texts[3], texts[4]):
        embeddings(teacher, part)
    assert not encoded


def test_what_is_too_large_alone_is_not_kept_and_drives_nothing_out(
    teacher: SetFitModel, folder: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = embeddings(teacher, TEXTS[:3])
    monkeypatch.setattr(cache, "MAX_BYTES", small.nbytes)
    embeddings(teacher)
    assert len(kept(folder)) == 1
    embeddings(teacher, TEXTS[:3])
    assert encoded == [3, len(TEXTS)]


def test_pruning_takes_nothing_that_is_not_its_own(
    teacher: SetFitModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "b.txt").write_text("mine")
    (folder.parent / "c.txt").write_text("mine")
    (folder / "embeddings" / ".part").mkdir(parents=True)  # as another process is just writing it
    (folder / "embeddings" / ".part" / "embeddings.npy").write_text("half")
    monkeypatch.setattr(cache, "MAX_BYTES", embeddings(teacher).nbytes + 200)
    embeddings(teacher, TEXTS[1:])
    assert len(kept(folder)) == 2
    assert {file.name for file in folder.parent.rglob("*") if file.is_file()} == {
        *("a.txt", "b.txt", "c.txt", "embeddings.npy", "embeddings.sha256")
    }


def test_unfinished_entries_are_counted_and_go_after_an_hour(teacher: SetFitModel, folder: Path) -> None:
    ages = {f".{'0' * 32}.{'0' * 8}": 7200, f".{'0' * 32}.{'1' * 8}": 60, ".notes": 7200}
    for name, age in ages.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "embeddings.npy").write_bytes(bytes(100))
        for path in (folder / name / "embeddings.npy", folder / name):
            os.utime(path, (time.time() - age,) * 2)
    assert cache.cache_bytes() == 200
    embeddings(teacher)
    assert [(folder / name).exists() for name in ages] == [False, True, True]


# Where it is


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({CACHE_VARIABLE: "/named", "XDG_CACHE_HOME": "/xdg"}, "/named"),
        ({CACHE_VARIABLE: "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/setfit-kd"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/setfit-kd"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/setfit-kd"),
        ({}, "/home/me/.cache/setfit-kd"),
    ],
)
def test_the_environment_decides_the_folder(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_another_version_of_a_library_embeds_anew(
    teacher: SetFitModel, folder: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings(teacher)
    monkeypatch.setattr(cache, "version", lambda library: "99" if library == "torch" else "1")
    embeddings(teacher)
    assert encoded == [len(TEXTS)] * 2
    assert len(kept(folder)) == 2


def test_a_user_without_a_home_has_no_cache(
    teacher: SetFitModel, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert (cache_folder(), cache.cache_bytes()) == (None, 0)
    embeddings(teacher)
    embeddings(teacher)
    assert encoded == [len(TEXTS)] * 2


def test_a_run_keeps_its_teachers_embeddings_unless_told_not_to(tiny_teacher: Path, folder: Path) -> None:
    def small_run(cache: bool) -> Any:
        settings = {**FAST, "pool_size": 64, "eval": None, "cache": cache}
        return distill(
            "bundled:newswire", "bundled:newswire", teacher=str(tiny_teacher), student="layers:1", **settings
        )

    without = small_run(False)
    assert not folder.parent.exists()
    small_run(True)
    [file] = kept(folder)
    assert load_rows(file).shape == (64 + 32, 32)
    again = small_run(True)  # the same seed trains the same teacher
    assert kept(folder) == [file]
    np.testing.assert_array_equal(again.signals.probabilities, without.signals.probabilities)
