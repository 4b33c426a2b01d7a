"""Bundles: what is written, how it is checked, and what is refused."""

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
from setfit_kd.export import Bundle, export_bundle
from setfit_kd.export import bundle as bundles
from setfit_kd.export.onnx import write_onnx
from setfit_kd.models import embed, load_body, new_head, new_model, predict_proba, static_body
from setfit_kd.runtime import Classifier, classify

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Floats = npt.NDArray[np.float32]

LONGEST = 64
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
"""Texts of many lengths, from none to far more than a body reads."""


# Classifiers


def make_special_body(architecture: str, folder: Path) -> Path:
    """A random MPNet or RoBERTa: padded with token 1, positions counted from there."""
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
    fast = make_fast(tokenizer_object=tokenizer, **names, model_max_length=LONGEST)
    make_model: Any = tf.MPNetModel if architecture == "MPNet" else tf.RobertaModel
    make_config: Any = tf.MPNetConfig if architecture == "MPNet" else tf.RobertaConfig
    config = make_config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LONGEST + 2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(2)
    plain = folder.with_name(folder.name + "-plain")
    make_model(config).save_pretrained(plain)
    fast.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=LONGEST)
    body = SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu")
    body.save_pretrained(str(folder), create_model_card=False)
    return folder


Bodies = Callable[[str], "SentenceTransformer"]


@pytest.fixture(scope="session")
def bodies(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Bodies:
    """A body of one's own by its kind."""
    folder = tmp_path_factory.mktemp("bodies")
    loaded = {name: load_body(make_special_body(name, folder / name)) for name in ("MPNet", "RoBERTa")}
    loaded["BERT"] = load_body(tiny_student)
    loaded["static"] = static_body(loaded["BERT"], NEWS[:200], dimension=8)
    return lambda name: copy.deepcopy(loaded[name])


def normalizing(body: SentenceTransformer) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    return SentenceTransformer(modules=[*body, Normalize()], device="cpu")


def classifier_of(body: SentenceTransformer, classes: int = 4, *, normalize: bool = False) -> Any:
    """A classifier whose labels are spread over the texts."""
    model: Any = new_model(body, [f"class {number}" for number in range(classes)])
    model.normalize_embeddings = normalize
    embeddings = embed(body, NEWS[:100], normalize=normalize)
    mean, spread = embeddings.mean(axis=0), embeddings.std(axis=0) + 1e-9
    rng = np.random.default_rng(0)
    rows, width = (1 if classes == 2 else classes), embeddings.shape[1]
    head = new_head()
    head.classes_, head.n_features_in_ = np.arange(classes), width
    head.coef_ = 2 * rng.normal(size=(rows, width)) / spread / np.sqrt(width)
    head.intercept_ = -head.coef_ @ mean
    model.model_head = head
    return model


def scaled(body: SentenceTransformer, largest: float) -> SentenceTransformer:
    vectors = weight_of(body)
    with torch.no_grad():
        vectors.mul_(largest / vectors.abs().max())
    return body


def weight_of(body: SentenceTransformer) -> torch.Tensor:
    module: Any = body[0]
    weight: torch.Tensor = module.embedding.weight
    return weight


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """An empty folder to export into."""
    folder = tmp_path / "bundles"
    folder.mkdir()
    return folder


def exported(model: SetFitModel, parent: Path, **settings: Any) -> Bundle:
    return export_bundle(model, parent / "bundle", texts=TEXTS, **settings)


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def agreement(left: Floats, right: Floats) -> float:
    return float((left.argmax(axis=1) == right.argmax(axis=1)).mean())


def assert_same_answers(folder: Path, model: SetFitModel, tolerance: float) -> None:
    """The same probabilities as torch gives, whatever the order of the texts and however many at once."""
    expected = predict_proba(model, TEXTS)
    assert len(set(expected.argmax(axis=1))) == expected.shape[1], "the texts should be of all classes"
    shuffled = np.random.default_rng(1).permutation(len(TEXTS))
    for batch_size, order in ((64, np.arange(len(TEXTS))), (7, shuffled), (1, shuffled[::-1])):
        classifier = Classifier(folder, batch_size=batch_size)
        assert classifier.labels == list(model.labels)
        found = classifier.predict_proba([TEXTS[row] for row in order])
        np.testing.assert_allclose(found, expected[order], rtol=0, atol=tolerance)


normalisations = pytest.mark.parametrize(
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
def test_an_onnx_bundle_gives_the_probabilities_that_torch_gives(
    bodies: Bodies, parent: Path, architecture: str, module: bool, flag: bool, classes: int
) -> None:
    body = bodies(architecture)
    model = classifier_of(normalizing(body) if module else body, classes, normalize=flag)
    bundle = exported(model, parent, format="onnx", min_agreement=0)
    assert_same_answers(bundle.path, model, 1e-4)
    assert bundle.parity.agreement == 1
    assert bundle.parity.largest_difference < 1e-4
    manifest = manifest_of(bundle.path)
    assert (manifest["kind"], manifest["weights"], manifest["n_classes"]) == ("onnx", "fp32", classes)
    assert manifest["max_length"] == LONGEST
    assert manifest["pad_id"] == (0 if architecture == "BERT" else 1)


def test_a_text_far_too_long_is_cut_where_torch_cuts_it(bodies: Bodies, parent: Path) -> None:
    model = classifier_of(bodies("BERT"))
    model.model_body.max_seq_length = 16
    bundle = export_bundle(model, parent / "bundle", texts=NEWS[:5], format="onnx")
    np.testing.assert_allclose(
        Classifier(bundle.path).predict_proba(TEXTS), predict_proba(model, TEXTS), rtol=0, atol=1e-4
    )


def test_a_text_is_cut_on_the_side_where_torch_cuts_it(bodies: Bodies, parent: Path) -> None:
    model = classifier_of(bodies("BERT"))
    model.model_body.tokenizer.truncation_side = "left"
    bundle = export_bundle(model, parent / "bundle", texts=["short", "texts"], format="onnx")
    np.testing.assert_allclose(
        Classifier(bundle.path).predict_proba(TEXTS), predict_proba(model, TEXTS), rtol=0, atol=1e-4
    )


# Token vectors

HALF = 0.02
"""Vectors in half precision are off by 1/2048 at most, which moves logits of some tens by a few hundredths."""


@normalisations
def test_a_static_bundle_gives_the_probabilities_that_torch_gives(
    bodies: Bodies, parent: Path, module: bool, flag: bool, classes: int
) -> None:
    body = bodies("static")
    model = classifier_of(normalizing(body) if module else body, classes, normalize=flag)
    bundle = exported(model, parent, min_agreement=0)
    assert bundle.format == "static"
    assert bundle.parity.largest_difference < HALF
    assert_same_answers(bundle.path, model, HALF)
    manifest = manifest_of(bundle.path)
    assert (manifest["kind"], manifest["weights"], manifest["n_classes"]) == ("static", "fp16", classes)


@normalisations
def test_static_bundles_lose_nothing_but_the_precision_of_vectors(
    bodies: Bodies, parent: Path, module: bool, flag: bool, classes: int
) -> None:
    body = bodies("static")
    with torch.no_grad():
        weight_of(body).copy_(weight_of(body).half().float())
    model = classifier_of(normalizing(body) if module else body, classes, normalize=flag)
    assert_same_answers(exported(model, parent, min_agreement=0).path, model, 1e-4)


@normalisations
@pytest.mark.parametrize("factor", [3e7, 3e-7])
def test_vectors_beyond_half_precision_survive(
    bodies: Bodies, parent: Path, module: bool, flag: bool, classes: int, factor: float
) -> None:
    body = scaled(bodies("static"), factor)
    model = classifier_of(normalizing(body) if module else body, classes, normalize=flag)
    assert_same_answers(exported(model, parent, min_agreement=0).path, model, HALF)


def test_a_static_body_that_cuts_texts_is_exported_with_its_cut(bodies: Bodies, parent: Path) -> None:
    body = bodies("static")
    body.tokenizer.enable_truncation(8)
    model = classifier_of(body)
    bundle = export_bundle(model, parent / "bundle", texts=["short", "texts"], min_agreement=0)
    np.testing.assert_allclose(
        Classifier(bundle.path).predict_proba(TEXTS), predict_proba(model, TEXTS), rtol=0, atol=HALF
    )


# Eight bits


def say_seconds(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Let the first bundle timed take the first of these, and so on."""
    left = iter(seconds)
    monkeypatch.setattr(bundles._Draft, "_seconds", lambda self: next(left))


def floats_and_integers(file: Path) -> tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
    """The constants of a graph in single precision, and in 8 bits."""
    import onnx

    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer]
    return [a for a in arrays if a.dtype == np.float32], [a for a in arrays if a.dtype in (np.int8, np.uint8)]


def test_in_8_bits_a_bundle_is_smaller_and_as_like_as_it_says(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_seconds(monkeypatch, 2.0, 1.0)
    model = classifier_of(bodies("BERT"))
    single = export_bundle(model, parent / "single", texts=TEXTS, format="onnx")
    bundle = exported(model, parent, format="onnx-int8", min_agreement=0.5)
    assert (bundle.format, bundle.why_not_int8) == ("onnx-int8", None)
    assert bundle.megabytes < single.megabytes
    assert (bundle.path / "model.onnx").stat().st_size < 0.8 * (single.path / "model.onnx").stat().st_size
    manifest = manifest_of(bundle.path)
    assert (manifest["kind"], manifest["weights"]) == ("onnx", "int8")
    expected, found = predict_proba(model, TEXTS), Classifier(bundle.path).predict_proba(TEXTS)
    difference = float(np.abs(found - expected).max())
    assert 1e-6 < difference < 0.5
    assert bundle.parity.texts == manifest["parity"]["texts"] == len(TEXTS)
    assert bundle.parity.agreement == manifest["parity"]["agreement"] == pytest.approx(agreement(found, expected))
    assert bundle.parity.largest_difference == pytest.approx(difference, abs=1e-6)
    assert manifest["parity"]["largest_difference"] == bundle.parity.largest_difference


@pytest.mark.parametrize("classes", [2, 4])
def test_in_8_bits_the_head_keeps_its_precision(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    say_seconds(monkeypatch, 2.0, 1.0)
    model = classifier_of(bodies("BERT"), classes)
    bundle = exported(model, parent, format="onnx-int8", min_agreement=0)
    floats, integers = floats_and_integers(bundle.path / "model.onnx")
    coef = np.asarray(model.model_head.coef_, np.float32)
    if classes == 2:
        coef = np.concatenate([np.zeros_like(coef), coef])
    matrices = [matrix if len(matrix) == classes else matrix.T for matrix in floats if matrix.ndim == 2]
    assert [matrix.shape for matrix in matrices] == [(classes, 16)]
    np.testing.assert_array_equal(matrices[0], coef)
    assert sum(array.size for array in integers) > 2000 * 16


def assert_kept_in_single_precision(bundle: Bundle, model: SetFitModel, caplog: pytest.LogCaptureFixture) -> None:
    assert bundle.format == "onnx"
    assert bundle.why_not_int8 is not None
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    (warning,) = [record.getMessage() for record in warnings if record.name.startswith("setfit_kd")]
    assert warning.startswith("The bundle stays in single precision.")
    assert bundle.why_not_int8 in warning
    assert manifest_of(bundle.path)["weights"] == "fp32"
    assert not floats_and_integers(bundle.path / "model.onnx")[1]
    plain = export_bundle(model, bundle.path.parent / "plain", texts=TEXTS, format="onnx")
    assert {file.name for file in bundle.path.iterdir()} == {file.name for file in plain.path.iterdir()}
    assert (bundle.parity, bundle.megabytes) == (plain.parity, plain.megabytes)
    np.testing.assert_array_equal(
        Classifier(bundle.path).predict_proba(TEXTS), Classifier(plain.path).predict_proba(TEXTS)
    )


def test_where_8_bits_lose_too_much_single_precision_is_kept(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    say_seconds(monkeypatch, 2.0, 1.0)
    body: Any = bodies("BERT")
    with torch.no_grad():
        # The vector of [MASK], which no text holds, leaves none of 256 steps to those of the words.
        body[0].auto_model.embeddings.word_embeddings.weight[4] = 1e5
    model = classifier_of(body)
    bundle = exported(model, parent)
    assert "too much is lost" in str(bundle.why_not_int8)
    assert "less than 98.00%" in str(bundle.why_not_int8)
    assert_kept_in_single_precision(bundle, model, caplog)


@pytest.mark.parametrize("after", [1.0, 2.0])
def test_where_8_bits_are_no_faster_single_precision_is_kept(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: float
) -> None:
    say_seconds(monkeypatch, 1.0, after)
    model = classifier_of(bodies("BERT"))
    bundle = exported(model, parent, min_agreement=0.1)
    assert f"not faster on this CPU ({after:.2f} times the time)" in str(bundle.why_not_int8)
    assert_kept_in_single_precision(bundle, model, caplog)


# What is checked


def test_the_format_follows_the_body(bodies: Bodies, parent: Path) -> None:
    bundle = export_bundle(classifier_of(bodies("BERT")), parent / "transformer", texts=TEXTS, min_agreement=0.1)
    static = classifier_of(bodies("static"))
    # Which of the two it is at last, this machine's speed decides.
    assert bundle.format == ("onnx" if bundle.why_not_int8 else "onnx-int8")
    assert export_bundle(static, parent / "static", texts=TEXTS, min_agreement=0.1).format == "static"


@pytest.mark.parametrize(("given", "checked"), [(1, 1), (7, 7), (1000, 1000), (2345, 1000)])
def test_a_thousand_texts_are_checked_at_most(bodies: Bodies, parent: Path, given: int, checked: int) -> None:
    texts = [f"{NEWS[row % len(NEWS)]} {row}" for row in range(given)]
    bundle = export_bundle(classifier_of(bodies("static")), parent / "bundle", texts=texts, min_agreement=0)
    assert bundle.parity.texts == checked
    assert manifest_of(bundle.path)["parity"]["texts"] == checked


def shuffled_head(write: Callable[[SetFitModel, Path], None]) -> Callable[[SetFitModel, Path], None]:
    """The exporter, but for a head whose classes are mixed up."""

    def written(model: SetFitModel, file: Path) -> None:
        other = new_model(model.model_body, list(model.labels))
        other.model_head = new_head()
        other.model_head.classes_ = model.model_head.classes_
        other.model_head.coef_ = np.roll(model.model_head.coef_, 1, axis=0)
        other.model_head.intercept_ = np.roll(model.model_head.intercept_, 1)
        write(other, file)

    return written


def test_a_bundle_that_says_something_else_is_refused_unless_that_is_allowed(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier_of(bodies("BERT"))
    monkeypatch.setattr(bundles, "write_onnx", shuffled_head(write_onnx))
    with pytest.raises(ModelError, match=rf"labels 0\.00% of {len(TEXTS)} texts") as caught:
        exported(model, parent, format="onnx")
    assert "--min-agreement" in str(caught.value.hint)
    assert list(parent.iterdir()) == []
    bundle = exported(model, parent, format="onnx", min_agreement=0)
    assert bundle.parity.agreement == 0
    found, expected = Classifier(bundle.path).predict_proba(TEXTS), predict_proba(model, TEXTS)
    np.testing.assert_allclose(found, np.roll(expected, 1, axis=1), atol=1e-4)
    assert bundle.parity.largest_difference == pytest.approx(np.abs(found - expected).max(), abs=1e-4)


@pytest.mark.parametrize(("floor", "passes"), [(0.76, False), (0.74, True)])
def test_the_floor_is_what_is_asked_for(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, floor: float, passes: bool
) -> None:
    model, texts = classifier_of(bodies("BERT")), NEWS[:200]
    said = predict_proba(model, texts).argmax(axis=1)
    texts = [text for label in range(4) for text in [texts[row] for row in np.flatnonzero(said == label)][:5]]
    assert len(texts) == 20

    def one_class_lost(model: SetFitModel, file: Path, write: Any = write_onnx) -> None:
        before = model.model_head.intercept_.copy()
        model.model_head.intercept_[3] = -1e4
        write(model, file)
        model.model_head.intercept_ = before

    monkeypatch.setattr(bundles, "write_onnx", one_class_lost)
    if passes:
        bundle = export_bundle(model, parent / "bundle", texts=texts, format="onnx", min_agreement=floor)
        assert bundle.parity.agreement == 0.75
    else:
        with pytest.raises(ModelError, match=r"75\.00% of 20 texts.* less than 76\.00%"):
            export_bundle(model, parent / "bundle", texts=texts, format="onnx", min_agreement=floor)


@pytest.mark.parametrize("kind", ["onnx", "static"])
def test_a_body_with_a_prompt_is_exported_with_it(bodies: Bodies, parent: Path, kind: str) -> None:
    body = bodies("static" if kind == "static" else "BERT")
    body.prompts = {"other": "chip data: ", "classify": "bank shares: "}
    body.default_prompt_name = "classify"
    model = classifier_of(body)
    bundle = exported(model, parent, format=kind, min_agreement=0.1)
    assert manifest_of(bundle.path)["prefix"] == "bank shares: "
    assert_same_answers(bundle.path, model, HALF if kind == "static" else 1e-4)
    body.default_prompt_name = None
    without = export_bundle(model, parent / "without", texts=TEXTS, format=kind, min_agreement=0.1)
    assert manifest_of(without.path)["prefix"] == ""
    prefixed = [f"bank shares: {text}" for text in TEXTS]
    np.testing.assert_allclose(
        Classifier(bundle.path).predict_proba(TEXTS), Classifier(without.path).predict_proba(prefixed), atol=1e-5
    )
    assert np.abs(Classifier(without.path).predict_proba(TEXTS) - predict_proba(model, prefixed)).max() > 0.05


def test_the_model_says_afterwards_what_it_said_before(bodies: Bodies, parent: Path) -> None:
    model = classifier_of(bodies("BERT"))
    before = predict_proba(model, TEXTS)
    exported(model, parent, min_agreement=0.1)
    np.testing.assert_array_equal(predict_proba(model, TEXTS), before)


# What lies in a bundle

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
    model = classifier_of(bodies("static" if request.param == "static" else "BERT"))
    model.labels = ["Übermorgen", "a, b", "{weird}", "4"]
    with pytest.MonkeyPatch.context() as patch:
        say_seconds(patch, 2.0, 1.0)
        parent = tmp_path_factory.mktemp("bundles")
        bundle = exported(model, parent, format=request.param, min_agreement=0.1, title="Tiny thing")
    assert bundle.format == request.param
    return bundle


def test_a_bundle_holds_its_files_and_their_hashes_and_nothing_else(any_bundle: Bundle) -> None:
    assert [path.name for path in any_bundle.path.parent.iterdir()] == ["bundle"]
    files = {file.name: file.read_bytes() for file in any_bundle.path.iterdir()}
    hashed = {"labels.json", "tokenizer.json", "classify.py", *KINDS[any_bundle.format]}
    assert set(files) == {"manifest.json", "README.md", *hashed}
    manifest = manifest_of(any_bundle.path)
    assert manifest["files"] == {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(hashed)}
    assert manifest["made_by"].startswith("setfit-kd ")
    assert any_bundle.megabytes == round(sum(map(len, files.values())) / 1e6, 1)
    assert files["classify.py"] == Path(classify.__file__).read_bytes()
    assert json.loads(files["labels.json"]) == ["Übermorgen", "a, b", "{weird}", "4"]
    assert Classifier(any_bundle.path).labels == ["Übermorgen", "a, b", "{weird}", "4"]


def test_the_files_of_a_bundle_can_be_read_by_whoever_can_read_new_files(any_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in any_bundle.path.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_the_readme_names_labels_packages_and_the_check(any_bundle: Bundle) -> None:
    readme = (any_bundle.path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# Tiny thing\n")
    assert "over 4 classes: Übermorgen, a, b, \\{weird\\}, 4." in readme
    packages = "numpy tokenizers" if any_bundle.format == "static" else "numpy tokenizers onnxruntime"
    assert f"pip install {packages}\n" in readme
    assert ("onnxruntime" in readme) == (any_bundle.format != "static")
    assert f"labels {any_bundle.parity.agreement:.1%} of {len(TEXTS)} texts" in readme


# What is refused


def refused_head(kind: str, model: SetFitModel) -> Any:
    from sklearn.linear_model import RidgeClassifier, SGDClassifier
    from sklearn.neighbors import KNeighborsClassifier

    embeddings = embed(model.model_body, NEWS[:100])
    labels = model.model_head.predict(embeddings)
    if kind == "unfitted":
        return new_head()
    heads = {
        "neighbours": KNeighborsClassifier(3),
        "ridge": RidgeClassifier(),
        "one against all": SGDClassifier(loss="log_loss", random_state=0),
    }
    return heads[kind].fit(embeddings / embeddings.std(axis=0), labels)


@pytest.mark.parametrize("format_", ["onnx", "static"])
@pytest.mark.parametrize("kind", ["neighbours", "ridge", "one against all", "unfitted"])
def test_a_head_that_is_no_logistic_regression_is_refused(
    bodies: Bodies, parent: Path, kind: str, format_: str
) -> None:
    model = classifier_of(bodies("static" if format_ == "static" else "BERT"))
    model.model_head = refused_head(kind, model)
    with pytest.raises(ModelError) as caught:
        exported(model, parent, format=format_, min_agreement=0)
    assert type(model.model_head).__name__ in caught.value.message
    assert "setfit-kd" in str(caught.value.hint)
    assert list(parent.iterdir()) == []


def test_a_model_without_names_for_its_classes_is_refused(bodies: Bodies, parent: Path) -> None:
    model = classifier_of(bodies("BERT"))
    model.labels = None
    with pytest.raises(ModelError, match="labels"):
        exported(model, parent, format="onnx")
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "error", "message", "hint"),
    [
        ({"format": "tflite"}, ConfigError, "no format 'tflite'", "onnx, onnx-int8, static"),
        ({"min_agreement": -0.1}, ConfigError, r"agreement of -0\.1", "from 0 to 1"),
        ({"min_agreement": 1.1}, ConfigError, r"agreement of 1\.1", "from 0 to 1"),
        ({"min_agreement": float("nan")}, ConfigError, "agreement of nan", "from 0 to 1"),
        ({"texts": []}, DataError, "no texts", "Give some"),
        ({"format": "static"}, ModelError, "Only static bodies", "onnx-int8"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing_behind(
    bodies: Bodies, parent: Path, settings: dict[str, Any], error: type[Exception], message: str, hint: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        export_bundle(classifier_of(bodies("BERT")), parent / "bundle", **{"texts": TEXTS, **settings})
    assert hint in str(getattr(caught.value, "hint", None))
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("format_", ["onnx", "onnx-int8"])
def test_a_static_body_is_no_network_to_be_exported(bodies: Bodies, parent: Path, format_: str) -> None:
    with pytest.raises(ModelError, match="static body") as caught:
        exported(classifier_of(bodies("static")), parent, format=format_)
    assert "--format static" in str(caught.value.hint)
    assert list(parent.iterdir()) == []


def test_a_static_body_with_a_layer_on_top_is_refused(bodies: Bodies, parent: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    body = SentenceTransformer(modules=[*bodies("static"), Dense(8, 8)], device="cpu")
    with pytest.raises(ModelError, match="Only static bodies"):
        exported(classifier_of(body), parent)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_there_already_stays_as_it_is(bodies: Bodies, parent: Path, is_folder: bool) -> None:
    target = parent / "bundle"
    if is_folder:
        target.mkdir()
        (target / "mine").write_text("kept")
    else:
        target.write_text("kept")
    with pytest.raises(OutputError, match="there already"):
        exported(classifier_of(bodies("static")), parent)
    assert [path.name for path in parent.iterdir()] == ["bundle"]
    assert (target / "mine" if is_folder else target).read_text() == "kept"


@pytest.mark.parametrize("step", ["write_onnx", "quantize"])
@pytest.mark.parametrize(
    ("raised", "caught"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_on_the_way_leaves_nothing_behind(
    bodies: Bodies,
    parent: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    raised: BaseException,
    caught: type[BaseException],
) -> None:
    def fail(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr(bundles, step, fail)
    with pytest.raises(caught):
        exported(classifier_of(bodies("BERT")), parent, format="onnx-int8", min_agreement=0)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "format_"),
    [(("onnx",), "onnx"), (("onnxruntime",), "onnx-int8"), (("onnx", "onnxruntime"), "onnx-int8")],
)
def test_without_its_packages_onnx_is_unavailable(
    bodies: Bodies, parent: Path, monkeypatch: pytest.MonkeyPatch, missing: Sequence[str], format_: str
) -> None:
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in missing else find(name, package)

    model = classifier_of(bodies("BERT"))
    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    with pytest.raises(UnavailableError, match=f"needs {' and '.join(missing)}") as caught:
        exported(model, parent, format=format_)
    assert "pip install 'setfit-kd[onnx]'" in str(caught.value.hint)
    assert list(parent.iterdir()) == []


# The command


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    sources = ["bundled:newswire"] * 3
    settings = {**FAST, "pool_size": 50}
    distill(*sources, teacher=str(tiny_teacher), student="layers:1", output_dir=folder, baseline=False, **settings)
    return folder


@pytest.mark.parametrize("inside", [".", "student"])
def test_a_run_is_exported_and_checked_on_its_pool(run_folder: Path, tmp_path: Path, inside: str) -> None:
    result = invoke("export", run_folder / inside, "--output-dir", tmp_path / "out", "--format", "onnx")
    assert result.exit_code == 0, result.stderr
    pool = TeacherSignals.load(run_folder / "signals").texts
    assert manifest_of(tmp_path / "out")["parity"]["texts"] == len(pool) < len(NEWS)
    assert result.stdout.startswith("onnx bundle in ")
    assert f"of {len(pool)} texts as the model does" in result.stdout
    assert f"python {tmp_path / 'out'}/classify.py" in result.stdout
    assert "Warning" not in result.stderr
    title = run_folder.name if inside == "." else inside
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8").startswith(f"# {title}\n")
    assert set(Classifier(tmp_path / "out").labels) == {"World", "Sports", "Business", "Sci/Tech"}


def test_a_model_in_no_run_is_checked_on_stand_ins_and_that_is_told(run_folder: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run_folder / "student", tmp_path / "alone"))
    result = invoke("export", alone, "--output-dir", tmp_path / "out", "--format", "onnx", "-q")
    assert result.exit_code == 0, result.stderr
    assert "Warning" in result.stderr
    assert "is in no run" in result.stderr
    assert "bundled:newswire" in result.stderr
    assert "--unlabeled" in result.stderr
    assert manifest_of(tmp_path / "out")["parity"]["texts"] == len(NEWS)


def test_texts_to_check_on_can_be_named(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one text\nanother\nand a third\n")
    result = invoke("export", run_folder, "--output-dir", "out", "--min-agreement", "0", "--unlabeled", "few.txt")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("onnx")
    assert manifest_of(tmp_path / "out")["parity"]["texts"] == 3


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["RUN", "--output-dir", "."], "there already"),
        (["RUN", "--output-dir", "out", "--format", "tflite"], "'onnx', 'onnx-int8', 'static'"),
        (["RUN", "--output-dir", "out", "--format", "static"], "Only static bodies"),
        (["RUN", "--output-dir", "out", "--min-agreement", "1.5"], "0<=x<=1"),
        (["RUN", "--output-dir", "out", "--unlabeled", "nowhere.txt"], "nowhere.txt"),
        (["RUN"], "--output-dir"),
        (["BODY", "--output-dir", "out"], "no head"),
        (["./nowhere", "--output-dir", "out"], "nowhere"),
    ],
)
def test_the_command_explains_what_it_cannot_do(
    run_folder: Path, tiny_teacher: Path, tmp_path: Path, arguments: list[str], fragment: str
) -> None:
    places = {"RUN": str(run_folder), "BODY": str(tiny_teacher)}
    result = invoke("export", *(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert fragment in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
