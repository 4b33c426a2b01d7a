"""Bundles in use: what `Classifier` says, what it refuses, and that it runs by itself."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from conftest import newswire
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tokenizers import Tokenizer

from setfit_kd.export import export_bundle
from setfit_kd.models import embed, load_body, new_head, new_model, static_body
from setfit_kd.runtime import BundleError, Classifier, Prediction
from setfit_kd.runtime.classify import read_safetensors

Floats = npt.NDArray[np.float32]
Damage = Callable[[Path], None]

NEWS = [row["text"] for row in newswire("train")]
TEXTS = [*NEWS[:40], "", " ", "goal", "Ünïcödé, 東京 and 🙂", "tab\tand\r\nnew line", " ".join(NEWS[:9]), NEWS[0]]
LABELS = ["World", "Übermorgen", "a, b", "two\nlines"]
KINDS = ["static", "normalized", "onnx"]
FILES = {
    "static": ("labels.json", "tokenizer.json", "embeddings.safetensors", "head.safetensors"),
    "onnx": ("labels.json", "tokenizer.json", "model.onnx"),
}

few = settings(max_examples=30, deadline=None)


# Bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> dict[str, Path]:
    """A bundle of each kind: a static one, one that scales means to length 1, a transformer. None may be changed."""
    transformer = load_body(tiny_student)
    static = static_body(transformer, NEWS[:100], dimension=8)
    folder = tmp_path_factory.mktemp("bundles")
    for kind in KINDS:
        body = transformer if kind == "onnx" else static
        model: Any = new_model(body, LABELS)
        model.normalize_embeddings = kind == "normalized"
        embeddings = embed(body, NEWS[:100], normalize=model.normalize_embeddings)
        head = new_head()
        width = embeddings.shape[1]
        head.classes_, head.n_features_in_ = np.arange(4), width
        head.coef_ = np.random.default_rng(0).normal(size=(4, width)) / embeddings.std(axis=0) / np.sqrt(width)
        head.intercept_ = -head.coef_ @ embeddings.mean(axis=0)
        model.model_head = head
        format_ = "onnx" if kind == "onnx" else "static"
        export_bundle(model, folder / kind, texts=NEWS[:20], format=format_, min_agreement=0.9)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def classifiers(bundles: dict[str, Path]) -> dict[str, Classifier]:
    return {kind: Classifier(folder) for kind, folder in bundles.items()}


@pytest.fixture
def copied(bundles: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A bundle of a kind that may be changed."""
    return lambda kind: Path(shutil.copytree(bundles[kind], tmp_path / "copy"))


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def write_manifest(folder: Path, content: object) -> None:
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")


def put(folder: Path, name: str, content: bytes) -> None:
    """Write a file, and its hash into the manifest."""
    (folder / name).write_bytes(content)
    manifest = manifest_of(folder)
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    write_manifest(folder, manifest)


# Answers


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_rows_that_sum_to_one(classifiers: dict[str, Classifier], kind: str) -> None:
    found = classifiers[kind].predict_proba(TEXTS)
    assert found.shape == (len(TEXTS), 4)
    assert found.dtype == np.float32
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert len(set(found.argmax(axis=1))) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_predict_and_stream_say_what_the_probabilities_say(classifiers: dict[str, Classifier], kind: str) -> None:
    classifier = classifiers[kind]
    assert classifier.labels == LABELS
    found = classifier.predict_proba(TEXTS)
    labels = [LABELS[column] for column in found.argmax(axis=1)]
    assert classifier.predict(TEXTS) == labels
    for at_once in (1, 7, len(TEXTS), 1000):
        said = list(classifier.stream(iter(TEXTS), at_once=at_once))
        assert all(isinstance(prediction, Prediction) for prediction in said)
        assert [prediction.text for prediction in said] == TEXTS
        assert [prediction.label for prediction in said] == labels
        np.testing.assert_allclose([prediction.probability for prediction in said], found.max(axis=1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_texts_give_no_rows_and_no_text_gives_a_row(classifiers: dict[str, Classifier], kind: str) -> None:
    classifier = classifiers[kind]
    assert classifier.predict_proba([]).shape == (0, 4)
    assert classifier.predict_proba([]).dtype == np.float32
    assert classifier.predict([]) == []
    assert list(classifier.stream([])) == []
    alone = classifier.predict_proba([""])
    assert np.isfinite(alone).all()
    assert alone.sum() == pytest.approx(1, abs=1e-5)


def test_a_static_text_without_tokens_is_classified_by_the_intercept(
    bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    for kind in ("static", "normalized"):
        intercept = safetensors.numpy.load_file(bundles[kind] / "head.safetensors")["intercept"]
        exponents = np.exp(intercept - intercept.max())
        none, _, blank = classifiers[kind].predict_proba(["", "goal", "   "])
        np.testing.assert_allclose([none, blank], [exponents / exponents.sum()] * 2, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", ["predict", "predict_proba"])
def test_a_single_string_is_no_list_of_texts(classifiers: dict[str, Classifier], kind: str, function: str) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        getattr(classifiers[kind], function)("Rain stops play")


@pytest.mark.parametrize("at_once", [0, -1])
def test_to_stream_none_at_once_is_refused(classifiers: dict[str, Classifier], at_once: int) -> None:
    with pytest.raises(ValueError, match="at_once"):
        next(classifiers["static"].stream(TEXTS, at_once=at_once))


@pytest.mark.parametrize("numbers", [{"threads": 0}, {"threads": -1}, {"batch_size": 0}])
def test_none_at_a_time_is_refused(bundles: dict[str, Path], numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Classifier(bundles["static"], **numbers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 5])
def test_an_endless_stream_is_read_no_further_than_needed(
    classifiers: dict[str, Classifier], kind: str, at_once: int
) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for text in itertools.cycle(TEXTS):
            read += 1
            yield text

    stream = classifiers[kind].stream(endless(), at_once=at_once)
    assert read == 0
    for asked in range(1, 2 * len(TEXTS)):
        assert next(stream).text == TEXTS[(asked - 1) % len(TEXTS)]
        assert asked <= read < asked + at_once


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_the_size_of_batches_changes_nothing(bundles: dict[str, Path], kind: str, batch_size: int) -> None:
    expected = Classifier(bundles[kind], batch_size=len(TEXTS)).predict_proba(TEXTS)
    found = Classifier(bundles[kind], batch_size=batch_size).predict_proba(TEXTS)
    if kind == "onnx":
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_more_texts_than_are_sorted_at_once_keep_their_order(
    classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expected = classifiers[kind].predict_proba(TEXTS)
    monkeypatch.setattr("setfit_kd.runtime.classify._WINDOW", 6)
    np.testing.assert_allclose(classifiers[kind].predict_proba(TEXTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_thread_gives_what_many_give(
    bundles: dict[str, Path], classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # Set first, so that what the classifier sets is taken back.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    expected = classifiers[kind].predict_proba(TEXTS)
    np.testing.assert_allclose(Classifier(bundles[kind], threads=1).predict_proba(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_many_threads_share_a_classifier(classifiers: dict[str, Classifier], kind: str) -> None:
    classifier = classifiers[kind]
    parts = [TEXTS[start : start + 9] for start in range(16)]
    expected = [classifier.predict_proba(part) for part in parts]
    together = threading.Barrier(len(parts))

    def work(part: list[str]) -> list[Floats]:
        together.wait(timeout=60)
        return [classifier.predict_proba(part) for _ in range(5)]

    with ThreadPoolExecutor(len(parts)) as pool:
        for rows, found in zip(expected, pool.map(work, parts), strict=True):
            for again in found:
                np.testing.assert_allclose(again, rows, rtol=0, atol=1e-5)


texts_of_any_kind = st.lists(st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)), max_size=12)


@few
@given(texts=texts_of_any_kind, data=st.data())
@pytest.mark.parametrize("kind", ["static", "normalized"])
def test_order_and_parts_never_change_static_answers(
    classifiers: dict[str, Classifier], kind: str, texts: list[str], data: st.DataObject
) -> None:
    classifier = classifiers[kind]
    expected = classifier.predict_proba(texts)
    order = data.draw(st.permutations(range(len(texts))))
    cut = data.draw(st.integers(0, len(texts)))
    shuffled = classifier.predict_proba([texts[row] for row in order])
    parts = np.concatenate([classifier.predict_proba(texts[:cut]), classifier.predict_proba(texts[cut:])])
    # A product with a matrix may be rounded another way for another number of rows.
    tolerance = 0 if kind == "static" else 1e-6
    np.testing.assert_allclose(shuffled, expected[order], rtol=0, atol=tolerance)
    np.testing.assert_allclose(parts, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["static", "normalized"])
def test_a_static_bundle_is_a_softmax_over_means_of_vectors(
    bundles: dict[str, Path], classifiers: dict[str, Classifier], kind: str
) -> None:
    vectors = safetensors.numpy.load_file(bundles[kind] / "embeddings.safetensors")["embeddings"]
    head = safetensors.numpy.load_file(bundles[kind] / "head.safetensors")
    dtypes = [array.dtype.name for array in (vectors, head["coef"], head["intercept"])]
    assert dtypes == ["float16", "float32", "float32"]
    tokenizer = Tokenizer.from_file(str(bundles[kind] / "tokenizer.json"))
    for text, found in zip(TEXTS, classifiers[kind].predict_proba(TEXTS), strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        mean = vectors[ids].astype(np.float64).mean(axis=0) if ids else np.zeros(8)
        if kind == "normalized" and ids:
            mean = mean / np.linalg.norm(mean)
        exponents = np.exp(mean @ head["coef"].T.astype(np.float64) + head["intercept"])
        np.testing.assert_allclose(found, exponents / exponents.sum(), rtol=0, atol=1e-4)


# Reading safetensors

arrays = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.sampled_from([np.float16, np.float32]).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    ),
    max_size=4,
)


@few
@given(arrays=arrays, about=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1))
def test_safetensors_are_read_as_their_own_library_reads_them(
    arrays: dict[str, npt.NDArray[Any]], about: dict[str, str] | None
) -> None:
    content = safetensors.numpy.save(arrays, about)
    expected = safetensors.numpy.load(content)
    found = read_safetensors(content)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array.astype(np.float32))


@pytest.mark.parametrize("kind", [np.float64, np.int8, np.uint8, np.int64, np.uint16, np.bool_])
def test_safetensors_of_other_numbers_are_refused(kind: type[np.generic]) -> None:
    with pytest.raises(BundleError, match="safetensors"):
        read_safetensors(safetensors.numpy.save({"one": np.zeros((2, 3), kind)}))


def with_header(header: bytes, numbers: bytes = bytes(16)) -> bytes:
    return len(header).to_bytes(8, "little") + header + numbers


def entry(**changes: object) -> bytes:
    return with_header(json.dumps({"one": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}).encode())


def test_the_header_that_the_next_test_breaks_is_sound() -> None:
    np.testing.assert_array_equal(read_safetensors(entry())["one"], np.zeros(4, np.float32))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(bytes(3), id="too short for a length"),
        pytest.param(bytes(8), id="no header"),
        pytest.param(b"\xff" * 100, id="a length beyond all bounds"),
        pytest.param(b"garbage, and more of it than eight bytes", id="garbage"),
        pytest.param(with_header(b"\xff\xfe"), id="a header that is not UTF-8"),
        pytest.param(with_header(b"[]"), id="a list"),
        pytest.param(with_header(b"3"), id="a number"),
        pytest.param(with_header(b'{"one": 3}'), id="an entry that is a number"),
        pytest.param(with_header(b'{"one": {}}'), id="an entry without fields"),
        pytest.param(with_header(b"[" * 100_000), id="nested without end"),
        pytest.param(entry(dtype="BF16"), id="another precision"),
        pytest.param(entry(dtype=["F32"]), id="a precision that is a list"),
        pytest.param(entry(shape=[5]), id="more numbers than there are"),
        pytest.param(entry(shape=[10**30]), id="more numbers than any machine has"),
        pytest.param(entry(shape="4"), id="a shape that is text"),
        pytest.param(entry(data_offsets=[0, 15]), id="half a number"),
        pytest.param(entry(data_offsets=[0]), id="no end"),
        pytest.param(entry(data_offsets=["0", "16"]), id="offsets that are text"),
        pytest.param(entry(data_offsets=[16, 32]), id="past the end"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match="safetensors"):
        read_safetensors(content)


def test_a_safetensors_file_cut_off_anywhere_is_refused() -> None:
    content = safetensors.numpy.save({"one": np.ones((2, 3), np.float32), "two": np.ones(4, np.float16)})
    for length in range(len(content)):
        with pytest.raises(BundleError):
            read_safetensors(content[:length])


# Broken bundles


def flip(name: str, where: float) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(where * (len(content) - 1))] ^= 1
        (folder / name).write_bytes(content)

    return damage


@pytest.mark.parametrize("where", [0, 0.5, 1])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_a_flipped_byte_is_refused(copied: Callable[[str], Path], kind: str, name: str, where: float) -> None:
    folder = copied(kind)
    flip(name, where)(folder)
    with pytest.raises(BundleError, match=rf"{name} is not what it was") as caught:
        Classifier(folder)
    assert "copy the bundle again" in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_a_missing_file_is_named(copied: Callable[[str], Path], kind: str, name: str) -> None:
    folder = copied(kind)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} cannot be read .*not whole"):
        Classifier(folder)


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BundleError, match=name):
        Classifier(tmp_path / name)


def says(**changes: Any) -> Damage:
    return lambda folder: write_manifest(folder, {**manifest_of(folder), **changes})


def says_not(*names: str) -> Damage:
    return lambda folder: write_manifest(
        folder, {name: value for name, value in manifest_of(folder).items() if name not in names}
    )


def names_file(name: str, hashed: object = "0" * 64) -> Damage:
    return lambda folder: says(files={**manifest_of(folder)["files"], name: hashed})(folder)


def names_no_file(name: str) -> Damage:
    def damage(folder: Path) -> None:
        files = manifest_of(folder)["files"]
        del files[name]
        says(files=files)(folder)

    return damage


def manifest_is(content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "manifest.json").write_bytes(content)

    return damage


def holds(name: str, content: bytes) -> Damage:
    return lambda folder: put(folder, name, content)


def tensors(name: str, **changes: Callable[[Any], Any]) -> Damage:
    """A file of tensors, some of them changed, with the right hash; those changed to None are left out."""

    def damage(folder: Path) -> None:
        loaded = safetensors.numpy.load_file(folder / name)
        changed = {key: changes[key](array) if key in changes else array for key, array in loaded.items()}
        put(folder, name, safetensors.numpy.save({key: a for key, a in changed.items() if a is not None}))

    return damage


def cut_graph(folder: Path) -> None:
    put(folder, "model.onnx", (folder / "model.onnx").read_bytes()[:-900])


def gap_in_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 10**6
    put(folder, "tokenizer.json", json.dumps(tokenizer).encode())


HEAD = "head|classes|cannot be used"
BROKEN: list[tuple[str, Damage, str, str]] = [
    ("manifest cut off", manifest_is(b'{"format": 1'), "cannot be read", "static"),
    ("manifest empty", manifest_is(b""), "cannot be read", "static"),
    ("manifest not UTF-8", manifest_is(b'{"format": "\xff"}'), "cannot be read", "static"),
    ("manifest nested without end", manifest_is(b"[" * 100_000), "cannot be read", "static"),
    ("manifest a list", manifest_is(b"[]"), "not the manifest", "static"),
    ("manifest a number", manifest_is(b"1"), "not the manifest", "static"),
    ("manifest empty object", manifest_is(b"{}"), "not the manifest", "static"),
    ("no format", says_not("format"), "not the manifest", "static"),
    ("format text", says(format="1"), "not the manifest", "static"),
    ("a later format", says(format=2), r"format 2.*reads up to 1.*classify\.py", "static"),
    ("a later format without anything else", manifest_is(b'{"format": 99}'), "format 99", "static"),
    ("an unknown kind", says(kind="pickle"), "kind 'pickle'; there are static, onnx", "static"),
    ("kind a list", says(kind=["static"]), "of kind", "static"),
    *(
        (f"no {name}", says_not(name), f"does not say .* of {name}", "static")
        for name in ("files", "kind", "normalize", "pad_id", "prefix", "special_tokens")
    ),
    ("several missing", says_not("prefix", "pad_id"), "of pad_id, prefix", "static"),
    ("files a list", says(files=["labels.json"]), "of files", "static"),
    ("normalize a number", says(normalize=1), "of normalize", "static"),
    ("pad_id null", says(pad_id=None), "of pad_id", "static"),
    ("prefix null", says(prefix=None), "of prefix", "static"),
    ("special_tokens text", says(special_tokens="no"), "of special_tokens", "static"),
    *(
        (f"names {name!r}", names_file(name), "not a file of the bundle", "static")
        for name in ("../x", "/etc/passwd", "a\\b", "C:x", "..", ".", "", "a/b", "nul\0byte")
    ),
    *(
        (f"does not name {name} of {kind}", names_no_file(name), f"does not name {name}", kind)
        for kind, names in FILES.items()
        for name in names
    ),
    ("hash a number", names_file("labels.json", 3), "labels.json is not what it was", "static"),
    ("hash null", names_file("labels.json", None), "labels.json is not what it was", "static"),
    ("labels an object", holds("labels.json", b'{"World": 0}'), "list of names", "static"),
    ("labels numbers", holds("labels.json", b"[1, 2, 3, 4]"), "list of names", "static"),
    ("labels text", holds("labels.json", b'"World"'), "list of names", "static"),
    ("labels cut off", holds("labels.json", b'["World"'), "cannot be used", "static"),
    ("labels too few", holds("labels.json", b'["a", "b", "c"]'), "3 labels for 4 classes", "static"),
    ("labels too many for onnx", holds("labels.json", b'["a", "b", "c", "d", "e"]'), "5 labels for 4 classes", "onnx"),
    ("no labels", holds("labels.json", b"[]"), "0 labels for 4 classes", "onnx"),
    ("tokenizer garbage", holds("tokenizer.json", b"\x00garbage"), "cannot be used", "static"),
    ("tokenizer empty", holds("tokenizer.json", b"{}"), "cannot be used", "onnx"),
    ("vectors garbage", holds("embeddings.safetensors", b"garbage"), "safetensors", "static"),
    ("head garbage", holds("head.safetensors", b"garbage"), "safetensors", "static"),
    ("vectors in double precision", tensors("embeddings.safetensors", embeddings=np.float64), "safetensors", "static"),
    ("no vectors", tensors("embeddings.safetensors", embeddings=lambda _: None), "cannot be used", "static"),
    ("no intercept", tensors("head.safetensors", intercept=lambda _: None), "cannot be used", "static"),
    *(
        (f"a {what} of {kind}", tensors(file, **{name: change}), message, kind)
        for kind in ("static", "normalized")
        for what, file, name, change, message in (
            ("vector too few", "embeddings.safetensors", "embeddings", lambda a: a[:-1].copy(), "fewer than its token"),
            ("number too few in the head", "head.safetensors", "coef", lambda a: a[:, 1:].copy(), HEAD),
            ("row too few in the head", "head.safetensors", "coef", lambda a: a[1:].copy(), HEAD),
            ("row only in the head", "head.safetensors", "coef", lambda a: a[:1].copy(), HEAD),
            ("number for an intercept", "head.safetensors", "intercept", lambda a: np.array(a[0]), HEAD),
        )
    ),
    ("tokens far beyond the vectors", gap_in_tokens, "fewer than its tokenizer knows", "static"),
    ("graph garbage", holds("model.onnx", b"garbage"), "cannot be used", "onnx"),
    ("graph empty", holds("model.onnx", b""), "cannot be used", "onnx"),
]


@pytest.mark.parametrize(
    ("damage", "message", "kind"), [pytest.param(*case[1:], id=f"{case[0]}".replace("\0", "0")) for case in BROKEN]
)
def test_a_broken_bundle_is_refused(copied: Callable[[str], Path], damage: Damage, message: str, kind: str) -> None:
    folder = copied(kind)
    damage(folder)
    with pytest.raises(BundleError, match=message):
        Classifier(folder)


def graph(inputs: tuple[str, ...], output: str, shape: Sequence[int]) -> bytes:
    """A graph that gives the same numbers, whatever goes in."""
    from onnx import TensorProto, helper

    numbers = helper.make_tensor("numbers", TensorProto.FLOAT, shape, [0.5, 0.5, 0.0, 0.0])
    node = helper.make_node("Constant", [], [output], value=numbers)
    made = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"]) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
    )
    opset = helper.make_opsetid("", 17)
    return bytes(helper.make_model(made, opset_imports=[opset], ir_version=8).SerializeToString())


@pytest.mark.parametrize(
    ("inputs", "output", "shape"),
    [
        pytest.param(("input_ids", "attention_mask"), "probabilities", [4], id="a row without texts"),
        pytest.param(("input_ids", "attention_mask"), "logits", [1, 4], id="no probabilities"),
        pytest.param(("input_ids",), "probabilities", [1, 4], id="no mask"),
        pytest.param(("input_ids", "attention_mask", "extra"), "probabilities", [1, 4], id="one input too many"),
    ],
)
def test_a_graph_of_another_kind_is_refused(
    copied: Callable[[str], Path], inputs: tuple[str, ...], output: str, shape: Sequence[int]
) -> None:
    folder = copied("onnx")
    put(folder, "model.onnx", graph(inputs, output, shape))
    with pytest.raises(BundleError):
        Classifier(folder)


def delimited(tag: int, content: bytes, *, longer: bool = False) -> bytes:
    """A field of a protocol buffer, its length in no more bytes than it takes, or in one more."""
    length, left = [], len(content)
    while left > 127:
        length.append(left & 127 | 128)
        left >>= 7
    return bytes([tag, *length, *([left | 128, 0] if longer else [left])]) + content


def spelled_otherwise(content: bytes) -> bytes:
    """The same graph, but for the spelling of where other files are, which has room for a choice."""
    import onnx

    model = onnx.load_model_from_string(content)
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for tensor in tensors if not tensor.external_data)
    added = b""
    for tensor in (tensor for tensor in tensors if tensor.external_data):
        entries = [(entry.key.encode(), entry.value.encode()) for entry in tensor.external_data]
        tensor.ClearField("external_data")
        pairs = [delimited(0x0A, key, longer=True) + delimited(0x12, value) for key, value in entries]
        added += delimited(0x2A, tensor.SerializeToString() + b"".join(delimited(0x6A, pair) for pair in pairs))
    return bytes(model.SerializeToString()) + delimited(0x3A, added)


@pytest.mark.parametrize("spell", [pytest.param(bytes, id="usual"), pytest.param(spelled_otherwise, id="otherwise")])
@pytest.mark.parametrize("size_threshold", [0, 1024])
@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_a_graph_never_makes_other_files_be_read(
    copied: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    size_threshold: int,
    spell: Callable[[bytes], bytes],
) -> None:
    import onnx

    folder = copied("onnx")
    (tmp_path / "outside").mkdir()
    model = onnx.load(str(folder / "model.onnx"))
    target = tmp_path / "outside" / "model.onnx"
    onnx.save(model, str(target), save_as_external_data=True, location="weights.bin", size_threshold=size_threshold)
    assert (tmp_path / "outside" / "weights.bin").stat().st_size > 100_000
    content = spell(target.read_bytes())
    assert onnx.load_model_from_string(content).graph.initializer[-1].external_data[0].value == "weights.bin"
    put(folder, "model.onnx", content)
    if place == "beside":
        shutil.copyfile(tmp_path / "outside" / "weights.bin", folder / "weights.bin")
        monkeypatch.chdir(folder)
    else:
        monkeypatch.chdir(tmp_path / "outside")
    with pytest.raises(BundleError):
        Classifier(folder)


# Nothing is executed

SPY = "from pathlib import Path\nPath({path!r}).write_text('ran')\n"


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_nothing_in_a_bundle_is_executed(
    copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = copied(kind)
    evidence = tmp_path / "evidence"
    for name in ("classify.py", "numpy.py", "onnxruntime.py", "sitecustomize.py", "__init__.py"):
        (folder / name).write_text(SPY.format(path=str(evidence)))

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.chdir(folder)
    assert Classifier(folder).predict_proba(TEXTS).shape == (len(TEXTS), 4)
    assert not evidence.exists()


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_using_a_bundle_loads_no_torch(bundles: dict[str, Path], classifiers: dict[str, Classifier], kind: str) -> None:
    heavy = ["torch", "transformers", "setfit", "sentence_transformers", "sklearn", "datasets", "pandas"]
    program = (
        "import json, sys\n"
        "from setfit_kd.runtime import Classifier\n"
        "before = set(sys.modules)\n"
        f"labels = Classifier({str(bundles[kind])!r}).predict(json.loads(sys.argv[1]))\n"
        f"print(json.dumps([labels, sorted((before | set(sys.modules)) & set({heavy!r}))]))\n"
    )
    command = [sys.executable, "-c", program, json.dumps(TEXTS)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(ran.stdout) == [classifiers[kind].predict(TEXTS), []]


# The file in the bundle

INPUT = "First line\n\n  Ünïcödé, 東京 and 🙂\r\n" + NEWS[3] + "\nno newline at the end"
LINES = ["First line", "", "  Ünïcödé, 東京 and 🙂", NEWS[3], "no newline at the end"]


def make_python(folder: Path, *packages: str) -> Path:
    """A Python that has these packages and what they are linked with, and nothing else."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        home = Path(spec.origin).parent
        (site / package).symlink_to(home)
        if (libraries := home.with_name(f"{package}.libs")).is_dir():
            (site / libraries.name).symlink_to(libraries)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_python(tmp_path_factory.mktemp("bare"), "numpy", "tokenizers", "onnxruntime")


@pytest.fixture(scope="module")
def barer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_python(tmp_path_factory.mktemp("barer"), "numpy", "tokenizers")


def run(python: Path, folder: Path, *arguments: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command: list[str | bytes] = [str(python), "-I", str(folder / "classify.py"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


def assert_lines(ran: subprocess.CompletedProcess[bytes], classifier: Classifier, texts: list[str]) -> None:
    assert (ran.returncode, ran.stderr) == (0, b"")
    said = [json.loads(line) for line in ran.stdout.decode("utf-8").splitlines()]
    for line, prediction in zip(said, classifier.stream(texts), strict=True):
        assert list(line) == ["text", "label", "probability"]
        assert (line["text"], line["label"]) == (prediction.text, prediction.label)
        assert line["probability"] == pytest.approx(prediction.probability, abs=1e-6)


def test_the_bare_environments_are_bare(bare: Path, barer: Path) -> None:
    program = (
        "import importlib.util as u; "
        "print(*[n for n in ('numpy', 'tokenizers', 'onnxruntime', 'torch', 'setfit_kd', 'pip') if u.find_spec(n)])"
    )
    for python, expected in ((bare, "numpy tokenizers onnxruntime"), (barer, "numpy tokenizers")):
        ran = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True, timeout=60)
        assert ran.stdout.split() == expected.split()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_runs_by_itself_on_arguments(
    bare: Path, copied: Callable[[str], Path], classifiers: dict[str, Classifier], kind: str
) -> None:
    texts = ["Rain stops play", "", "Ünïcödé, 東京 and 🙂", NEWS[3]]
    assert_lines(run(bare, copied(kind), *texts), classifiers[kind], texts)


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_a_bundle_runs_by_itself_on_the_lines_of_stdin(
    bare: Path, copied: Callable[[str], Path], classifiers: dict[str, Classifier], kind: str
) -> None:
    assert_lines(run(bare, copied(kind), stdin=INPUT.encode()), classifiers[kind], LINES)


def test_the_file_runs_another_bundle_as_well(
    bare: Path, bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    ran = run(bare, bundles["onnx"], "--bundle", str(bundles["static"]), "--threads", "1", *TEXTS[:3])
    assert_lines(ran, classifiers["static"], TEXTS[:3])


def test_no_lines_give_no_output(bare: Path, bundles: dict[str, Path]) -> None:
    ran = run(bare, bundles["static"], stdin=b"")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


def test_bytes_that_are_not_utf8_are_replaced(
    bare: Path, bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    assert_lines(run(bare, bundles["static"], stdin=b"caf\xe9 goal\n"), classifiers["static"], ["caf\ufffd goal"])
    assert_lines(run(bare, bundles["static"], b"caf\xe9 goal"), classifiers["static"], ["caf\ufffd goal"])


def test_without_onnxruntime_a_static_bundle_runs(
    barer: Path, bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    assert_lines(run(barer, bundles["static"], *TEXTS[:3]), classifiers["static"], TEXTS[:3])


def assert_ended_in_a_line(ran: subprocess.CompletedProcess[bytes], beginning: str) -> None:
    stderr = ran.stderr.decode("utf-8")
    assert (ran.returncode, ran.stdout) == (1, b"")
    assert stderr.startswith(beginning)
    assert len(stderr.splitlines()) == 1
    assert "Traceback" not in stderr


def test_without_onnxruntime_an_onnx_bundle_says_what_it_needs(barer: Path, bundles: dict[str, Path]) -> None:
    assert_ended_in_a_line(run(barer, bundles["onnx"], "x"), "Error: This bundle needs onnxruntime")


def test_where_onnxruntime_is_missing_the_class_says_so(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    Classifier(bundles["static"])
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        Classifier(bundles["onnx"])


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        pytest.param("static", flip("embeddings.safetensors", 0.5), id="a flipped byte"),
        pytest.param("static", manifest_is(b"{"), id="manifest cut off"),
        pytest.param("static", holds("tokenizer.json", b"{\n\n"), id="tokenizer cut off"),
        pytest.param("onnx", holds("model.onnx", b"garbage\n\n"), id="graph garbage"),
        pytest.param("onnx", cut_graph, id="graph cut off"),
    ],
)
def test_a_broken_bundle_ends_in_one_line(bare: Path, copied: Callable[[str], Path], kind: str, damage: Damage) -> None:
    folder = copied(kind)
    damage(folder)
    assert_ended_in_a_line(run(bare, folder, "x"), "Error: ")


@pytest.mark.parametrize("lines", [1, 3000])
def test_a_reader_who_has_seen_enough_makes_no_noise(bare: Path, bundles: dict[str, Path], lines: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(bare), "-I", str(bundles["static"] / "classify.py")]
    ran = subprocess.run(
        command, input=b"some text\n" * lines, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False
    )
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_the_head_of_the_output_is_whole_lines(
    bare: Path, bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    command = [str(bare), "-I", str(bundles["static"] / "classify.py")]
    # Read to an end far away, as `yes | classify.py | head -1` does.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None

        def feed() -> None:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stdin:
                for _ in range(20_000):
                    stdin.write(b"Rain stops play\n")

        feeder = threading.Thread(target=feed)
        feeder.start()
        first = json.loads(process.stdout.readline())
        process.stdout.close()
        feeder.join(timeout=60)
        stderr = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert stderr == b""
    assert [first["label"]] == classifiers["static"].predict(["Rain stops play"])
