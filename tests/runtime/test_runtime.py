"""Tests of `setfit_kd.runtime`: predictions of bundles, damaged bundles, and use without the package."""

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

from setfit_kd.export.bundle import export_bundle
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed
from setfit_kd.models.heads import new_head
from setfit_kd.models.io import new_model
from setfit_kd.models.static import static_body
from setfit_kd.runtime.classify import BundleError, Classifier, Prediction, read_safetensors

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

fewer_examples = settings(max_examples=30, deadline=None)


# Bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> dict[str, Path]:
    """One bundle per kind: static, static with normalized means, and ONNX; tests must not change them."""
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
def copy_bundle(bundles: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Function that copies a bundle of some kind, which a test may change."""
    return lambda kind: Path(shutil.copytree(bundles[kind], tmp_path / "copy"))


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def write_manifest(folder: Path, content: object) -> None:
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Write a file and update its hash in the manifest."""
    (folder / name).write_bytes(content)
    manifest = read_manifest(folder)
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    write_manifest(folder, manifest)


# Predictions


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_probabilities_sum_to_one(classifiers: dict[str, Classifier], kind: str) -> None:
    probabilities = classifiers[kind].predict_proba(TEXTS)
    assert probabilities.shape == (len(TEXTS), 4)
    assert probabilities.dtype == np.float32
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert len(set(probabilities.argmax(axis=1))) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_predict_and_stream_match_predict_proba(classifiers: dict[str, Classifier], kind: str) -> None:
    classifier = classifiers[kind]
    assert classifier.labels == LABELS
    probabilities = classifier.predict_proba(TEXTS)
    labels = [LABELS[column] for column in probabilities.argmax(axis=1)]
    assert classifier.predict(TEXTS) == labels
    for chunk_size in (1, 7, len(TEXTS), 1000):
        predictions = list(classifier.stream(iter(TEXTS), chunk_size=chunk_size))
        assert all(isinstance(prediction, Prediction) for prediction in predictions)
        assert [prediction.text for prediction in predictions] == TEXTS
        assert [prediction.label for prediction in predictions] == labels
        highest = [prediction.probability for prediction in predictions]
        np.testing.assert_allclose(highest, probabilities.max(axis=1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_list_gives_no_rows_and_empty_text_gives_a_row(classifiers: dict[str, Classifier], kind: str) -> None:
    classifier = classifiers[kind]
    assert classifier.predict_proba([]).shape == (0, 4)
    assert classifier.predict_proba([]).dtype == np.float32
    assert classifier.predict([]) == []
    assert list(classifier.stream([])) == []
    probabilities = classifier.predict_proba([""])
    assert np.isfinite(probabilities).all()
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_text_without_tokens_is_classified_by_the_intercept(
    bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    for kind in ("static", "normalized"):
        intercept = safetensors.numpy.load_file(bundles[kind] / "head.safetensors")["intercept"]
        exponents = np.exp(intercept - intercept.max())
        empty, _, blank = classifiers[kind].predict_proba(["", "goal", "   "])
        np.testing.assert_allclose([empty, blank], [exponents / exponents.sum()] * 2, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", ["predict", "predict_proba"])
def test_single_string_is_rejected(classifiers: dict[str, Classifier], kind: str, function: str) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        getattr(classifiers[kind], function)("Rain stops play")


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_invalid_chunk_size_is_rejected(classifiers: dict[str, Classifier], chunk_size: int) -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        next(classifiers["static"].stream(TEXTS, chunk_size=chunk_size))


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"threads": -1}, {"batch_size": 0}])
def test_invalid_threads_and_batch_size_are_rejected(bundles: dict[str, Path], arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Classifier(bundles["static"], **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 5])
def test_endless_stream_is_read_only_as_far_as_needed(
    classifiers: dict[str, Classifier], kind: str, chunk_size: int
) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for text in itertools.cycle(TEXTS):
            read += 1
            yield text

    stream = classifiers[kind].stream(endless(), chunk_size=chunk_size)
    assert read == 0
    for n_predictions in range(1, 2 * len(TEXTS)):
        assert next(stream).text == TEXTS[(n_predictions - 1) % len(TEXTS)]
        assert n_predictions <= read < n_predictions + chunk_size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_batch_size_does_not_change_probabilities(bundles: dict[str, Path], kind: str, batch_size: int) -> None:
    expected = Classifier(bundles[kind], batch_size=len(TEXTS)).predict_proba(TEXTS)
    actual = Classifier(bundles[kind], batch_size=batch_size).predict_proba(TEXTS)
    if kind == "onnx":
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_several_chunks_keep_the_order_of_texts(
    classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expected = classifiers[kind].predict_proba(TEXTS)
    monkeypatch.setattr("setfit_kd.runtime.classify._CHUNK_SIZE", 6)
    np.testing.assert_allclose(classifiers[kind].predict_proba(TEXTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_thread_predicts_like_several(
    bundles: dict[str, Path], classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # Set first, so that monkeypatch also undoes the change by the classifier.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    expected = classifiers[kind].predict_proba(TEXTS)
    np.testing.assert_allclose(Classifier(bundles[kind], threads=1).predict_proba(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_classifier_is_thread_safe(classifiers: dict[str, Classifier], kind: str) -> None:
    classifier = classifiers[kind]
    parts = [TEXTS[start : start + 9] for start in range(16)]
    expected = [classifier.predict_proba(part) for part in parts]
    barrier = threading.Barrier(len(parts))

    def predict_repeatedly(part: list[str]) -> list[Floats]:
        barrier.wait(timeout=60)
        return [classifier.predict_proba(part) for _ in range(5)]

    with ThreadPoolExecutor(len(parts)) as pool:
        for probabilities, repeated in zip(expected, pool.map(predict_repeatedly, parts), strict=True):
            for actual in repeated:
                np.testing.assert_allclose(actual, probabilities, rtol=0, atol=1e-5)


any_texts = st.lists(st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)), max_size=12)


@fewer_examples
@given(texts=any_texts, data=st.data())
@pytest.mark.parametrize("kind", ["static", "normalized"])
def test_order_and_splitting_do_not_change_static_probabilities(
    classifiers: dict[str, Classifier], kind: str, texts: list[str], data: st.DataObject
) -> None:
    classifier = classifiers[kind]
    expected = classifier.predict_proba(texts)
    order = data.draw(st.permutations(range(len(texts))))
    cut = data.draw(st.integers(0, len(texts)))
    shuffled = classifier.predict_proba([texts[row] for row in order])
    parts = np.concatenate([classifier.predict_proba(texts[:cut]), classifier.predict_proba(texts[cut:])])
    # The rounding of a matrix product may depend on the number of rows.
    tolerance = 0 if kind == "static" else 1e-6
    np.testing.assert_allclose(shuffled, expected[order], rtol=0, atol=tolerance)
    np.testing.assert_allclose(parts, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["static", "normalized"])
def test_static_bundle_is_a_softmax_over_mean_vectors(
    bundles: dict[str, Path], classifiers: dict[str, Classifier], kind: str
) -> None:
    vectors = safetensors.numpy.load_file(bundles[kind] / "embeddings.safetensors")["embeddings"]
    head = safetensors.numpy.load_file(bundles[kind] / "head.safetensors")
    dtypes = [array.dtype.name for array in (vectors, head["coef"], head["intercept"])]
    assert dtypes == ["float16", "float32", "float32"]
    tokenizer = Tokenizer.from_file(str(bundles[kind] / "tokenizer.json"))
    for text, probabilities in zip(TEXTS, classifiers[kind].predict_proba(TEXTS), strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        mean = vectors[ids].astype(np.float64).mean(axis=0) if ids else np.zeros(8)
        if kind == "normalized" and ids:
            mean = mean / np.linalg.norm(mean)
        exponents = np.exp(mean @ head["coef"].T.astype(np.float64) + head["intercept"])
        np.testing.assert_allclose(probabilities, exponents / exponents.sum(), rtol=0, atol=1e-4)


# Reading safetensors

arrays = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.sampled_from([np.float16, np.float32]).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    ),
    max_size=4,
)


@fewer_examples
@given(arrays=arrays, metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1))
def test_safetensors_are_read_like_by_the_safetensors_library(
    arrays: dict[str, npt.NDArray[Any]], metadata: dict[str, str] | None
) -> None:
    content = safetensors.numpy.save(arrays, metadata)
    expected = safetensors.numpy.load(content)
    actual = read_safetensors(content)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == np.float32
        assert actual[name].shape == array.shape
        np.testing.assert_array_equal(actual[name], array.astype(np.float32))


@pytest.mark.parametrize("kind", [np.float64, np.int8, np.uint8, np.int64, np.uint16, np.bool_])
def test_safetensors_of_other_types_are_rejected(kind: type[np.generic]) -> None:
    with pytest.raises(BundleError, match="safetensors"):
        read_safetensors(safetensors.numpy.save({"one": np.zeros((2, 3), kind)}))


def with_header(header: bytes, numbers: bytes = bytes(16)) -> bytes:
    return len(header).to_bytes(8, "little") + header + numbers


def entry(**changes: object) -> bytes:
    return with_header(json.dumps({"one": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}).encode())


def test_unchanged_header_of_the_next_test_is_valid() -> None:
    np.testing.assert_array_equal(read_safetensors(entry())["one"], np.zeros(4, np.float32))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(3), id="too short for the header length"),
        pytest.param(bytes(8), id="no header"),
        pytest.param(b"\xff" * 100, id="header longer than the file"),
        pytest.param(b"garbage, and more of it than eight bytes", id="garbage"),
        pytest.param(with_header(b"\xff\xfe"), id="header not UTF-8"),
        pytest.param(with_header(b"[]"), id="header is a list"),
        pytest.param(with_header(b"3"), id="header is a number"),
        pytest.param(with_header(b'{"one": 3}'), id="entry is a number"),
        pytest.param(with_header(b'{"one": {}}'), id="entry without fields"),
        pytest.param(with_header(b"[" * 100_000), id="deeply nested header"),
        pytest.param(entry(dtype="BF16"), id="unsupported dtype"),
        pytest.param(entry(dtype=["F32"]), id="dtype is a list"),
        pytest.param(entry(shape=[5]), id="shape larger than the data"),
        pytest.param(entry(shape=[10**30]), id="shape larger than memory"),
        pytest.param(entry(shape="4"), id="shape is a string"),
        pytest.param(entry(data_offsets=[0, 15]), id="partial number"),
        pytest.param(entry(data_offsets=[0]), id="no end offset"),
        pytest.param(entry(data_offsets=["0", "16"]), id="offsets are strings"),
        pytest.param(entry(data_offsets=[16, 32]), id="offsets past the end"),
    ],
)
def test_invalid_safetensors_are_rejected(content: bytes) -> None:
    with pytest.raises(BundleError, match="safetensors"):
        read_safetensors(content)


def test_truncated_safetensors_are_rejected() -> None:
    content = safetensors.numpy.save({"one": np.ones((2, 3), np.float32), "two": np.ones(4, np.float16)})
    for length in range(len(content)):
        with pytest.raises(BundleError):
            read_safetensors(content[:length])


# Damaged bundles


def flip_bit(name: str, position: float) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        (folder / name).write_bytes(content)

    return damage


@pytest.mark.parametrize("position", [0, 0.5, 1])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_changed_file_is_rejected(copy_bundle: Callable[[str], Path], kind: str, name: str, position: float) -> None:
    folder = copy_bundle(kind)
    flip_bit(name, position)(folder)
    with pytest.raises(BundleError, match=rf"{name} has changed since") as error_info:
        Classifier(folder)
    assert "copy the bundle again" in str(error_info.value)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_missing_file_is_reported(copy_bundle: Callable[[str], Path], kind: str, name: str) -> None:
    folder = copy_bundle(kind)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=rf"Cannot read .*{name} .*incomplete"):
        Classifier(folder)


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_path_that_is_not_a_bundle_is_rejected(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BundleError, match=name):
        Classifier(tmp_path / name)


def change_manifest(**changes: Any) -> Damage:
    return lambda folder: write_manifest(folder, {**read_manifest(folder), **changes})


def remove_fields(*names: str) -> Damage:
    return lambda folder: write_manifest(
        folder, {name: value for name, value in read_manifest(folder).items() if name not in names}
    )


def add_to_manifest(name: str, file_hash: object = "0" * 64) -> Damage:
    return lambda folder: change_manifest(files={**read_manifest(folder)["files"], name: file_hash})(folder)


def remove_from_manifest(name: str) -> Damage:
    def damage(folder: Path) -> None:
        files = read_manifest(folder)["files"]
        del files[name]
        change_manifest(files=files)(folder)

    return damage


def write_manifest_bytes(content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "manifest.json").write_bytes(content)

    return damage


def with_content(name: str, content: bytes) -> Damage:
    return lambda folder: replace_file(folder, name, content)


def change_tensors(name: str, **changes: Callable[[Any], Any]) -> Damage:
    """Change tensors of a file and update its hash; tensors changed to None are removed."""

    def damage(folder: Path) -> None:
        loaded = safetensors.numpy.load_file(folder / name)
        changed = {key: changes[key](array) if key in changes else array for key, array in loaded.items()}
        replace_file(folder, name, safetensors.numpy.save({key: a for key, a in changed.items() if a is not None}))

    return damage


def truncate_graph(folder: Path) -> None:
    replace_file(folder, "model.onnx", (folder / "model.onnx").read_bytes()[:-900])


def raise_highest_token_id(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 10**6
    replace_file(folder, "tokenizer.json", json.dumps(tokenizer).encode())


HEAD_MESSAGES = "head|classes|cannot be used"
DAMAGED_BUNDLES: list[tuple[str, Damage, str, str]] = [
    ("truncated manifest", write_manifest_bytes(b'{"format": 1'), "Cannot read", "static"),
    ("empty manifest", write_manifest_bytes(b""), "Cannot read", "static"),
    ("manifest not UTF-8", write_manifest_bytes(b'{"format": "\xff"}'), "Cannot read", "static"),
    ("deeply nested manifest", write_manifest_bytes(b"[" * 100_000), "Cannot read", "static"),
    ("manifest is a list", write_manifest_bytes(b"[]"), "not the manifest", "static"),
    ("manifest is a number", write_manifest_bytes(b"1"), "not the manifest", "static"),
    ("manifest is an empty object", write_manifest_bytes(b"{}"), "not the manifest", "static"),
    ("no format", remove_fields("format"), "not the manifest", "static"),
    ("format is a string", change_manifest(format="1"), "not the manifest", "static"),
    ("newer format", change_manifest(format=2), r"format 2.*reads formats up to 1.*classify\.py", "static"),
    ("newer format without other fields", write_manifest_bytes(b'{"format": 99}'), "format 99", "static"),
    ("unknown kind", change_manifest(kind="pickle"), "kind 'pickle', expected static or onnx", "static"),
    ("kind is a list", change_manifest(kind=["static"]), "fields: kind", "static"),
    *(
        (f"no {name}", remove_fields(name), f"missing or invalid fields: {name}", "static")
        for name in ("files", "kind", "normalize", "pad_id", "prefix", "special_tokens")
    ),
    ("several missing", remove_fields("prefix", "pad_id"), "fields: pad_id, prefix", "static"),
    ("files is a list", change_manifest(files=["labels.json"]), "fields: files", "static"),
    ("normalize is a number", change_manifest(normalize=1), "fields: normalize", "static"),
    ("pad_id is null", change_manifest(pad_id=None), "fields: pad_id", "static"),
    ("prefix is null", change_manifest(prefix=None), "fields: prefix", "static"),
    ("special_tokens is a string", change_manifest(special_tokens="no"), "fields: special_tokens", "static"),
    *(
        (f"lists {name!r}", add_to_manifest(name), "not a plain file name", "static")
        for name in ("../x", "/etc/passwd", "a\\b", "C:x", "..", ".", "", "a/b", "nul\0byte")
    ),
    *(
        (f"does not list {name} of {kind}", remove_from_manifest(name), f"does not list {name}", kind)
        for kind, names in FILES.items()
        for name in names
    ),
    ("hash is a number", add_to_manifest("labels.json", 3), "labels.json has changed since", "static"),
    ("hash is null", add_to_manifest("labels.json", None), "labels.json has changed since", "static"),
    ("labels are an object", with_content("labels.json", b'{"World": 0}'), "list of strings", "static"),
    ("labels are numbers", with_content("labels.json", b"[1, 2, 3, 4]"), "list of strings", "static"),
    ("labels are a string", with_content("labels.json", b'"World"'), "list of strings", "static"),
    ("truncated labels", with_content("labels.json", b'["World"'), "cannot be used", "static"),
    ("too few labels", with_content("labels.json", b'["a", "b", "c"]'), "3 labels for 4 classes", "static"),
    (
        "too many labels for onnx",
        with_content("labels.json", b'["a", "b", "c", "d", "e"]'),
        "5 labels for 4 classes",
        "onnx",
    ),
    ("no labels", with_content("labels.json", b"[]"), "0 labels for 4 classes", "onnx"),
    ("invalid tokenizer", with_content("tokenizer.json", b"\x00garbage"), "cannot be used", "static"),
    ("empty tokenizer", with_content("tokenizer.json", b"{}"), "cannot be used", "onnx"),
    ("invalid vectors", with_content("embeddings.safetensors", b"garbage"), "safetensors", "static"),
    ("invalid head", with_content("head.safetensors", b"garbage"), "safetensors", "static"),
    (
        "vectors in double precision",
        change_tensors("embeddings.safetensors", embeddings=np.float64),
        "safetensors",
        "static",
    ),
    ("no vectors", change_tensors("embeddings.safetensors", embeddings=lambda _: None), "cannot be used", "static"),
    ("no intercept", change_tensors("head.safetensors", intercept=lambda _: None), "cannot be used", "static"),
    *(
        (f"{case} of {kind}", change_tensors(file, **{name: change}), message, kind)
        for kind in ("static", "normalized")
        for case, file, name, change, message in (
            ("missing vector", "embeddings.safetensors", "embeddings", lambda a: a[:-1].copy(), "higher token ids"),
            ("missing column in the head", "head.safetensors", "coef", lambda a: a[:, 1:].copy(), HEAD_MESSAGES),
            ("missing row in the head", "head.safetensors", "coef", lambda a: a[1:].copy(), HEAD_MESSAGES),
            ("single row in the head", "head.safetensors", "coef", lambda a: a[:1].copy(), HEAD_MESSAGES),
            ("scalar intercept", "head.safetensors", "intercept", lambda a: np.array(a[0]), HEAD_MESSAGES),
        )
    ),
    ("token id beyond the vectors", raise_highest_token_id, "higher token ids", "static"),
    ("invalid graph", with_content("model.onnx", b"garbage"), "cannot be used", "onnx"),
    ("empty graph", with_content("model.onnx", b""), "cannot be used", "onnx"),
]


@pytest.mark.parametrize(
    ("damage", "message", "kind"),
    [pytest.param(*case[1:], id=f"{case[0]}".replace("\0", "0")) for case in DAMAGED_BUNDLES],
)
def test_damaged_bundle_is_rejected(
    copy_bundle: Callable[[str], Path], damage: Damage, message: str, kind: str
) -> None:
    folder = copy_bundle(kind)
    damage(folder)
    with pytest.raises(BundleError, match=message):
        Classifier(folder)


def constant_graph(inputs: tuple[str, ...], output: str, shape: Sequence[int]) -> bytes:
    """Create a graph that returns the same numbers for any input."""
    from onnx import TensorProto, helper

    numbers = helper.make_tensor("numbers", TensorProto.FLOAT, shape, [0.5, 0.5, 0.0, 0.0])
    node = helper.make_node("Constant", [], [output], value=numbers)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"]) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
    )
    opset = helper.make_opsetid("", 17)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


@pytest.mark.parametrize(
    ("inputs", "output", "shape"),
    [
        pytest.param(("input_ids", "attention_mask"), "probabilities", [4], id="one-dimensional output"),
        pytest.param(("input_ids", "attention_mask"), "logits", [1, 4], id="no probabilities"),
        pytest.param(("input_ids",), "probabilities", [1, 4], id="no mask"),
        pytest.param(("input_ids", "attention_mask", "extra"), "probabilities", [1, 4], id="additional input"),
    ],
)
def test_graph_with_other_inputs_or_outputs_is_rejected(
    copy_bundle: Callable[[str], Path], inputs: tuple[str, ...], output: str, shape: Sequence[int]
) -> None:
    folder = copy_bundle("onnx")
    replace_file(folder, "model.onnx", constant_graph(inputs, output, shape))
    with pytest.raises(BundleError):
        Classifier(folder)


def encode_field(tag: int, content: bytes, *, longer: bool = False) -> bytes:
    """Encode a field of a protocol buffer, with its length in the fewest possible bytes or in one more."""
    length, rest = [], len(content)
    while rest > 127:
        length.append(rest & 127 | 128)
        rest >>= 7
    return bytes([tag, *length, *([rest | 128, 0] if longer else [rest])]) + content


def encode_differently(content: bytes) -> bytes:
    """Return the same graph with another valid encoding of the paths of external files."""
    import onnx

    model = onnx.load_model_from_string(content)
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for tensor in tensors if not tensor.external_data)
    added = b""
    for tensor in (tensor for tensor in tensors if tensor.external_data):
        entries = [(entry.key.encode(), entry.value.encode()) for entry in tensor.external_data]
        tensor.ClearField("external_data")
        pairs = [encode_field(0x0A, key, longer=True) + encode_field(0x12, value) for key, value in entries]
        added += encode_field(0x2A, tensor.SerializeToString() + b"".join(encode_field(0x6A, pair) for pair in pairs))
    return bytes(model.SerializeToString()) + encode_field(0x3A, added)


@pytest.mark.parametrize(
    "encode", [pytest.param(bytes, id="same encoding"), pytest.param(encode_differently, id="other encoding")]
)
@pytest.mark.parametrize("size_threshold", [0, 1024])
@pytest.mark.parametrize("location", ["in the bundle", "in the working directory"])
def test_graph_with_external_files_is_rejected(
    copy_bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    location: str,
    size_threshold: int,
    encode: Callable[[bytes], bytes],
) -> None:
    import onnx

    folder = copy_bundle("onnx")
    (tmp_path / "outside").mkdir()
    model = onnx.load(str(folder / "model.onnx"))
    target = tmp_path / "outside" / "model.onnx"
    onnx.save(model, str(target), save_as_external_data=True, location="weights.bin", size_threshold=size_threshold)
    assert (tmp_path / "outside" / "weights.bin").stat().st_size > 100_000
    content = encode(target.read_bytes())
    assert onnx.load_model_from_string(content).graph.initializer[-1].external_data[0].value == "weights.bin"
    replace_file(folder, "model.onnx", content)
    if location == "in the bundle":
        shutil.copyfile(tmp_path / "outside" / "weights.bin", folder / "weights.bin")
        monkeypatch.chdir(folder)
    else:
        monkeypatch.chdir(tmp_path / "outside")
    with pytest.raises(BundleError):
        Classifier(folder)


# Code in bundles

SPY = "from pathlib import Path\nPath({path!r}).write_text('ran')\n"


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_code_in_a_bundle_is_not_executed(
    copy_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = copy_bundle(kind)
    evidence = tmp_path / "evidence"
    for name in ("classify.py", "numpy.py", "onnxruntime.py", "sitecustomize.py", "__init__.py"):
        (folder / name).write_text(SPY.format(path=str(evidence)))

    def fail(*arguments: object, **named: object) -> None:
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, fail)
    monkeypatch.chdir(folder)
    assert Classifier(folder).predict_proba(TEXTS).shape == (len(TEXTS), 4)
    assert not evidence.exists()


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_bundle_is_used_without_torch(bundles: dict[str, Path], classifiers: dict[str, Classifier], kind: str) -> None:
    torch_packages = ["torch", "transformers", "setfit", "sentence_transformers", "sklearn", "datasets", "pandas"]
    program = (
        "import json, sys\n"
        "from setfit_kd.runtime import Classifier\n"
        "before = set(sys.modules)\n"
        f"labels = Classifier({str(bundles[kind])!r}).predict(json.loads(sys.argv[1]))\n"
        f"print(json.dumps([labels, sorted((before | set(sys.modules)) & set({torch_packages!r}))]))\n"
    )
    command = [sys.executable, "-c", program, json.dumps(TEXTS)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(process.stdout) == [classifiers[kind].predict(TEXTS), []]


# classify.py in the bundle

INPUT = "First line\n\n  Ünïcödé, 東京 and 🙂\r\n" + NEWS[3] + "\nno newline at the end"
LINES = ["First line", "", "  Ünïcödé, 東京 and 🙂", NEWS[3], "no newline at the end"]


def make_python(folder: Path, *packages: str) -> Path:
    """Create a Python environment with only these packages and the libraries they are linked with."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        package_folder = Path(spec.origin).parent
        (site / package).symlink_to(package_folder)
        if (libraries := package_folder.with_name(f"{package}.libs")).is_dir():
            (site / libraries.name).symlink_to(libraries)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def minimal_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_python(tmp_path_factory.mktemp("minimal_python"), "numpy", "tokenizers", "onnxruntime")


@pytest.fixture(scope="module")
def python_without_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_python(tmp_path_factory.mktemp("python_without_onnx"), "numpy", "tokenizers")


def run(python: Path, folder: Path, *arguments: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command: list[str | bytes] = [str(python), "-I", str(folder / "classify.py"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


def assert_output(process: subprocess.CompletedProcess[bytes], classifier: Classifier, texts: list[str]) -> None:
    assert (process.returncode, process.stderr) == (0, b"")
    records = [json.loads(line) for line in process.stdout.decode("utf-8").splitlines()]
    for record, prediction in zip(records, classifier.stream(texts), strict=True):
        assert list(record) == ["text", "label", "probability"]
        assert (record["text"], record["label"]) == (prediction.text, prediction.label)
        assert record["probability"] == pytest.approx(prediction.probability, abs=1e-6)


def test_minimal_environments_have_only_their_packages(minimal_python: Path, python_without_onnx: Path) -> None:
    program = (
        "import importlib.util as u; "
        "print(*[n for n in ('numpy', 'tokenizers', 'onnxruntime', 'torch', 'setfit_kd', 'pip') if u.find_spec(n)])"
    )
    for python, expected in (
        (minimal_python, "numpy tokenizers onnxruntime"),
        (python_without_onnx, "numpy tokenizers"),
    ):
        process = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True, timeout=60)
        assert process.stdout.split() == expected.split()


@pytest.mark.parametrize("kind", KINDS)
def test_classify_script_classifies_arguments(
    minimal_python: Path, copy_bundle: Callable[[str], Path], classifiers: dict[str, Classifier], kind: str
) -> None:
    texts = ["Rain stops play", "", "Ünïcödé, 東京 and 🙂", NEWS[3]]
    assert_output(run(minimal_python, copy_bundle(kind), *texts), classifiers[kind], texts)


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_classify_script_classifies_lines_of_stdin(
    minimal_python: Path, copy_bundle: Callable[[str], Path], classifiers: dict[str, Classifier], kind: str
) -> None:
    assert_output(run(minimal_python, copy_bundle(kind), stdin=INPUT.encode()), classifiers[kind], LINES)


def test_classify_script_runs_another_bundle(
    minimal_python: Path, bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    process = run(minimal_python, bundles["onnx"], "--bundle", str(bundles["static"]), "--threads", "1", *TEXTS[:3])
    assert_output(process, classifiers["static"], TEXTS[:3])


def test_empty_stdin_gives_no_output(minimal_python: Path, bundles: dict[str, Path]) -> None:
    process = run(minimal_python, bundles["static"], stdin=b"")
    assert (process.returncode, process.stdout, process.stderr) == (0, b"", b"")


def test_invalid_utf8_is_replaced(
    minimal_python: Path, bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    assert_output(
        run(minimal_python, bundles["static"], stdin=b"caf\xe9 goal\n"), classifiers["static"], ["caf\ufffd goal"]
    )
    assert_output(run(minimal_python, bundles["static"], b"caf\xe9 goal"), classifiers["static"], ["caf\ufffd goal"])


def test_static_bundle_runs_without_onnxruntime(
    python_without_onnx: Path, bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    assert_output(run(python_without_onnx, bundles["static"], *TEXTS[:3]), classifiers["static"], TEXTS[:3])


def assert_one_line_error(process: subprocess.CompletedProcess[bytes], prefix: str) -> None:
    stderr = process.stderr.decode("utf-8")
    assert (process.returncode, process.stdout) == (1, b"")
    assert stderr.startswith(prefix)
    assert len(stderr.splitlines()) == 1
    assert "Traceback" not in stderr


def test_classify_script_reports_missing_onnxruntime(python_without_onnx: Path, bundles: dict[str, Path]) -> None:
    assert_one_line_error(run(python_without_onnx, bundles["onnx"], "x"), "Error: This bundle needs onnxruntime")


def test_classifier_reports_missing_onnxruntime(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    Classifier(bundles["static"])
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        Classifier(bundles["onnx"])


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        pytest.param("static", flip_bit("embeddings.safetensors", 0.5), id="flipped bit"),
        pytest.param("static", write_manifest_bytes(b"{"), id="truncated manifest"),
        pytest.param("static", with_content("tokenizer.json", b"{\n\n"), id="truncated tokenizer"),
        pytest.param("onnx", with_content("model.onnx", b"garbage\n\n"), id="invalid graph"),
        pytest.param("onnx", truncate_graph, id="truncated graph"),
    ],
)
def test_damaged_bundle_gives_a_one_line_error(
    minimal_python: Path, copy_bundle: Callable[[str], Path], kind: str, damage: Damage
) -> None:
    folder = copy_bundle(kind)
    damage(folder)
    assert_one_line_error(run(minimal_python, folder, "x"), "Error: ")


@pytest.mark.parametrize("lines", [1, 3000])
def test_closed_stdout_ends_the_script_quietly(minimal_python: Path, bundles: dict[str, Path], lines: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(minimal_python), "-I", str(bundles["static"] / "classify.py")]
    process = subprocess.run(
        command, input=b"some text\n" * lines, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (0, b"")


def test_output_is_complete_lines_until_the_reader_stops(
    minimal_python: Path, bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    command = [str(minimal_python), "-I", str(bundles["static"] / "classify.py")]
    # Like `yes | classify.py | head -1`, with a bounded input.
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
