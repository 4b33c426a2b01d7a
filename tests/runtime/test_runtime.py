"""Tests of `setfit_kd.runtime`: predictions of bundles, damaged bundles, and use without the package."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
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
from predictions import live_process, read_manifest, replace_file
from synthetic import random_classifier

from setfit_kd.export.bundle import export_bundle
from setfit_kd.models.bodies import load_body
from setfit_kd.models.static import static_body
from setfit_kd.runtime.classify import (
    HEAD,
    VECTORS,
    BundleError,
    Classifier,
    Lines,
    MultiLabelPrediction,
    Prediction,
    read_safetensors,
)

Floats = npt.NDArray[np.float32]
Damage = Callable[[Path], object]

NEWS = [row["text"] for row in newswire("train")]
TEXTS = [*NEWS[:40], "", " ", "goal", "Ünïcödé, 東京 and 🙂", "tab\tand\r\nnew line", " ".join(NEWS[:9]), NEWS[0]]
LABELS = ["World", "Übermorgen", "a, b", "two\nlines"]
KINDS = ["static", "normalized", "onnx"]


# Bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> dict[str, Path]:
    """One bundle per kind: static, static with normalized means, and ONNX; tests must not change them."""
    transformer = load_body(tiny_student)
    static = static_body(transformer, NEWS[:100], dimension=8)
    folder = tmp_path_factory.mktemp("bundles")
    for kind in KINDS:
        body = transformer if kind == "onnx" else static
        model = random_classifier(body, LABELS, NEWS[:100], normalize=kind == "normalized")
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


# Predictions


@pytest.mark.parametrize("kind", KINDS)
def test_predict_and_stream_match_the_probabilities(classifiers: dict[str, Classifier], kind: str) -> None:
    classifier = classifiers[kind]
    assert classifier.labels == LABELS
    probabilities = classifier.predict_proba(TEXTS)
    assert probabilities.shape == (len(TEXTS), 4)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    columns = probabilities.argmax(axis=1)
    assert len(set(columns)) > 1
    labels = [LABELS[column] if text.strip() else None for text, column in zip(TEXTS, columns, strict=True)]
    assert classifier.predict(TEXTS) == labels
    for chunk_size in (1, 7, 1000):
        predictions = list(classifier.stream(iter(TEXTS), chunk_size=chunk_size))
        assert [prediction[:2] for prediction in predictions] == list(zip(TEXTS, labels, strict=True))
        for prediction, row in zip(predictions, probabilities, strict=True):
            assert prediction.probability == (pytest.approx(row.max(), abs=1e-5) if prediction.text.strip() else None)
    blank = ["", " \t\u3000\r\n", "\u200b\u00ad\ufe0f\U000e0041"]
    assert list(classifier.stream(blank)) == [Prediction(text, None, None) for text in blank]
    assert classifier.predict_proba([]).shape == (0, 4)
    assert classifier.predict([]) == []


def test_invalid_arguments_are_rejected(bundles: dict[str, Path], classifiers: dict[str, Classifier]) -> None:
    for function in (classifiers["static"].predict, classifiers["static"].predict_proba):
        with pytest.raises(TypeError, match="list of texts"):
            function("Rain stops play")
    for arguments in ({"threads": 0}, {"batch_size": 0}):
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
def test_chunks_and_threads_do_not_change_probabilities(
    bundles: dict[str, Path], classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # Set first, so that monkeypatch also undoes the change by the classifier.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    expected = classifiers[kind].predict_proba(TEXTS)
    monkeypatch.setattr("setfit_kd.runtime.classify._CHUNK_SIZE", 6)
    for classifier in (classifiers[kind], Classifier(bundles[kind], threads=1)):
        np.testing.assert_allclose(classifier.predict_proba(TEXTS), expected, rtol=0, atol=1e-5)


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


@settings(max_examples=30)
@given(
    arrays=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        hnp.arrays(st.sampled_from(["float16", "float32"]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)),
        max_size=4,
    ),
    metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1),
)
def test_safetensors_are_read_like_by_the_safetensors_library(
    arrays: dict[str, npt.NDArray[Any]], metadata: dict[str, str] | None
) -> None:
    content = safetensors.numpy.save(arrays, metadata)
    expected, actual = safetensors.numpy.load(content), read_safetensors(content)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array.astype(np.float32), strict=True)


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(16)


def entry(**changes: object) -> bytes:
    return with_header(json.dumps({"one": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}).encode())


CHANGES: list[dict[str, Any]] = [
    *({"dtype": dtype} for dtype in ("BF16", ["F32"])),
    *({"shape": shape} for shape in ([5], [10**30], "4")),
    *({"data_offsets": offsets} for offsets in ([0, 15], [0], ["0", "16"], [16, 32])),
]
HEADERS = [b"\xff\xfe", b"[]", b'{"one": 3}', b'{"one": {}}', b"[" * 100_000]


@pytest.mark.parametrize(
    "content",
    [bytes(8), b"\xff" * 100, *(entry(**change) for change in CHANGES), *map(with_header, HEADERS)],
    ids=lambda content: repr(content[8:70]),
)
def test_invalid_safetensors_are_rejected(content: bytes) -> None:
    np.testing.assert_array_equal(read_safetensors(entry())["one"], np.zeros(4, np.float32))
    for length in {len(content), *range(min(100, len(content)))}:
        with pytest.raises(BundleError, match="safetensors"):
            read_safetensors(content[:length])


# Damaged bundles


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_changed_or_missing_file_is_rejected(copy_bundle: Callable[[str], Path], kind: str) -> None:
    folder = copy_bundle(kind)
    names = ["embeddings.safetensors", "head.safetensors"] if kind == "static" else ["model.onnx"]
    for name in ("labels.json", "tokenizer.json", *names):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes([original[0] ^ 1]) + original[1:])
        with pytest.raises(BundleError, match=rf"{name} has changed since .*: copy the bundle again"):
            Classifier(folder)
        (folder / name).unlink()
        with pytest.raises(BundleError, match=rf"Cannot read .*{name} .*incomplete"):
            Classifier(folder)
        (folder / name).write_bytes(original)


def test_path_that_is_not_a_bundle_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    for name in ("nowhere", "empty", "file"):
        with pytest.raises(BundleError, match=name):
            Classifier(tmp_path / name)


def change_manifest(**changes: Any) -> Damage:
    return lambda folder: (folder / "manifest.json").write_text(json.dumps({**read_manifest(folder), **changes}))


def write_manifest(content: bytes) -> Damage:
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def with_content(name: str, content: bytes) -> Damage:
    return lambda folder: replace_file(folder, name, content)


def change_tensor(file: str, name: str, change: Callable[[Any], Any]) -> Damage:
    """Change a tensor of a file and update its hash."""

    def damage(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / file)
        replace_file(folder, file, safetensors.numpy.save({**tensors, name: change(tensors[name])}))

    return damage


DAMAGED_BUNDLES: dict[str, tuple[Damage, str, str]] = {
    "manifest not UTF-8": (write_manifest(b'{"format": "\xff"}'), "Cannot read", "static"),
    "deeply nested manifest": (write_manifest(b"[" * 100_000), "Cannot read", "static"),
    "manifest is a list": (write_manifest(b"[]"), "not the manifest", "static"),
    "no format": (change_manifest(format=None), "not the manifest", "static"),
    "newer format": (change_manifest(format=4), r"format 4.*reads formats up to 3.*classify\.py", "static"),
    "unknown task": (change_manifest(task=["x"]), "task .*expected single-label or multi-label", "static"),
    **{
        f"thresholds {thresholds} for a {task} model": (
            change_manifest(task=task, thresholds=thresholds),
            "thresholds must be a number|cannot be used",
            "static",
        )
        for task, thresholds in [
            ("single-label", [0.5] * 4),
            *(("multi-label", values) for values in ([0.5] * 3, [0.5, 0.5, 0.5, 1.1], [None] * 4, "x", [[0.5] * 4])),
        ]
    },
    "unknown kind": (change_manifest(kind="pickle"), "kind 'pickle', expected static or onnx", "static"),
    "no fields": (change_manifest(files=None, kind=3), "missing or invalid fields: files, kind", "static"),
    **{
        f"lists {name!r}": (change_manifest(files={name: "0" * 64}), "not a plain file name", "static")
        for name in ("../x", "/etc/passwd", "a\\b", "C:x", "..", "", "nul\0byte")
    },
    "does not list the graph": (change_manifest(kind="onnx"), "does not list model.onnx", "static"),
    "labels are an object": (with_content("labels.json", b'{"World": 0}'), "list of strings", "static"),
    "truncated labels": (with_content("labels.json", b'["World"'), "cannot be used", "static"),
    "too few labels": (with_content("labels.json", b'["a", "b", "c"]'), "3 labels for 4 classes", "static"),
    "invalid tokenizer": (with_content("tokenizer.json", b"\x00garbage"), "cannot be used", "static"),
    "missing vector": (change_tensor(VECTORS, "embeddings", lambda a: a[:-1].copy()), "higher token ids", "normalized"),
    "missing column": (change_tensor(HEAD, "coef", lambda a: a[:, 1:].copy()), "Shapes do not match", "normalized"),
    "scalar intercept": (change_tensor(HEAD, "intercept", lambda a: np.array(a[0])), "Shapes", "static"),
    "invalid graph": (with_content("model.onnx", b"garbage"), "cannot be used", "onnx"),
}


@pytest.mark.parametrize(("damage", "message", "kind"), DAMAGED_BUNDLES.values(), ids=DAMAGED_BUNDLES)
def test_damaged_bundle_is_rejected(
    copy_bundle: Callable[[str], Path], damage: Damage, message: str, kind: str
) -> None:
    folder = copy_bundle(kind)
    damage(folder)
    with pytest.raises(BundleError, match=message):
        Classifier(folder)


def test_multi_label_bundle_predicts_all_labels_that_reach_their_thresholds(
    copy_bundle: Callable[[str], Path], classifiers: dict[str, Classifier]
) -> None:
    thresholds = [0.4, 0.7, 0.9, 1.0]
    folder = copy_bundle("static")
    change_manifest(format=2, task="multi-label", thresholds=thresholds)(folder)
    classifier, single_label = Classifier(folder), classifiers["static"]
    assert (classifier.task, single_label.task, single_label.thresholds) == ("multi-label", "single-label", None)
    probabilities = classifier.predict_proba(TEXTS)
    # The logits are those of the softmax, up to a constant per text.
    logits = np.log(probabilities) - np.log1p(-probabilities) - np.log(single_label.predict_proba(TEXTS))
    np.testing.assert_allclose(logits, logits[:, :1] + np.zeros(4), rtol=0, atol=1e-3)
    labels: list[Any] = []
    for row, text in zip(probabilities, TEXTS, strict=True):
        reached = [name for name, value, least in zip(LABELS, row, thresholds, strict=True) if value >= least]
        labels.append(reached if text.strip() else None)
    assert classifier.predict(TEXTS) == labels
    assert {len(row) for row in labels if row is not None} >= {0, 1, 2}
    for prediction, row, expected in zip(classifier.stream(TEXTS), probabilities, labels, strict=True):
        values: Any = expected and pytest.approx([row[LABELS.index(name)] for name in expected], abs=1e-5)
        assert prediction == MultiLabelPrediction(prediction.text, expected, values)
    change_manifest(thresholds=None)(folder)
    half = [[LABELS[column] for column in np.flatnonzero(row >= 0.5)] for row in probabilities]
    assert Classifier(folder).predict(NEWS[:40]) == half[:40]


def test_probabilities_of_extreme_logits_are_zero_and_one(copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("static")
    intercept = np.array([-1e4, 1e4, 3e38, -3e38], np.float32)
    change_tensor(HEAD, "intercept", lambda _: intercept)(folder)
    change_manifest(task="multi-label")(folder)
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_array_equal(Classifier(folder).predict_proba(["goal"]), [[0, 1, 1, 0]])


def test_probabilities_that_are_not_finite_are_an_error(copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("static")
    change_tensor(HEAD, "intercept", lambda a: a * np.float32("nan"))(folder)
    with pytest.raises(BundleError, match="not finite"):
        Classifier(folder).predict(["goal"])


@pytest.mark.parametrize("change", ["[4] probabilities", "[1, 4] logits", "one input"])
def test_graph_with_other_inputs_or_outputs_is_rejected(copy_bundle: Callable[[str], Path], change: str) -> None:
    from onnx.parser import parse_model

    folder = copy_bundle("onnx")
    inputs = "int64[n, t] input_ids" + (", int64[n, t] attention_mask" if change != "one input" else "")
    shape, _, name = ("[1, 4] probabilities" if change == "one input" else change).rpartition(" ")
    node = f"{name} = Constant <value = float{shape} {{0.5, 0.5, 0, 0}}> ()"
    graph = f'<ir_version: 8, opset_import: ["" : 17]> graph ({inputs}) => (float{shape} {name}) {{ {node} }}'
    replace_file(folder, "model.onnx", parse_model(graph).SerializeToString())
    with pytest.raises(BundleError, match="must map input_ids and attention_mask"):
        Classifier(folder)


@pytest.mark.parametrize("is_recognized", [True, False], ids=["marked", "in another encoding"])
def test_graph_with_external_files_is_rejected(
    copy_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, is_recognized: bool
) -> None:
    import onnx

    folder = copy_bundle("onnx")
    model = onnx.load(str(folder / "model.onnx"))
    onnx.save(model, "external.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    replace_file(folder, "model.onnx", Path("external.onnx").read_bytes())
    shutil.copy("weights.bin", folder)
    if not is_recognized:
        monkeypatch.setattr("setfit_kd.runtime.classify._EXTERNAL_DATA", b"another encoding")
    with pytest.raises(BundleError, match="stores tensors in other files" if is_recognized else "cannot be used"):
        Classifier(folder)


def test_code_in_a_bundle_is_not_executed(
    copy_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_bundle("onnx")
    evidence = tmp_path / "evidence"
    for name in ("classify.py", "numpy.py", "onnxruntime.py", "sitecustomize.py", "__init__.py"):
        (folder / name).write_text(f"from pathlib import Path\nPath({str(evidence)!r}).write_text('ran')\n")

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
        package_folder = Path(str(importlib.import_module(package).__file__)).parent
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


def run(python: Path, folder: Path, *arguments: Any, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [python, "-I", folder / "classify.py", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


def assert_output(process: subprocess.CompletedProcess[bytes], classifier: Classifier, texts: list[str]) -> None:
    assert (process.returncode, process.stderr) == (0, b"")
    records = [json.loads(line) for line in process.stdout.decode("utf-8").splitlines()]
    for record, prediction in zip(records, classifier.stream(texts), strict=True):
        assert tuple(record) == prediction._fields
        text, label, probability = record.values()
        assert (text, label) == prediction[:2]
        assert probability == (None if label is None else pytest.approx(prediction[2], abs=1e-6))


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_classify_script_classifies_arguments_and_lines(
    pythons: dict[str, Path], bundles: dict[str, Path], classifiers: dict[str, Classifier], kind: str
) -> None:
    texts = ["Rain stops play", "", "  Ünïcödé, 東京 and 🙂", NEWS[3], "caf\ufffd goal"]
    encoded = [text.encode().replace("\ufffd".encode(), b"\xe9") for text in texts]
    other = bundles["onnx" if kind == "static" else "static"]
    assert_output(run(pythons[kind], other, "--bundle", bundles[kind], *encoded), classifiers[kind], texts)
    assert_output(run(pythons[kind], bundles[kind], stdin=b"\r\n".join(encoded)), classifiers[kind], texts)
    assert_output(run(pythons[kind], bundles[kind], "--threads", "1", stdin=b""), classifiers[kind], [])


def test_classify_script_prints_all_labels_of_a_multi_label_bundle(
    pythons: dict[str, Path], copy_bundle: Callable[[str], Path]
) -> None:
    folder = copy_bundle("static")
    change_manifest(format=2, task="multi-label", thresholds=[0.1, 0.5, 0.7, 1.0])(folder)
    process = run(pythons["static"], folder, *NEWS[:5], " ")
    assert_output(process, Classifier(folder), [*NEWS[:5], " "])
    assert list(json.loads(process.stdout.splitlines()[-1]).items()) == [
        ("text", " "),
        ("labels", None),
        ("probabilities", None),
    ]


@pytest.fixture(params=["predict", "classify.py"])
def command(
    request: pytest.FixtureRequest,
    pythons: dict[str, Path],
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """A command that classifies lines of stdin in a Python without torch."""
    if request.param == "classify.py":
        return [str(pythons["static"]), "-I", str(bundles["static"] / "classify.py")]
    modules = ["torch", "setfit", "sentence_transformers", "transformers"]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules}))\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    return [sys.executable, "-m", "setfit_kd", "predict", str(bundles["static"]), "-q"]


def test_lines_are_answered_as_they_arrive_until_an_interrupt(command: list[str]) -> None:
    with live_process(command) as process:
        for part, texts in (("a text\nder Schl", ["a text"]), ("uß\n\ngoal\n", ["der Schluß", "", "goal"])):
            process.stdin.write(part.encode())
            process.stdin.flush()
            answers = [json.loads(process.stdout.readline()) for _ in texts]
            assert [answer["text"] or "" for answer in answers] == texts
            assert [answer["label"] is not None for answer in answers] == [text != "" for text in texts]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read().split() == ([b"Interrupted."] if "predict" in command else [])


def test_closed_stdout_ends_the_command_quietly(command: list[str]) -> None:
    with live_process(command) as process:
        process.stdin.write(b"Rain stops play\n" * 100)
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == "Rain stops play"
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.write(b"Rain stops play\n" * 20_000)
            process.stdin.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 1 if "predict" in command else 0)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        pytest.param("static", with_content("tokenizer.json", b"{\n\n"), id="truncated tokenizer"),
        pytest.param("onnx", with_content("model.onnx", b"\x08\x08garbage"), id="damaged graph"),
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
