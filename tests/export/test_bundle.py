"""Tests of the export of bundles: content, parity check and rejected models."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checks import assert_refused, invoke, read_tree
from conftest import FAST, make_body, newswire
from predictions import read_manifest
from sklearn.linear_model import RidgeClassifier
from sklearn.multiclass import OneVsRestClassifier
from synthetic import random_classifier

from setfit_kd import TeacherSignals, distill
from setfit_kd.errors import InputError, ModelError, OutputError, SetFitKDError, UnavailableError
from setfit_kd.export import bundle as bundle_module
from setfit_kd.export.bundle import Bundle, export_bundle, write_onnx
from setfit_kd.models.bodies import BodySource, load_body
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import new_head, set_thresholds
from setfit_kd.models.static import static_body
from setfit_kd.runtime import classify
from setfit_kd.runtime.classify import Classifier
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL, Task

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

MAX_LENGTH = 64
NEWS = [row["text"] for row in newswire("train")]
TEXTS = [
    *(*NEWS[:40], "", " ", "goal", "  two  spaces\tand a tab ", "Ünïcödé, 東京 and 🙂"),
    *(" ".join(NEWS[:n]) for n in (2, 3, 5, 20)),
    *(" ".join(NEWS[50].split()[:n]) for n in (2, 3, 4, 7)),
]
"""Texts of many lengths, from empty to far longer than the maximum length."""
Bodies = Callable[[str], "SentenceTransformer"]


@pytest.fixture(scope="session")
def bodies(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path, make_encoder: Callable[..., Path]) -> Bodies:
    """Function that returns a new copy of a body of some kind."""
    bert, folder = load_body(tiny_student), tmp_path_factory.mktemp("models") / "roberta"
    roberta = load_body(make_body(folder, layers=2, width=16, roberta=True))
    loaded = {"BERT": bert, "RoBERTa": roberta, "static": static_body(bert, NEWS[:200], dimension=8)}
    loaded["transformer"] = BodySource(make_encoder("bert"), "transformer").load([f"class {i}" for i in range(4)])
    return lambda name: copy.deepcopy(loaded[name])


def with_module(body: SentenceTransformer, *modules: torch.nn.Module) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(modules=[*body, *modules], device="cpu")


def make_classifier(body: SentenceTransformer, classes: int = 4, normalize: str = "", task: Task = SINGLE_LABEL) -> Any:
    """Create a classifier that predicts every label for some texts and may normalize by a module or a flag."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    body = with_module(body, Normalize()) if normalize == "module" else body
    labels = [f"class {number}" for number in range(classes)]
    return random_classifier(body, labels, NEWS[:100], normalize=normalize == "flag", task=task)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """An empty folder to export into."""
    folder = tmp_path / "bundles"
    folder.mkdir()
    return folder


def export(model: SetFitModel, parent: Path, *, texts: list[str] = TEXTS, **settings: Any) -> Bundle:
    return export_bundle(model, parent / "bundle", texts=texts, **settings)


def assert_same_probabilities(folder: Path, model: SetFitModel, tolerance: float) -> None:
    """Check that a bundle predicts the probabilities of the model, for any order of texts and any batch size."""
    expected = predict_proba(model, TEXTS)
    assert len(set(expected.argmax(axis=1))) == expected.shape[1], "every class must be predicted for some text"
    shuffled = np.random.default_rng(1).permutation(len(TEXTS))
    for batch_size, order in ((64, np.arange(len(TEXTS))), (7, shuffled), (1, shuffled[::-1])):
        classifier = Classifier(folder, batch_size=batch_size)
        assert classifier.labels == list(model.labels)
        probabilities = classifier.predict_proba([TEXTS[row] for row in order])
        np.testing.assert_allclose(probabilities, expected[order], rtol=0, atol=tolerance)


# Probabilities

TOLERANCE = {"onnx": 1e-4, "static": 0.02}
"""Half precision has a relative error of at most 1/2048, which changes logits below 100 by a few hundredths."""


@pytest.mark.parametrize(
    ("architecture", "normalize", "classes"), [("BERT", "", 4), ("BERT", "flag", 4), ("RoBERTa", "module", 2)]
)
def test_onnx_bundle_predicts_the_probabilities_of_torch(
    bodies: Bodies, parent: Path, architecture: str, normalize: str, classes: int
) -> None:
    model = make_classifier(bodies(architecture), classes, normalize)
    bundle = export(model, parent, format="onnx", min_agreement=1)
    assert_same_probabilities(bundle.path, model, TOLERANCE["onnx"])
    assert bundle.parity["largest_difference"] < TOLERANCE["onnx"]
    manifest = read_manifest(bundle.path)
    assert (manifest["kind"], manifest["weights"], manifest["n_classes"]) == ("onnx", "fp32", classes)
    assert (manifest["max_length"], manifest["pad_id"]) == (MAX_LENGTH, 0 if architecture == "BERT" else 1)


@pytest.mark.parametrize(
    ("largest", "normalize", "classes"),
    [(None, "", 4), (None, "flag", 4), (3e7, "", 2), (3e7, "module", 2), (3e-7, "", 4), (3e-7, "flag", 4)],
)
def test_static_bundle_predicts_the_probabilities_of_torch(
    bodies: Bodies, parent: Path, normalize: str, classes: int, largest: float | None
) -> None:
    """Vectors outside the range of half precision are scaled; vectors in half precision are exact."""
    body: Any = bodies("static")
    vectors = body[0].embedding.weight
    with torch.no_grad():
        vectors.copy_(vectors.half().float() if largest is None else vectors * largest / vectors.abs().max())
    model = make_classifier(body, classes, normalize)
    bundle = export(model, parent, min_agreement=0)
    assert bundle.format == "static"
    assert bundle.parity["largest_difference"] < TOLERANCE["static"]
    assert_same_probabilities(bundle.path, model, 1e-4 if largest is None else TOLERANCE["static"])
    manifest = read_manifest(bundle.path)
    assert (manifest["kind"], manifest["weights"], manifest["n_classes"]) == ("static", "fp16", classes)


THRESHOLDS = [0.2, 0.5, 0.8, 0.95]


@pytest.mark.parametrize(
    ("body", "normalize", "thresholds"),
    [
        ("BERT", "flag", THRESHOLDS),
        ("transformer", "", THRESHOLDS),
        ("static", "", THRESHOLDS),
        ("static", "flag", None),
    ],
)
def test_multi_label_bundle_predicts_the_labels_of_torch(
    bodies: Bodies, parent: Path, body: str, normalize: str, thresholds: list[float] | None
) -> None:
    model = make_classifier(bodies(body), normalize=normalize, task=MULTI_LABEL)
    model.model_head = set_thresholds(model.model_head, None if thresholds is None else np.array(thresholds))
    kind = "static" if body == "static" else "onnx"
    bundle = export(model, parent, format=kind, min_agreement=0.9)
    manifest = read_manifest(bundle.path)
    assert [manifest[name] for name in ("format", "task", "thresholds")] == [2, "multi-label", thresholds]
    classifier, expected = Classifier(bundle.path), predict_proba(model, TEXTS)
    actual = classifier.predict_proba(TEXTS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[kind])
    decided = [actual >= (thresholds or 0.5), expected >= (thresholds or 0.5)]
    assert bundle.parity["agreement"] == pytest.approx((decided[0] == decided[1]).all(axis=1).mean())
    assert len({row.tobytes() for row in decided[0]}) > 4
    labels = [[model.labels[column] for column in np.flatnonzero(row)] for row in decided[0]]
    assert classifier.predict(TEXTS) == [row if text.strip() else None for row, text in zip(labels, TEXTS, strict=True)]
    readme = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "any number of labels, or none" in readme
    assert f"{bundle.parity['agreement']:.1%} of the decisions for a label are the same" in readme


def set_prompt(body: Any) -> None:
    body.prompts, body.default_prompt_name = {"other": "chip data: ", "classify": "bank shares: "}, "classify"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("onnx", lambda body: setattr(body, "max_seq_length", 16)),
        ("onnx", lambda body: setattr(body.tokenizer, "truncation_side", "left")),
        ("onnx", set_prompt),
        ("static", lambda body: body.tokenizer.enable_truncation(8)),
        ("static", set_prompt),
    ],
)
def test_texts_are_truncated_and_prefixed_as_in_torch(
    bodies: Bodies, parent: Path, kind: str, change: Callable[[Any], None]
) -> None:
    body = bodies("static" if kind == "static" else "BERT")
    unchanged = make_classifier(copy.deepcopy(body))
    change(body)
    model = make_classifier(body)
    bundle = export(model, parent, texts=["short", "texts"], format=kind, min_agreement=0)
    actual, expected = Classifier(bundle.path).predict_proba(TEXTS), predict_proba(model, TEXTS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[kind])
    assert np.abs(actual - predict_proba(unchanged, TEXTS)).max() > 2 * TOLERANCE[kind]


# 8 bits


def set_measured_seconds(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Return these values, in order, from the time measurements of bundles."""
    values = iter(seconds)
    monkeypatch.setattr(bundle_module.Draft, "measure_seconds", lambda self: next(values))


def test_int8_bundle_is_smaller_and_has_a_head_in_single_precision(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    set_measured_seconds(monkeypatch, 2.0, 1.0)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    model = make_classifier(bodies("BERT"))
    single = export_bundle(model, parent / "single", texts=TEXTS, format="onnx")
    bundle = export(model, parent, format="onnx-int8", min_agreement=0.5)
    assert logging.getLogger().handlers == [], "a handler of the root logger would print all warnings twice"
    assert (bundle.format, bundle.int8_rejection_reason) == ("onnx-int8", None)
    assert (bundle.path / "model.onnx").stat().st_size < 0.8 * (single.path / "model.onnx").stat().st_size
    manifest = read_manifest(bundle.path)
    assert (manifest["kind"], manifest["weights"], manifest["parity"]) == ("onnx", "int8", bundle.parity)
    expected, actual = predict_proba(model, TEXTS), Classifier(bundle.path).predict_proba(TEXTS)
    difference, same = float(np.abs(actual - expected).max()), actual.argmax(axis=1) == expected.argmax(axis=1)
    assert 1e-6 < difference < 0.5
    assert list(bundle.parity.values()) == pytest.approx([len(TEXTS), same.mean(), difference], abs=1e-6)
    arrays = map(onnx.numpy_helper.to_array, onnx.load(str(bundle.path / "model.onnx")).graph.initializer)
    (matrix,) = (array for array in arrays if array.ndim == 2 and array.dtype == np.float32)
    np.testing.assert_array_equal(matrix if len(matrix) == 4 else matrix.T, model.model_head.coef_.astype(np.float32))


def test_narrowing_layers_stay_in_single_precision_if_8_bits_are_not_good_enough(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import onnx

    caplog.set_level("INFO", "setfit_kd")
    set_measured_seconds(monkeypatch, 2.0, 1.0)
    results = iter([(1.0, 0.0), (0.9, 0.3), (0.99, 0.1)])  # single precision, 8 bits, mixed
    monkeypatch.setattr(bundle_module.Draft, "compare", lambda self: next(results))
    body: Any = bodies("BERT")
    bundle = export(make_classifier(body), parent, format="onnx-int8")
    assert (bundle.format, bundle.parity["agreement"]) == ("onnx-int8", 0.99)
    assert "left in single precision (agreement too low" in caplog.text
    config = body[0].auto_model.config
    arrays = map(onnx.numpy_helper.to_array, onnx.load(str(bundle.path / "model.onnx")).graph.initializer)
    matrices = [(array.shape, array.dtype) for array in arrays if array.ndim == 2]
    wide, narrow = (config.hidden_size, config.intermediate_size), (config.intermediate_size, config.hidden_size)
    assert matrices.count((narrow, np.dtype(np.float32))) == config.num_hidden_layers
    assert matrices.count((wide, np.dtype(np.int8))) == config.num_hidden_layers


@pytest.mark.parametrize(
    ("after", "min_agreement", "reason"),
    [
        (1.0, None, "agreement too low: the onnx-int8 bundle and .* expected at least 98.00%"),
        (2.0, 0.1, r"not faster on this CPU \(1\.00 times the time\)"),
    ],
)
def test_single_precision_is_used_if_int8_is_not_good_enough(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, after: float, min_agreement: Any, reason: str
) -> None:
    set_measured_seconds(monkeypatch, 2.0, after)
    body: Any = bodies("BERT")
    if min_agreement is None:
        with torch.no_grad():
            # The large vector of [MASK], which is in no text, leaves few of the 256 levels for the other tokens.
            body[0].auto_model.embeddings.word_embeddings.weight[4] = 1e5
    model = make_classifier(body)
    bundle = export(model, parent, min_agreement=min_agreement)
    assert bundle.format == "onnx"
    assert re.search(reason, bundle.int8_rejection_reason or "")
    plain = export_bundle(model, parent / "plain", texts=TEXTS, format="onnx")
    assert read_tree(bundle.path) == read_tree(plain.path)


def test_at_most_1000_texts_are_checked(bodies: Bodies, parent: Path) -> None:
    model, texts = make_classifier(bodies("static")), [f"{NEWS[row % len(NEWS)]} {row}" for row in range(2345)]
    for some, n_checked in ((texts[:1], 1), (texts, 1000)):
        bundle = export(model, parent, texts=some, min_agreement=0, overwrite=True)
        assert bundle.parity["texts"] == read_manifest(bundle.path)["parity"]["texts"] == n_checked


def test_agreement_counts_decisions_of_all_labels(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_classifier(bodies("BERT"), task=MULTI_LABEL)
    has_last_label = predict_proba(model, TEXTS)[:, 3] >= 0.5

    def write_without_last_label(model: SetFitModel, file: Path) -> None:
        changed = copy.deepcopy(model)
        changed.model_head.estimators_[3].intercept_ -= 1e4
        write_onnx(changed, file)

    monkeypatch.setattr(bundle_module, "write_onnx", write_without_last_label)
    bundle = export(model, parent, format="onnx", min_agreement=0)
    assert bundle.parity["agreement"] == pytest.approx(1 - has_last_label.mean() / 4)
    assert 0 < bundle.parity["agreement"] < 1


def test_min_agreement_is_the_threshold(bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = make_classifier(bodies("BERT")), NEWS[:200]
    columns = predict_proba(model, texts).argmax(axis=1)
    texts = [texts[row] for label in range(4) for row in np.flatnonzero(columns == label)[:5]]

    def write_without_last_class(model: SetFitModel, file: Path) -> None:
        before = model.model_head.intercept_.copy()
        model.model_head.intercept_[3] = -1e4
        write_onnx(model, file)
        model.model_head.intercept_ = before

    monkeypatch.setattr(bundle_module, "write_onnx", write_without_last_class)
    with pytest.raises(ModelError, match=r"75\.00% of 20 texts.* at least 76\.00%") as error_info:
        export(model, parent, texts=texts, format="onnx", min_agreement=0.76)
    assert "--min-agreement" in str(error_info.value.hint)
    assert list(parent.iterdir()) == []
    assert export(model, parent, texts=texts, format="onnx", min_agreement=0.74).parity["agreement"] == 0.75


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("onnx", ["model.onnx"]),
        ("onnx-int8", ["model.onnx"]),
        ("static", ["embeddings.safetensors", "head.safetensors"]),
    ],
)
def test_bundle_contains_exactly_its_files(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, kind: str, weights: list[str]
) -> None:
    model = make_classifier(bodies("static" if kind == "static" else "BERT"))
    labels = model.labels = ["Übermorgen", "a, b", "{weird}", "4"]
    set_measured_seconds(monkeypatch, 2.0, 1.0)
    bundle = export(model, parent, format=kind, min_agreement=0.1, title="Tiny model")
    assert [path.name for path in parent.iterdir()] == ["bundle"]
    files = {file.name: file.read_bytes() for file in bundle.path.iterdir()}
    hashed = {"labels.json", "tokenizer.json", "classify.py", *weights}
    assert set(files) == {"manifest.json", "README.md", *hashed}
    manifest = read_manifest(bundle.path)
    assert manifest["files"] == {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(hashed)}
    assert (manifest["format"], manifest.keys() & {"task", "thresholds"}) == (1, set())
    assert manifest["made_by"].startswith("setfit-kd ")
    assert (bundle.format, bundle.megabytes) == (kind, round(sum(map(len, files.values())) / 1e6, 1))
    assert files["classify.py"] == Path(classify.__file__).read_bytes()
    assert json.loads(files["labels.json"]) == Classifier(bundle.path).labels == labels
    (parent / "new").touch()
    assert {file.stat().st_mode for file in bundle.path.iterdir()} == {(parent / "new").stat().st_mode}
    readme = files["README.md"].decode()
    assert readme.startswith("# Tiny model\n")
    assert "with 4 classes: Übermorgen, a, b, \\{weird\\}, 4." in readme
    assert f"pip install numpy tokenizers{'' if kind == 'static' else ' onnxruntime'}\n" in readme
    assert f"On {len(TEXTS)} texts, {bundle.parity['agreement']:.1%} of the labels are the same" in readme


# Rejected models and settings


RIDGE = OneVsRestClassifier(RidgeClassifier()).fit(np.eye(4), np.eye(4))


def add_layer(model: Any) -> None:
    from sentence_transformers.base.modules import Dense

    model.model_body = with_module(model.model_body, Dense(8, 8))


def exclude_prompt(model: Any) -> None:
    set_prompt(model.model_body)
    model.model_body[1].include_prompt = False


@pytest.mark.parametrize(
    ("body", "change", "format_", "message"),
    [
        ("BERT", None, "static", "Only static bodies.*\n.*onnx-int8"),
        ("static", None, "onnx", "static body cannot.*\n.*--format static"),
        ("static", add_layer, "static", "Only static bodies"),
        ("BERT", lambda model: model.model_head.coef_.fill(np.nan), None, "not finite"),
        ("BERT", lambda model: setattr(model, "model_head", new_head()), None, "is a LogisticRegression;"),
        ("static", lambda model: setattr(model, "model_head", RidgeClassifier()), None, "is a RidgeClassifier;"),
        ("static", lambda model: setattr(model, "model_head", RIDGE), None, "is a OneVsRestClassifier;"),
        ("BERT", exclude_prompt, "onnx", "excludes its prompt"),
        ("static", lambda model: setattr(model, "labels", None), None, "The model has no labels"),
        ("static", lambda model: model.model_body[0].embedding.weight.data[-1].fill_(np.nan), None, "not all finite"),
    ],
)
def test_invalid_models_and_settings_are_rejected_and_leave_no_files(
    bodies: Bodies, parent: Path, body: str, change: Any, format_: str | None, message: str
) -> None:
    model = make_classifier(bodies(body))
    if change is not None:
        change(model)
    with pytest.raises(ModelError, match=message):
        export(model, parent, format=format_)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("settings", [{"format": "tflite"}, {"min_agreement": np.nan}, {"texts": []}])
def test_invalid_arguments_of_the_function_are_rejected(bodies: Bodies, parent: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        export(make_classifier(bodies("static")), parent, **settings)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize(
    ("step", "error", "expected"),
    [("write_onnx", OSError(errno.ENOSPC, "full"), OutputError), ("quantize", KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failed_export_leaves_no_files(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Any, expected: Any
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(bundle_module, step, fail)
    with pytest.raises(expected):
        export(make_classifier(bodies("BERT")), parent, format="onnx-int8", min_agreement=0)
    assert list(parent.iterdir()) == []


def test_missing_onnx_packages_are_reported(bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("onnxruntime", "onnx"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(UnavailableError, match=rf"needs {missing}.*\n.*pip install 'setfit-kd\[onnx\]'"):
            export(make_classifier(bodies("BERT")), parent, format="onnx-int8")
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("content", ["folder", "file", "bundle"])
def test_existing_output_is_not_changed(bodies: Bodies, parent: Path, content: str) -> None:
    model, target = make_classifier(bodies("static")), parent / "bundle"
    if content == "bundle":
        export(model, parent, min_agreement=0)
    elif content == "folder":
        target.mkdir()
        (target / "manifest.json").write_text('{"format": 1}')
    else:
        target.write_text("content")
    before, is_bundle = read_tree(parent), content == "bundle"
    with pytest.raises(OutputError, match=f"already exists.*\n.*or {'pass --overwrite' if is_bundle else 'remove it'}"):
        export(model, parent)
    if not is_bundle:
        with pytest.raises(OutputError, match="already exists and is not a bundle"):
            export(model, parent, overwrite=True)
    assert read_tree(parent) == before


def test_overwrite_replaces_only_the_files_of_the_earlier_bundle(bodies: Bodies, parent: Path) -> None:
    static, onnx = make_classifier(bodies("static")), make_classifier(bodies("BERT"))
    export(static, parent, min_agreement=0)
    (parent / "bundle/notes.txt").write_text("mine")
    with pytest.raises(SetFitKDError):
        export(onnx, parent, format="static", overwrite=True)
    assert Classifier(parent / "bundle").manifest["kind"] == "static"
    bundle = export(onnx, parent, format="onnx", overwrite=True)
    names = {"README.md", "classify.py", "labels.json", "manifest.json", "model.onnx", "tokenizer.json", "notes.txt"}
    assert {path.name for path in bundle.path.iterdir()} == names
    assert_same_probabilities(bundle.path, onnx, TOLERANCE["onnx"])
    assert [path.name for path in parent.iterdir()] == ["bundle"]


# Command line


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    models = {"teacher": str(tiny_teacher), "student": "layers:1"}
    distill(*["bundled:newswire"] * 3, output_dir=folder, baseline=False, pool_size=50, **{**FAST, **models})
    return folder


@pytest.mark.parametrize("path", [".", "student"])
def test_run_is_exported_and_checked_on_its_pool(run_folder: Path, tmp_path: Path, path: str) -> None:
    for flags in ([], ["--overwrite"]):
        result = invoke("export", run_folder / path, "--output-dir", tmp_path / "out", "--format", "onnx", *flags)
        assert result.exit_code == 0, result.stderr
    pool = TeacherSignals.load(run_folder / "signals").texts
    assert read_manifest(tmp_path / "out")["parity"]["texts"] == len(pool) < len(NEWS)
    assert result.stdout.startswith("Wrote onnx bundle to ")
    assert f"%, on {len(pool)} texts." in result.stdout
    assert "Warning" not in result.stderr
    title = run_folder.name if path == "." else path
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8").startswith(f"# {title}\n")


def test_texts_of_the_check_without_a_pool(run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "signals/texts.jsonl").write_text("{")
    result = invoke("export", run, "--output-dir", "out")
    assert_refused(result, "Pass texts to check the bundle on with --unlabeled.")
    (tmp_path / "few.txt").write_text("one text\nanother\nand a third\n")
    result = invoke("export", run, "--output-dir", "out", "--min-agreement", "0", "--unlabeled", "few.txt")
    assert result.exit_code == 0, result.stderr
    assert read_manifest(tmp_path / "out")["parity"]["texts"] == 3
    (run / "student").rename("model")
    result = invoke("export", "model", "--output-dir", "other", "--format", "onnx", "-q")
    assert result.exit_code == 0, result.stderr
    for fragment in ("Warning", "is not part of a run", "bundled:newswire", "--unlabeled"):
        assert fragment in result.stderr
    assert read_manifest(Path("other"))["parity"]["texts"] == len(NEWS)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([".", "--output-dir", "out", "--min-agreement", "1.5"], "0<=x<=1"),
        (["student", "--output-dir", "student", "--overwrite"], "is not a bundle"),
        (["./nowhere", "--output-dir", "out"], "nowhere"),
    ],
)
def test_invalid_arguments_are_reported(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], fragment: str
) -> None:
    monkeypatch.chdir(run_folder)
    assert_refused(invoke("export", *arguments), fragment)
    assert not Path("out").exists()
