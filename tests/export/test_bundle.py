"""Tests of the export of bundles: content, parity check and rejected models."""

from __future__ import annotations

import copy
import errno
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import FAST, newswire

from setfit_kd import TeacherSignals, distill
from setfit_kd.cli import main
from setfit_kd.errors import ConfigError, DataError, ModelError, OutputError, UnavailableError
from setfit_kd.export import bundle as bundle_module
from setfit_kd.export.bundle import Bundle, export_bundle
from setfit_kd.export.onnx import write_onnx
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed, predict_proba
from setfit_kd.models.heads import new_head
from setfit_kd.models.io import new_model
from setfit_kd.models.static import static_body
from setfit_kd.runtime import classify
from setfit_kd.runtime.classify import Classifier

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Floats = npt.NDArray[np.float32]

MAX_LENGTH = 64
NEWS = [row["text"] for row in newswire("train")]
TEXTS = [
    *NEWS[:40],
    "",
    " ",
    "goal",
    "  two  spaces\tand a tab ",
    "Ünïcödé, 東京 and 🙂",
    *(" ".join(NEWS[:n]) for n in (2, 3, 5, 20)),
    *(" ".join(NEWS[50].split()[:n]) for n in (2, 3, 4, 7)),
]
"""Texts of many lengths, from empty to far longer than the maximum length."""


# Classifiers


def make_special_body(architecture: str, folder: Path) -> Path:
    """Create a random MPNet or RoBERTa, which pads with token 1 and counts positions from there."""
    import transformers as tf
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    common: dict[str, Any] = {"vocab_size": 600, "special_tokens": specials, "show_progress": False}
    if architecture == "MPNet":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.train_from_iterator(NEWS, trainers.WordPieceTrainer(**common))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(NEWS, trainers.BpeTrainer(**common, initial_alphabet=alphabet))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    make_fast: Any = tf.PreTrainedTokenizerFast
    names = {"cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    fast = make_fast(tokenizer_object=tokenizer, **names, model_max_length=MAX_LENGTH)
    make_model: Any = tf.MPNetModel if architecture == "MPNet" else tf.RobertaModel
    make_config: Any = tf.MPNetConfig if architecture == "MPNet" else tf.RobertaConfig
    config = make_config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_LENGTH + 2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(2)
    transformer_folder = folder.with_name(folder.name + "-transformer")
    make_model(config).save_pretrained(transformer_folder)
    fast.save_pretrained(transformer_folder)
    transformer = Transformer(str(transformer_folder), max_seq_length=MAX_LENGTH)
    body = SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu")
    body.save_pretrained(str(folder), create_model_card=False)
    return folder


Bodies = Callable[[str], "SentenceTransformer"]


@pytest.fixture(scope="session")
def bodies(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Bodies:
    """Function that returns a new copy of a body of some kind."""
    folder = tmp_path_factory.mktemp("bodies")
    loaded = {name: load_body(make_special_body(name, folder / name)) for name in ("MPNet", "RoBERTa")}
    loaded["BERT"] = load_body(tiny_student)
    loaded["static"] = static_body(loaded["BERT"], NEWS[:200], dimension=8)
    return lambda name: copy.deepcopy(loaded[name])


def with_normalization(body: SentenceTransformer) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    return SentenceTransformer(modules=[*body, Normalize()], device="cpu")


def make_classifier(body: SentenceTransformer, classes: int = 4, *, normalize: bool = False) -> Any:
    """Create a classifier that predicts every label for some texts."""
    model: Any = new_model(body, [f"class {number}" for number in range(classes)])
    model.normalize_embeddings = normalize
    embeddings = embed(body, NEWS[:100], normalize=normalize)
    mean, std = embeddings.mean(axis=0), embeddings.std(axis=0) + 1e-9
    rng = np.random.default_rng(0)
    rows, width = (1 if classes == 2 else classes), embeddings.shape[1]
    head = new_head()
    head.classes_, head.n_features_in_ = np.arange(classes), width
    head.coef_ = 2 * rng.normal(size=(rows, width)) / std / np.sqrt(width)
    head.intercept_ = -head.coef_ @ mean
    model.model_head = head
    return model


def scale_vectors(body: SentenceTransformer, largest: float) -> SentenceTransformer:
    vectors = get_vectors(body)
    with torch.no_grad():
        vectors.mul_(largest / vectors.abs().max())
    return body


def get_vectors(body: SentenceTransformer) -> torch.Tensor:
    module: Any = body[0]
    weight: torch.Tensor = module.embedding.weight
    return weight


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """An empty folder to export into."""
    folder = tmp_path / "bundles"
    folder.mkdir()
    return folder


def export(model: SetFitModel, parent: Path, **settings: Any) -> Bundle:
    return export_bundle(model, parent / "bundle", texts=TEXTS, **settings)


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def agreement(first: Floats, second: Floats) -> float:
    return float((first.argmax(axis=1) == second.argmax(axis=1)).mean())


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


normalizations = pytest.mark.parametrize(
    ("module", "flag", "classes"),
    [(False, False, 4), (True, False, 2), (False, True, 4), (True, True, 4), (False, False, 2)],
)


# Single precision


@pytest.mark.parametrize(
    ("architecture", "module", "flag", "classes"),
    [
        ("BERT", False, False, 4),
        ("BERT", True, False, 2),
        ("BERT", False, True, 4),
        ("BERT", True, True, 4),
        ("MPNet", False, False, 2),
        ("MPNet", True, False, 4),
        ("MPNet", False, True, 2),
        ("RoBERTa", False, False, 4),
        ("RoBERTa", True, False, 4),
        ("RoBERTa", False, True, 2),
    ],
)
def test_onnx_bundle_predicts_the_probabilities_of_torch(
    bodies: Bodies, parent: Path, architecture: str, module: bool, flag: bool, classes: int
) -> None:
    body = bodies(architecture)
    model = make_classifier(with_normalization(body) if module else body, classes, normalize=flag)
    bundle = export(model, parent, format="onnx", min_agreement=0)
    assert_same_probabilities(bundle.path, model, 1e-4)
    assert bundle.parity.agreement == 1
    assert bundle.parity.largest_difference < 1e-4
    manifest = read_manifest(bundle.path)
    assert (manifest["kind"], manifest["weights"], manifest["n_classes"]) == ("onnx", "fp32", classes)
    assert manifest["max_length"] == MAX_LENGTH
    assert manifest["pad_id"] == (0 if architecture == "BERT" else 1)


def test_long_texts_are_truncated_as_in_torch(bodies: Bodies, parent: Path) -> None:
    model = make_classifier(bodies("BERT"))
    model.model_body.max_seq_length = 16
    bundle = export_bundle(model, parent / "bundle", texts=NEWS[:5], format="onnx")
    np.testing.assert_allclose(
        Classifier(bundle.path).predict_proba(TEXTS), predict_proba(model, TEXTS), rtol=0, atol=1e-4
    )


def test_texts_are_truncated_on_the_same_side_as_in_torch(bodies: Bodies, parent: Path) -> None:
    model = make_classifier(bodies("BERT"))
    model.model_body.tokenizer.truncation_side = "left"
    bundle = export_bundle(model, parent / "bundle", texts=["short", "texts"], format="onnx")
    np.testing.assert_allclose(
        Classifier(bundle.path).predict_proba(TEXTS), predict_proba(model, TEXTS), rtol=0, atol=1e-4
    )


# Static bundles

FP16_TOLERANCE = 0.02
"""Half precision has a relative error of at most 1/2048, which changes logits below 100 by a few hundredths."""


@normalizations
def test_static_bundle_predicts_the_probabilities_of_torch(
    bodies: Bodies, parent: Path, module: bool, flag: bool, classes: int
) -> None:
    body = bodies("static")
    model = make_classifier(with_normalization(body) if module else body, classes, normalize=flag)
    bundle = export(model, parent, min_agreement=0)
    assert bundle.format == "static"
    assert bundle.parity.largest_difference < FP16_TOLERANCE
    assert_same_probabilities(bundle.path, model, FP16_TOLERANCE)
    manifest = read_manifest(bundle.path)
    assert (manifest["kind"], manifest["weights"], manifest["n_classes"]) == ("static", "fp16", classes)


@normalizations
def test_static_bundle_is_exact_for_half_precision_vectors(
    bodies: Bodies, parent: Path, module: bool, flag: bool, classes: int
) -> None:
    body = bodies("static")
    with torch.no_grad():
        get_vectors(body).copy_(get_vectors(body).half().float())
    model = make_classifier(with_normalization(body) if module else body, classes, normalize=flag)
    assert_same_probabilities(export(model, parent, min_agreement=0).path, model, 1e-4)


@normalizations
@pytest.mark.parametrize("factor", [3e7, 3e-7])
def test_vectors_outside_the_range_of_half_precision_are_scaled(
    bodies: Bodies, parent: Path, module: bool, flag: bool, classes: int, factor: float
) -> None:
    body = scale_vectors(bodies("static"), factor)
    model = make_classifier(with_normalization(body) if module else body, classes, normalize=flag)
    assert_same_probabilities(export(model, parent, min_agreement=0).path, model, FP16_TOLERANCE)


def test_truncation_of_a_static_body_is_exported(bodies: Bodies, parent: Path) -> None:
    body = bodies("static")
    body.tokenizer.enable_truncation(8)
    model = make_classifier(body)
    bundle = export_bundle(model, parent / "bundle", texts=["short", "texts"], min_agreement=0)
    np.testing.assert_allclose(
        Classifier(bundle.path).predict_proba(TEXTS), predict_proba(model, TEXTS), rtol=0, atol=FP16_TOLERANCE
    )


# 8 bits


def set_measured_seconds(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Return these values, in order, from the time measurements of bundles."""
    values = iter(seconds)
    monkeypatch.setattr(bundle_module._BundleWriter, "_measure_seconds", lambda self: next(values))


def floats_and_integers(file: Path) -> tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
    """Read the constants of a graph, split into single precision and 8 bits."""
    import onnx

    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer]
    return [a for a in arrays if a.dtype == np.float32], [a for a in arrays if a.dtype in (np.int8, np.uint8)]


def test_int8_bundle_is_smaller_and_reports_its_parity(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_measured_seconds(monkeypatch, 2.0, 1.0)
    model = make_classifier(bodies("BERT"))
    single = export_bundle(model, parent / "single", texts=TEXTS, format="onnx")
    bundle = export(model, parent, format="onnx-int8", min_agreement=0.5)
    assert (bundle.format, bundle.int8_rejection_reason) == ("onnx-int8", None)
    assert bundle.megabytes < single.megabytes
    assert (bundle.path / "model.onnx").stat().st_size < 0.8 * (single.path / "model.onnx").stat().st_size
    manifest = read_manifest(bundle.path)
    assert (manifest["kind"], manifest["weights"]) == ("onnx", "int8")
    expected, actual = predict_proba(model, TEXTS), Classifier(bundle.path).predict_proba(TEXTS)
    difference = float(np.abs(actual - expected).max())
    assert 1e-6 < difference < 0.5
    assert bundle.parity.texts == manifest["parity"]["texts"] == len(TEXTS)
    assert bundle.parity.agreement == manifest["parity"]["agreement"] == pytest.approx(agreement(actual, expected))
    assert bundle.parity.largest_difference == pytest.approx(difference, abs=1e-6)
    assert manifest["parity"]["largest_difference"] == bundle.parity.largest_difference


@pytest.mark.parametrize("classes", [2, 4])
def test_head_of_an_int8_bundle_is_in_single_precision(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    set_measured_seconds(monkeypatch, 2.0, 1.0)
    model = make_classifier(bodies("BERT"), classes)
    bundle = export(model, parent, format="onnx-int8", min_agreement=0)
    floats, integers = floats_and_integers(bundle.path / "model.onnx")
    coef = np.asarray(model.model_head.coef_, np.float32)
    if classes == 2:
        coef = np.concatenate([np.zeros_like(coef), coef])
    matrices = [matrix if len(matrix) == classes else matrix.T for matrix in floats if matrix.ndim == 2]
    assert [matrix.shape for matrix in matrices] == [(classes, 16)]
    np.testing.assert_array_equal(matrices[0], coef)
    assert sum(array.size for array in integers) > 2000 * 16


def assert_saved_in_single_precision(bundle: Bundle, model: SetFitModel, caplog: pytest.LogCaptureFixture) -> None:
    assert bundle.format == "onnx"
    assert bundle.int8_rejection_reason is not None
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    (warning,) = [record.getMessage() for record in warnings if record.name.startswith("setfit_kd")]
    assert warning.startswith("The bundle is saved in single precision")
    assert bundle.int8_rejection_reason in warning
    assert read_manifest(bundle.path)["weights"] == "fp32"
    assert not floats_and_integers(bundle.path / "model.onnx")[1]
    plain = export_bundle(model, bundle.path.parent / "plain", texts=TEXTS, format="onnx")
    assert {file.name for file in bundle.path.iterdir()} == {file.name for file in plain.path.iterdir()}
    assert (bundle.parity, bundle.megabytes) == (plain.parity, plain.megabytes)
    np.testing.assert_array_equal(
        Classifier(bundle.path).predict_proba(TEXTS), Classifier(plain.path).predict_proba(TEXTS)
    )


def test_single_precision_is_used_if_int8_agreement_is_too_low(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_measured_seconds(monkeypatch, 2.0, 1.0)
    body: Any = bodies("BERT")
    with torch.no_grad():
        # The large vector of [MASK], which is in no text, leaves almost none of the 256 levels for the other tokens.
        body[0].auto_model.embeddings.word_embeddings.weight[4] = 1e5
    model = make_classifier(body)
    bundle = export(model, parent)
    assert "agreement too low" in str(bundle.int8_rejection_reason)
    assert "expected at least 98.00%" in str(bundle.int8_rejection_reason)
    assert_saved_in_single_precision(bundle, model, caplog)


@pytest.mark.parametrize("after", [1.0, 2.0])
def test_single_precision_is_used_if_int8_is_not_faster(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: float
) -> None:
    set_measured_seconds(monkeypatch, 1.0, after)
    model = make_classifier(bodies("BERT"))
    bundle = export(model, parent, min_agreement=0.1)
    assert f"not faster on this CPU ({after:.2f} times the time)" in str(bundle.int8_rejection_reason)
    assert_saved_in_single_precision(bundle, model, caplog)


# Parity check


def test_default_format_depends_on_the_body(bodies: Bodies, parent: Path) -> None:
    bundle = export_bundle(make_classifier(bodies("BERT")), parent / "transformer", texts=TEXTS, min_agreement=0.1)
    static = make_classifier(bodies("static"))
    # The speed of this machine decides between the two formats.
    assert bundle.format == ("onnx" if bundle.int8_rejection_reason else "onnx-int8")
    assert export_bundle(static, parent / "static", texts=TEXTS, min_agreement=0.1).format == "static"


@pytest.mark.parametrize(("n_texts", "n_checked"), [(1, 1), (7, 7), (1000, 1000), (2345, 1000)])
def test_at_most_1000_texts_are_checked(bodies: Bodies, parent: Path, n_texts: int, n_checked: int) -> None:
    texts = [f"{NEWS[row % len(NEWS)]} {row}" for row in range(n_texts)]
    bundle = export_bundle(make_classifier(bodies("static")), parent / "bundle", texts=texts, min_agreement=0)
    assert bundle.parity.texts == n_checked
    assert read_manifest(bundle.path)["parity"]["texts"] == n_checked


def with_shifted_classes(write: Callable[[SetFitModel, Path], None]) -> Callable[[SetFitModel, Path], None]:
    """Wrap an exporter so that it exports a head with shifted classes."""

    def write_shifted(model: SetFitModel, file: Path) -> None:
        shifted = new_model(model.model_body, list(model.labels))
        shifted.model_head = new_head()
        shifted.model_head.classes_ = model.model_head.classes_
        shifted.model_head.coef_ = np.roll(model.model_head.coef_, 1, axis=0)
        shifted.model_head.intercept_ = np.roll(model.model_head.intercept_, 1)
        write(shifted, file)

    return write_shifted


def test_bundle_with_low_agreement_is_rejected_unless_allowed(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_classifier(bodies("BERT"))
    monkeypatch.setattr(bundle_module, "write_onnx", with_shifted_classes(write_onnx))
    with pytest.raises(ModelError, match=rf"agree on 0\.00% of {len(TEXTS)} texts") as error_info:
        export(model, parent, format="onnx")
    assert "--min-agreement" in str(error_info.value.hint)
    assert list(parent.iterdir()) == []
    bundle = export(model, parent, format="onnx", min_agreement=0)
    assert bundle.parity.agreement == 0
    actual, expected = Classifier(bundle.path).predict_proba(TEXTS), predict_proba(model, TEXTS)
    np.testing.assert_allclose(actual, np.roll(expected, 1, axis=1), atol=1e-4)
    assert bundle.parity.largest_difference == pytest.approx(np.abs(actual - expected).max(), abs=1e-4)


@pytest.mark.parametrize(("min_agreement", "passes"), [(0.76, False), (0.74, True)])
def test_min_agreement_is_the_threshold(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, min_agreement: float, passes: bool
) -> None:
    model, texts = make_classifier(bodies("BERT")), NEWS[:200]
    columns = predict_proba(model, texts).argmax(axis=1)
    texts = [texts[row] for label in range(4) for row in np.flatnonzero(columns == label)[:5]]
    assert len(texts) == 20

    def write_without_last_class(model: SetFitModel, file: Path, write: Any = write_onnx) -> None:
        before = model.model_head.intercept_.copy()
        model.model_head.intercept_[3] = -1e4
        write(model, file)
        model.model_head.intercept_ = before

    monkeypatch.setattr(bundle_module, "write_onnx", write_without_last_class)
    if passes:
        bundle = export_bundle(model, parent / "bundle", texts=texts, format="onnx", min_agreement=min_agreement)
        assert bundle.parity.agreement == 0.75
    else:
        with pytest.raises(ModelError, match=r"75\.00% of 20 texts.* at least 76\.00%"):
            export_bundle(model, parent / "bundle", texts=texts, format="onnx", min_agreement=min_agreement)


@pytest.mark.parametrize("kind", ["onnx", "static"])
def test_prompt_of_a_body_is_exported(bodies: Bodies, parent: Path, kind: str) -> None:
    body = bodies("static" if kind == "static" else "BERT")
    body.prompts = {"other": "chip data: ", "classify": "bank shares: "}
    body.default_prompt_name = "classify"
    model = make_classifier(body)
    bundle = export(model, parent, format=kind, min_agreement=0.1)
    assert read_manifest(bundle.path)["prefix"] == "bank shares: "
    assert_same_probabilities(bundle.path, model, FP16_TOLERANCE if kind == "static" else 1e-4)
    body.default_prompt_name = None
    without = export_bundle(model, parent / "without", texts=TEXTS, format=kind, min_agreement=0.1)
    assert read_manifest(without.path)["prefix"] == ""
    prefixed = [f"bank shares: {text}" for text in TEXTS]
    np.testing.assert_allclose(
        Classifier(bundle.path).predict_proba(TEXTS), Classifier(without.path).predict_proba(prefixed), atol=1e-5
    )
    assert np.abs(Classifier(without.path).predict_proba(TEXTS) - predict_proba(model, prefixed)).max() > 0.05


def test_export_does_not_change_the_model(bodies: Bodies, parent: Path) -> None:
    model = make_classifier(bodies("BERT"))
    before = predict_proba(model, TEXTS)
    export(model, parent, min_agreement=0.1)
    np.testing.assert_array_equal(predict_proba(model, TEXTS), before)


# Content of a bundle

KINDS = {
    "onnx": {"model.onnx"},
    "onnx-int8": {"model.onnx"},
    "static": {"embeddings.safetensors", "head.safetensors"},
}


@pytest.fixture(scope="module", params=list(KINDS))
def any_bundle(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    bodies: Bodies,
) -> Bundle:
    model = make_classifier(bodies("static" if request.param == "static" else "BERT"))
    model.labels = ["Übermorgen", "a, b", "{weird}", "4"]
    with pytest.MonkeyPatch.context() as patch:
        set_measured_seconds(patch, 2.0, 1.0)
        parent = tmp_path_factory.mktemp("bundles")
        bundle = export(model, parent, format=request.param, min_agreement=0.1, title="Tiny model")
    assert bundle.format == request.param
    return bundle


def test_bundle_contains_exactly_its_files_and_their_hashes(any_bundle: Bundle) -> None:
    assert [path.name for path in any_bundle.path.parent.iterdir()] == ["bundle"]
    files = {file.name: file.read_bytes() for file in any_bundle.path.iterdir()}
    hashed = {"labels.json", "tokenizer.json", "classify.py", *KINDS[any_bundle.format]}
    assert set(files) == {"manifest.json", "README.md", *hashed}
    manifest = read_manifest(any_bundle.path)
    assert manifest["files"] == {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(hashed)}
    assert manifest["made_by"].startswith("setfit-kd ")
    assert any_bundle.megabytes == round(sum(map(len, files.values())) / 1e6, 1)
    assert files["classify.py"] == Path(classify.__file__).read_bytes()
    assert json.loads(files["labels.json"]) == ["Übermorgen", "a, b", "{weird}", "4"]
    assert Classifier(any_bundle.path).labels == ["Übermorgen", "a, b", "{weird}", "4"]


def test_files_of_a_bundle_have_default_permissions(any_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in any_bundle.path.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_readme_describes_labels_packages_and_parity(any_bundle: Bundle) -> None:
    readme = (any_bundle.path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# Tiny model\n")
    assert "with 4 classes: Übermorgen, a, b, \\{weird\\}, 4." in readme
    packages = "numpy tokenizers" if any_bundle.format == "static" else "numpy tokenizers onnxruntime"
    assert f"pip install {packages}\n" in readme
    assert ("onnxruntime" in readme) == (any_bundle.format != "static")
    assert f"On {len(TEXTS)} texts, {any_bundle.parity.agreement:.1%} of the labels are the same" in readme


# Rejected models and settings


def unsupported_head(kind: str, model: SetFitModel) -> Any:
    from sklearn.linear_model import RidgeClassifier, SGDClassifier
    from sklearn.neighbors import KNeighborsClassifier

    embeddings = embed(model.model_body, NEWS[:100])
    labels = model.model_head.predict(embeddings)
    if kind == "unfitted":
        return new_head()
    heads = {
        "neighbors": KNeighborsClassifier(3),
        "ridge": RidgeClassifier(),
        "one-vs-rest": SGDClassifier(loss="log_loss", random_state=0),
    }
    return heads[kind].fit(embeddings / embeddings.std(axis=0), labels)


@pytest.mark.parametrize("format_", ["onnx", "static"])
@pytest.mark.parametrize("kind", ["neighbors", "ridge", "one-vs-rest", "unfitted"])
def test_head_other_than_logistic_regression_is_rejected(bodies: Bodies, parent: Path, kind: str, format_: str) -> None:
    model = make_classifier(bodies("static" if format_ == "static" else "BERT"))
    model.model_head = unsupported_head(kind, model)
    with pytest.raises(ModelError) as error_info:
        export(model, parent, format=format_, min_agreement=0)
    assert type(model.model_head).__name__ in error_info.value.message
    assert "setfit-kd" in str(error_info.value.hint)
    assert list(parent.iterdir()) == []


def test_model_without_labels_is_rejected(bodies: Bodies, parent: Path) -> None:
    model = make_classifier(bodies("BERT"))
    model.labels = None
    with pytest.raises(ModelError, match="labels"):
        export(model, parent, format="onnx")
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "error", "message", "hint"),
    [
        ({"format": "tflite"}, ConfigError, "Unknown bundle format 'tflite'", "onnx, onnx-int8, static"),
        ({"min_agreement": -0.1}, ConfigError, r"must be from 0 to 1, got -0\.1", "Pass a share"),
        ({"min_agreement": 1.1}, ConfigError, r"must be from 0 to 1, got 1\.1", "Pass a share"),
        ({"min_agreement": float("nan")}, ConfigError, "must be from 0 to 1, got nan", "Pass a share"),
        ({"texts": []}, DataError, "without texts", "Pass texts"),
        ({"format": "static"}, ModelError, "Only static bodies", "onnx-int8"),
    ],
)
def test_invalid_settings_are_rejected_and_leave_no_files(
    bodies: Bodies, parent: Path, settings: dict[str, Any], error: type[Exception], message: str, hint: str
) -> None:
    with pytest.raises(error, match=message) as error_info:
        export_bundle(make_classifier(bodies("BERT")), parent / "bundle", **{"texts": TEXTS, **settings})
    assert hint in str(getattr(error_info.value, "hint", None))
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("format_", ["onnx", "onnx-int8"])
def test_static_body_is_rejected_for_onnx(bodies: Bodies, parent: Path, format_: str) -> None:
    with pytest.raises(ModelError, match="static body cannot") as error_info:
        export(make_classifier(bodies("static")), parent, format=format_)
    assert "--format static" in str(error_info.value.hint)
    assert list(parent.iterdir()) == []


def test_static_body_with_another_layer_is_rejected(bodies: Bodies, parent: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    body = SentenceTransformer(modules=[*bodies("static"), Dense(8, 8)], device="cpu")
    with pytest.raises(ModelError, match="Only static bodies"):
        export(make_classifier(body), parent)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("is_folder", [True, False])
def test_existing_output_is_not_changed(bodies: Bodies, parent: Path, is_folder: bool) -> None:
    target = parent / "bundle"
    if is_folder:
        target.mkdir()
        (target / "file").write_text("content")
    else:
        target.write_text("content")
    with pytest.raises(OutputError, match="already exists"):
        export(make_classifier(bodies("static")), parent)
    assert [path.name for path in parent.iterdir()] == ["bundle"]
    assert (target / "file" if is_folder else target).read_text() == "content"


@pytest.mark.parametrize("step", ["write_onnx", "quantize"])
@pytest.mark.parametrize(
    ("error", "expected_error"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failed_export_leaves_no_files(
    bodies: Bodies,
    parent: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
    expected_error: type[BaseException],
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(bundle_module, step, fail)
    with pytest.raises(expected_error):
        export(make_classifier(bodies("BERT")), parent, format="onnx-int8", min_agreement=0)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "format_"),
    [(("onnx",), "onnx"), (("onnxruntime",), "onnx-int8"), (("onnx", "onnxruntime"), "onnx-int8")],
)
def test_missing_onnx_packages_are_reported(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, missing: Sequence[str], format_: str
) -> None:
    find_spec = importlib.util.find_spec

    def find_spec_of_others(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in missing else find_spec(name, package)

    model = make_classifier(bodies("BERT"))
    monkeypatch.setattr(importlib.util, "find_spec", find_spec_of_others)
    with pytest.raises(UnavailableError, match=f"needs {' and '.join(missing)}") as error_info:
        export(model, parent, format=format_)
    assert "pip install 'setfit-kd[onnx]'" in str(error_info.value.hint)
    assert list(parent.iterdir()) == []


# Command line


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    sources = ["bundled:newswire"] * 3
    settings = {**FAST, "pool_size": 50}
    distill(*sources, teacher=str(tiny_teacher), student="layers:1", output_dir=folder, baseline=False, **settings)
    return folder


@pytest.mark.parametrize("path", [".", "student"])
def test_run_is_exported_and_checked_on_its_pool(run_folder: Path, tmp_path: Path, path: str) -> None:
    result = invoke("export", run_folder / path, "--output-dir", tmp_path / "out", "--format", "onnx")
    assert result.exit_code == 0, result.stderr
    pool = TeacherSignals.load(run_folder / "signals").texts
    assert read_manifest(tmp_path / "out")["parity"]["texts"] == len(pool) < len(NEWS)
    assert result.stdout.startswith("Wrote onnx bundle to ")
    assert f"% of {len(pool)} texts." in result.stdout
    assert f"python {tmp_path / 'out'}/classify.py" in result.stdout
    assert "Warning" not in result.stderr
    title = run_folder.name if path == "." else path
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8").startswith(f"# {title}\n")
    assert set(Classifier(tmp_path / "out").labels) == {"World", "Sports", "Business", "Sci/Tech"}


def test_model_outside_a_run_is_checked_on_bundled_texts_with_a_warning(run_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(run_folder / "student", tmp_path / "model"))
    result = invoke("export", model, "--output-dir", tmp_path / "out", "--format", "onnx", "-q")
    assert result.exit_code == 0, result.stderr
    assert "Warning" in result.stderr
    assert "is not part of a run" in result.stderr
    assert "bundled:newswire" in result.stderr
    assert "--unlabeled" in result.stderr
    assert read_manifest(tmp_path / "out")["parity"]["texts"] == len(NEWS)


def test_texts_of_the_check_can_be_specified(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one text\nanother\nand a third\n")
    result = invoke("export", run_folder, "--output-dir", "out", "--min-agreement", "0", "--unlabeled", "few.txt")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("Wrote onnx")
    assert read_manifest(tmp_path / "out")["parity"]["texts"] == 3


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["RUN", "--output-dir", "."], "already exists"),
        (["RUN", "--output-dir", "out", "--format", "tflite"], "'onnx', 'onnx-int8', 'static'"),
        (["RUN", "--output-dir", "out", "--format", "static"], "Only static bodies"),
        (["RUN", "--output-dir", "out", "--min-agreement", "1.5"], "0<=x<=1"),
        (["RUN", "--output-dir", "out", "--unlabeled", "nowhere.txt"], "nowhere.txt"),
        (["RUN"], "--output-dir"),
        (["BODY", "--output-dir", "out"], "no head"),
        (["./nowhere", "--output-dir", "out"], "nowhere"),
    ],
)
def test_invalid_arguments_are_reported(
    run_folder: Path, tiny_teacher: Path, tmp_path: Path, arguments: list[str], fragment: str
) -> None:
    paths = {"RUN": str(run_folder), "BODY": str(tiny_teacher)}
    result = invoke("export", *(paths.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert fragment in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
