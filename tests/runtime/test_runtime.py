"""Tests of `setfit_kd.runtime`: predictions of bundles, damaged bundles, and use without the package."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import shutil
import signal
import subprocess
import threading
import venv
from collections.abc import Callable
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
from predictions import live_process, replace_file
from tokenizers import Tokenizer

from setfit_kd.export.bundle import export_bundle
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed
from setfit_kd.models.heads import new_head
from setfit_kd.models.io import new_model
from setfit_kd.models.static import static_body
from setfit_kd.runtime.classify import BundleError, Classifier, Lines, Prediction, read_safetensors

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


# Predictions


@pytest.mark.parametrize("kind", KINDS)
def test_predict_and_stream_match_the_probabilities(classifiers: dict[str, Classifier], kind: str) -> None:
    classifier = classifiers[kind]
    assert classifier.labels == LABELS
    probabilities = classifier.predict_proba(TEXTS)
    assert probabilities.shape == (len(TEXTS), 4)
    assert probabilities.dtype == np.float32
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    columns = probabilities.argmax(axis=1)
    assert len(set(columns)) > 1
    labels = [LABELS[column] if text.strip() else None for text, column in zip(TEXTS, columns, strict=True)]
    assert classifier.predict(TEXTS) == labels
    for chunk_size in (1, 7, 1000):
        predictions = list(classifier.stream(iter(TEXTS), chunk_size=chunk_size))
        assert all(isinstance(prediction, Prediction) for prediction in predictions)
        assert [prediction.text for prediction in predictions] == TEXTS
        assert [prediction.label for prediction in predictions] == labels
        for prediction, row in zip(predictions, probabilities, strict=True):
            assert prediction.probability == (pytest.approx(row.max(), abs=1e-5) if prediction.text.strip() else None)


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_visible_characters_has_no_label(
    bundles: dict[str, Path], classifiers: dict[str, Classifier], kind: str
) -> None:
    classifier = classifiers[kind]
    blank = ["", " \t\u3000\r\n", "\u200b\u00ad\ufe0f\U000e0041"]
    assert classifier.predict([*blank, "."]) == [None, None, None, classifier.predict(["."])[0]]
    assert list(classifier.stream(blank)) == [Prediction(text, None, None) for text in blank]
    probabilities = classifier.predict_proba(blank[:2])
    if kind != "onnx":  # those of the intercept
        intercept = safetensors.numpy.load_file(bundles[kind] / "head.safetensors")["intercept"]
        exponents = np.exp(intercept - intercept.max())
        np.testing.assert_allclose(probabilities, [exponents / exponents.sum()] * 2, atol=1e-6)
    assert classifier.predict_proba([]).shape == (0, 4)
    assert classifier.predict([]) == []
    assert list(classifier.stream([])) == []


@pytest.mark.parametrize("function", ["predict", "predict_proba"])
def test_single_string_is_rejected(classifiers: dict[str, Classifier], function: str) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        getattr(classifiers["static"], function)("Rain stops play")


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"batch_size": 0}])
def test_invalid_threads_and_batch_size_are_rejected(bundles: dict[str, Path], arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Classifier(bundles["static"], **arguments)


def test_interrupts_are_not_converted_to_bundle_errors(
    classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("setfit_kd.runtime.classify.shorten", interrupt)
    with pytest.raises(KeyboardInterrupt):
        classifiers["static"].predict(["goal"])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_chunks_and_threads_do_not_change_probabilities(
    bundles: dict[str, Path], classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # Set first, so that monkeypatch also undoes the change by the classifier.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    expected = classifiers[kind].predict_proba(TEXTS)
    for options in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 64}, {"threads": 1}):
        probabilities = Classifier(bundles[kind], **options).predict_proba(TEXTS)
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5 if kind == "onnx" else 0)
    monkeypatch.setattr("setfit_kd.runtime.classify._CHUNK_SIZE", 6)
    np.testing.assert_allclose(classifiers[kind].predict_proba(TEXTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["static", "onnx"])
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


def with_header(header: bytes, numbers: bytes = bytes(16)) -> bytes:
    return len(header).to_bytes(8, "little") + header + numbers


def entry(**changes: object) -> bytes:
    return with_header(json.dumps({"one": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}).encode())


CHANGES: list[dict[str, Any]] = [
    *({"dtype": dtype} for dtype in ("BF16", "F64", ["F32"])),
    *({"shape": shape} for shape in ([5], [10**30], "4")),
    *({"data_offsets": offsets} for offsets in ([0, 15], [0], ["0", "16"], [16, 32])),
]
HEADERS = [b"\xff\xfe", b"[]", b'{"one": 3}', b'{"one": {}}', b"[" * 100_000]


@pytest.mark.parametrize(
    "content",
    [b"", bytes(8), b"\xff" * 100, *(entry(**change) for change in CHANGES), *map(with_header, HEADERS)],
    ids=lambda content: repr(content[8:70]),
)
def test_invalid_safetensors_are_rejected(content: bytes) -> None:
    np.testing.assert_array_equal(read_safetensors(entry())["one"], np.zeros(4, np.float32))
    for length in {len(content), *range(min(100, len(content)))}:
        with pytest.raises(BundleError, match="safetensors"):
            read_safetensors(content[:length])


# Damaged bundles


def flip_bit(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_changed_or_missing_file_is_rejected(copy_bundle: Callable[[str], Path], kind: str, name: str) -> None:
    folder = copy_bundle(kind)
    flip_bit(name)(folder)
    with pytest.raises(BundleError, match=rf"{name} has changed since .*: copy the bundle again"):
        Classifier(folder)
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


def list_files(**hashes: object) -> Damage:
    """Change the hashes in the manifest; files changed to None are removed."""

    def damage(folder: Path) -> None:
        files = {**read_manifest(folder)["files"], **hashes}
        write_manifest(folder, {**read_manifest(folder), "files": {k: v for k, v in files.items() if v is not None}})

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


DAMAGED_BUNDLES: list[tuple[str, Damage, str, str]] = [
    ("manifest not UTF-8", write_manifest_bytes(b'{"format": "\xff"}'), "Cannot read", "static"),
    ("deeply nested manifest", write_manifest_bytes(b"[" * 100_000), "Cannot read", "static"),
    ("manifest is a list", write_manifest_bytes(b"[]"), "not the manifest", "static"),
    ("no format", change_manifest(format=None), "not the manifest", "static"),
    ("newer format", change_manifest(format=2), r"format 2.*reads formats up to 1.*classify\.py", "static"),
    ("unknown kind", change_manifest(kind="pickle"), "kind 'pickle', expected static or onnx", "static"),
    *(
        (f"no {name}", change_manifest(**{name: None}), f"missing or invalid fields: {name}", "static")
        for name in ("files", "kind", "normalize", "pad_id", "prefix", "special_tokens")
    ),
    *(
        (f"lists {name!r}", list_files(**{name: "0" * 64}), "not a plain file name", "static")
        for name in ("../x", "/etc/passwd", "a\\b", "C:x", "..", "", "nul\0byte")
    ),
    ("does not list the graph", list_files(**{"model.onnx": None}), "does not list model.onnx", "onnx"),
    ("hash is a number", list_files(**{"labels.json": 3}), "labels.json has changed since", "static"),
    ("labels are an object", with_content("labels.json", b'{"World": 0}'), "list of strings", "static"),
    ("truncated labels", with_content("labels.json", b'["World"'), "cannot be used", "static"),
    ("too few labels", with_content("labels.json", b'["a", "b", "c"]'), "3 labels for 4 classes", "static"),
    ("invalid tokenizer", with_content("tokenizer.json", b"\x00garbage"), "cannot be used", "static"),
    ("invalid head", with_content("head.safetensors", b"garbage"), "safetensors", "static"),
    *(
        (case, change_tensors(file, **{name: change}), message, "normalized")
        for case, file, name, change, message in (
            ("missing vector", "embeddings.safetensors", "embeddings", lambda a: a[:-1].copy(), "higher token ids"),
            ("missing column in the head", "head.safetensors", "coef", lambda a: a[:, 1:].copy(), "head"),
            ("missing row in the head", "head.safetensors", "coef", lambda a: a[1:].copy(), "head"),
            ("scalar intercept", "head.safetensors", "intercept", lambda a: np.array(a[0]), "head"),
        )
    ),
    ("token id beyond the vectors", raise_highest_token_id, "higher token ids", "static"),
    ("invalid graph", with_content("model.onnx", b"garbage"), "cannot be used", "onnx"),
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


def test_probabilities_that_are_not_finite_are_an_error(copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("static")
    change_tensors("head.safetensors", intercept=lambda a: a * np.float32("nan"))(folder)
    with pytest.raises(BundleError, match="not finite"):
        Classifier(folder).predict(["goal"])


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ("int64[n, t] input_ids, int64[n, t] attention_mask", "float[4] probabilities"),
        ("int64[n, t] input_ids, int64[n, t] attention_mask", "float[1, 4] logits"),
        ("int64[n, t] input_ids", "float[1, 4] probabilities"),
        ("int64[n, t] input_ids, int64[n, t] attention_mask, int64[n, t] extra", "float[1, 4] probabilities"),
    ],
)
def test_graph_with_other_inputs_or_outputs_is_rejected(
    copy_bundle: Callable[[str], Path], inputs: str, output: str
) -> None:
    from onnx.parser import parse_model

    folder = copy_bundle("onnx")
    kind, _, name = output.rpartition(" ")
    node = f"{name} = Constant <value = {kind} {{0.5, 0.5, 0, 0}}> ()"
    graph = f'<ir_version: 8, opset_import: ["" : 17]> graph ({inputs}) => ({output}) {{ {node} }}'
    replace_file(folder, "model.onnx", parse_model(graph).SerializeToString())
    with pytest.raises(BundleError, match="must map input_ids and attention_mask"):
        Classifier(folder)


@pytest.mark.parametrize("is_recognized", [True, False], ids=["marked", "in another encoding"])
@pytest.mark.parametrize("location", ["bundle", "working directory"])
def test_graph_with_external_files_is_rejected(
    copy_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, location: str, is_recognized: bool
) -> None:
    import onnx

    folder = copy_bundle("onnx")
    model = onnx.load(str(folder / "model.onnx"))
    onnx.save(model, "external.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert Path("weights.bin").stat().st_size > 100_000
    replace_file(folder, "model.onnx", Path("external.onnx").read_bytes())
    if location == "bundle":
        Path("weights.bin").rename(folder / "weights.bin")
        monkeypatch.chdir(folder)
    if not is_recognized:
        monkeypatch.setattr("setfit_kd.runtime.classify._EXTERNAL_DATA", b"another encoding")
    with pytest.raises(BundleError, match="stores tensors in other files" if is_recognized else "cannot be used"):
        Classifier(folder)


# Code in bundles

SPY = "from pathlib import Path\nPath({path!r}).write_text('ran')\n"


def test_code_in_a_bundle_is_not_executed(
    copy_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_bundle("onnx")
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


# classify.py in the bundle


@given(
    lines=st.lists(st.tuples(st.text(max_size=4), st.sampled_from(["\n", "\r\n", "\r", ""])), max_size=6),
    block=st.integers(1, 9),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_lines_are_split_as_in_a_text_file(lines: list[tuple[str, str]], block: int, mark: str) -> None:
    class Stream(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            return super().read1(block)

    content = (mark + "".join(line + end for line, end in lines)).encode()
    expected = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig")
    assert list(Lines(Stream(content))) == [line.removesuffix("\n") for line in expected]


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
def pythons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Environments with the packages that each kind of bundle needs."""
    packages = ("numpy", "tokenizers")
    return {
        "static": make_python(tmp_path_factory.mktemp("static"), *packages),
        "onnx": make_python(tmp_path_factory.mktemp("onnx"), *packages, "onnxruntime"),
    }


def run(python: Path, folder: Path, *arguments: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command: list[str | bytes] = [str(python), "-I", str(folder / "classify.py"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


def assert_output(process: subprocess.CompletedProcess[bytes], classifier: Classifier, texts: list[str]) -> None:
    assert (process.returncode, process.stderr) == (0, b"")
    records = [json.loads(line) for line in process.stdout.decode("utf-8").splitlines()]
    for record, prediction in zip(records, classifier.stream(texts), strict=True):
        assert list(record) == ["text", "label", "probability"]
        assert (record["text"], record["label"]) == (prediction.text, prediction.label)
        probability = prediction.probability
        assert record["probability"] == (None if probability is None else pytest.approx(probability, abs=1e-6))


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_classify_script_classifies_arguments_and_lines(
    pythons: dict[str, Path], bundles: dict[str, Path], classifiers: dict[str, Classifier], kind: str
) -> None:
    texts = ["Rain stops play", "", "  Ünïcödé, 東京 and 🙂", NEWS[3], "caf\ufffd goal"]
    encoded = [text.encode().replace("\ufffd".encode(), b"\xe9") for text in texts]
    other = bundles["onnx" if kind == "static" else "static"]
    assert_output(run(pythons[kind], other, "--bundle", str(bundles[kind]), *encoded), classifiers[kind], texts)
    assert_output(run(pythons[kind], bundles[kind], stdin=b"\r\n".join(encoded)), classifiers[kind], texts)
    assert_output(run(pythons[kind], bundles[kind], "--threads", "1", stdin=b""), classifiers[kind], [])


def test_lines_are_answered_as_they_arrive_until_an_interrupt(
    pythons: dict[str, Path], bundles: dict[str, Path]
) -> None:
    with live_process([pythons["static"], "-I", bundles["static"] / "classify.py"]) as process:
        for part, texts in (("a text\nder Schl", ["a text"]), ("uß\n\ngoal\n", ["der Schluß", "", "goal"])):
            process.stdin.write(part.encode())
            process.stdin.flush()
            assert [json.loads(process.stdout.readline())["text"] for _ in texts] == texts
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stderr.read()) == (130, b"")


def test_closed_stdout_ends_the_script_quietly(pythons: dict[str, Path], bundles: dict[str, Path]) -> None:
    with live_process([pythons["static"], "-I", bundles["static"] / "classify.py"]) as process:
        process.stdin.write(b"Rain stops play\n" * 100)
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == "Rain stops play"
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.write(b"Rain stops play\n" * 20_000)
            process.stdin.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        pytest.param("static", flip_bit("embeddings.safetensors"), id="flipped bit"),
        pytest.param("static", with_content("tokenizer.json", b"{\n\n"), id="truncated tokenizer"),
        pytest.param("onnx", truncate_graph, id="truncated graph"),
        pytest.param("onnx", None, id="no onnxruntime"),
    ],
)
def test_damaged_bundle_gives_a_one_line_error(
    pythons: dict[str, Path], copy_bundle: Callable[[str], Path], kind: str, damage: Damage | None
) -> None:
    folder = copy_bundle(kind)
    if damage is not None:
        damage(folder)
    process = run(pythons[kind if damage else "static"], folder, "x")
    (line,) = process.stderr.decode("utf-8").splitlines()
    assert (process.returncode, process.stdout) == (1, b"")
    assert line.startswith("Error: " if damage else "Error: This bundle needs onnxruntime: pip install onnxruntime")
