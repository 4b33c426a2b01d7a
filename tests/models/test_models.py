"""Locating, loading, cutting, running and saving bodies, heads and models."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import newswire
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from setfit_kd.errors import ConfigError, ModelError, OutputError, UnavailableError
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models import bodies, layers
from setfit_kd.models.bodies import load_body, locate_model
from setfit_kd.models.encode import embed, predict_proba
from setfit_kd.models.fingerprint import content_hash
from setfit_kd.models.heads import fit_head, load_head, save_head
from setfit_kd.models.io import load, new_model, save_model
from setfit_kd.models.layers import cut_layers, n_layers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Floats = npt.NDArray[np.float32]

TEXTS = [row["text"] for row in newswire("train")[:12]]
LABELS = ["Übermorgen", "a, b", "two\nlines"]
CPU = resolve_device("cpu")

few_examples = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def vectors(seed: int, n: int, d: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def distributions(seed: int, n: int, classes: int) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.4), size=n).astype(np.float32)


def one_hot(labels: npt.NDArray[np.int64], classes: int) -> Floats:
    return np.eye(classes, dtype=np.float32)[labels]


def soft_head(seed: int = 0, *, d: int = 16, classes: int = 3) -> Any:
    return fit_head(vectors(seed, 60, d), distributions(seed, 60, classes))


# Locating and loading


def test_locate_model_returns_local_folder(tiny_student: Path) -> None:
    assert locate_model(tiny_student) == tiny_student
    assert locate_model(str(tiny_student)) == tiny_student


def test_transformers_folder_is_loaded_as_body(tiny_student: Path) -> None:
    plain = tiny_student.with_name("student-plain")
    assert load_body(locate_model(plain)).encode(TEXTS[:2]).shape == (2, 16)


@pytest.mark.parametrize(
    "name", ["./missing", "/nowhere/missing", "~/missing", "a/b/c", "models/", "demo:another", "file"]
)
def test_locate_model_rejects_invalid_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("not a model")
    with pytest.raises(ModelError, match=name.rstrip("/")):
        locate_model(name)


def test_demo_model_has_the_published_weights(demo_model: str) -> None:
    assert (locate_model(demo_model) / "modules.json").is_file()


def test_demo_model_with_other_weights_is_rejected(demo_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_DEMO_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="sha256"):
        locate_model(demo_model)


def test_demo_model_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_DEMO_PACKAGE", "no_such_package_at_all")
    with pytest.raises(UnavailableError, match="not installed"):
        locate_model(bodies.DEMO_MODEL)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        pytest.param("modules.json", "{", id="truncated modules.json"),
        pytest.param("config.json", "{}", id="no architecture"),
        pytest.param("model.safetensors", "not tensors", id="invalid weights"),
        pytest.param("model.safetensors", None, id="no weights"),
    ],
)
def test_damaged_body_is_rejected(tiny_student: Path, tmp_path: Path, file: str, content: str | None) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "damaged"))
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match="damaged"):
        load_body(folder)


SPY = "from pathlib import Path\nPath({path!r}).write_text('ran')\nfrom transformers import BertModel as Spy\n"


def test_code_in_model_folder_is_never_run(tiny_student: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    module = Path(shutil.copytree(tiny_student, tmp_path / "module"))
    modules = json.loads((module / "modules.json").read_text())
    modules[0]["type"] = "spy.Spy"
    (module / "modules.json").write_text(json.dumps(modules))
    model = Path(shutil.copytree(tiny_student, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "spy", "auto_map": {"AutoConfig": "spy.Spy", "AutoModel": "spy.Spy"}}
    (model / "config.json").write_text(json.dumps(config))
    for folder in (module, model):
        (folder / "spy.py").write_text(SPY.format(path=str(marker)))
        with pytest.raises(ModelError, match="Cannot load"):
            load_body(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["cuda:99", "mps"])
def test_unavailable_device_is_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=name):
        resolve_device(name)


# Cutting layers


def _architecture(name: str) -> tuple[Any, Any]:
    import transformers as tf

    common: dict[str, Any] = {
        "vocab_size": 2000,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 80,
        "pad_token_id": 0,
    }
    if name == "DistilBERT":
        small: Any = tf.DistilBertConfig(
            vocab_size=2000, dim=16, n_layers=4, n_heads=2, hidden_dim=32, max_position_embeddings=80, pad_token_id=0
        )
        return tf.DistilBertModel, small
    if name == "RoBERTa":
        return tf.RobertaModel, tf.RobertaConfig(**common)
    if name == "MPNet":
        return tf.MPNetModel, tf.MPNetConfig(**common)
    if name == "ModernBERT":
        special_tokens: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        return tf.ModernBertModel, tf.ModernBertConfig(**common, **special_tokens, local_attention=4)
    if name == "ALBERT":
        return tf.AlbertModel, tf.AlbertConfig(**common)
    return tf.BertModel, tf.BertConfig(**common)


def make_body(name: str, tokenizer: Path, folder: Path) -> SentenceTransformer:
    from transformers import AutoTokenizer

    model_class, config = _architecture(name)
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    from_pretrained: Any = AutoTokenizer.from_pretrained
    from_pretrained(tokenizer).save_pretrained(folder)
    return load_body(folder)


def config_of(body: SentenceTransformer) -> Any:
    encoder: Any = body[0]
    return encoder.auto_model.config


def layers_of(body: SentenceTransformer) -> list[dict[str, torch.Tensor]]:
    return [layer.state_dict() for layer in layers._find_layers(body)[2]]


def weights_outside_layers(body: SentenceTransformer) -> dict[str, torch.Tensor]:
    path = next(path for path in layers._LAYER_PATHS if any(f".{path}.0." in name for name in body.state_dict()))
    return {name: tensor for name, tensor in body.state_dict().items() if f".{path}." not in name}


def assert_equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def cut_and_compare(body: SentenceTransformer, keep: tuple[int, ...], folder: Path) -> None:
    """Cut layers, compare all weights, and compare the outputs with those after saving and loading."""
    original, embeddings = layers_of(body), body.encode(TEXTS[:4])
    small = cut_layers(body, keep)
    assert n_layers(small) == config_of(small).num_hidden_layers == len(keep)
    for layer, index in zip(layers_of(small), keep, strict=True):
        assert_equal_weights(layer, original[index])
    assert_equal_weights(weights_outside_layers(small), weights_outside_layers(body))
    assert n_layers(body) == config_of(body).num_hidden_layers == 4

    outputs = small.encode(TEXTS[:4])
    assert np.allclose(outputs, embeddings, atol=1e-6) is (keep == (0, 1, 2, 3))
    small.save_pretrained(str(folder), create_model_card=False)
    loaded = load_body(folder)
    assert n_layers(loaded) == len(keep)
    np.testing.assert_allclose(loaded.encode(TEXTS[:4]), outputs, atol=1e-6)


@pytest.mark.parametrize("keep", [(0,), (0, 1, 2, 3), (3, 0)])
def test_cut_body_keeps_its_layers_and_can_be_saved(
    teacher_body: SentenceTransformer, keep: tuple[int, ...], tmp_path: Path
) -> None:
    cut_and_compare(teacher_body, keep, tmp_path / "small")


@pytest.mark.parametrize("name", ["DistilBERT", "RoBERTa", "MPNet"])
def test_layers_of_other_encoders_are_cut(name: str, tiny_student: Path, tmp_path: Path) -> None:
    cut_and_compare(make_body(name, tiny_student, tmp_path / "whole"), (1, 3), tmp_path / "small")


@pytest.mark.parametrize("keep", [(0, 2), (1, 3)])
def test_encoder_with_different_layer_types_is_cut_correctly_or_rejected(
    keep: tuple[int, ...], tiny_student: Path, tmp_path: Path
) -> None:
    body = make_body("ModernBERT", tiny_student, tmp_path / "whole")
    try:
        cut_layers(body, keep)
    except ModelError:
        return
    cut_and_compare(body, keep, tmp_path / "small")


def test_cut_body_shares_no_memory_with_the_original(teacher_body: SentenceTransformer) -> None:
    small = cut_layers(teacher_body, (0, 1))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for name, parameter in teacher_body.named_parameters() if "bias" not in name)


@pytest.mark.parametrize("keep", [(), (4,), (-1,), (0, 0), (0, 1, 9)])
def test_invalid_layer_indices_are_rejected(teacher_body: SentenceTransformer, keep: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="body with 4"):
        cut_layers(teacher_body, keep)


def test_body_with_shared_layer_weights_is_rejected(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="transformer encoder"):
        cut_layers(make_body("ALBERT", tiny_student, tmp_path / "albert"), (0, 1))


def test_body_without_transformer_is_rejected() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    body = SentenceTransformer(modules=[BoW(vocab=["a", "b"])], device="cpu")
    with pytest.raises(ModelError, match="transformer encoder"):
        n_layers(body)


# Running


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_embed_matches_encode_and_keeps_the_order(
    student_body: SentenceTransformer, batch_size: int, normalize: bool
) -> None:
    texts = [*TEXTS, "", "short", TEXTS[0]]
    embeddings = embed(student_body, texts, batch_size=batch_size, normalize=normalize)
    expected = student_body.encode(texts, normalize_embeddings=normalize)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_embed_keeps_the_order_across_chunks(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.models.encode._CHUNK", 7)
    np.testing.assert_allclose(embed(student_body, TEXTS), student_body.encode(TEXTS), atol=1e-5)


def test_embed_without_texts_returns_no_rows(student_body: SentenceTransformer) -> None:
    assert embed(student_body, []).shape == (0, 16)
    assert embed(student_body, []).dtype == np.float32


def test_embed_disables_dropout(student_body: SentenceTransformer) -> None:
    expected = embed(student_body, TEXTS[:4])
    student_body.train()
    np.testing.assert_array_equal(embed(student_body, TEXTS[:4]), expected)


# Heads


@pytest.mark.parametrize("C", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_head_of_hard_labels_matches_scikit_learn(classes: int, C: float) -> None:  # noqa: N803
    from sklearn.linear_model import LogisticRegression

    rows = vectors(0, 80, 6)
    labels = np.arange(80) % classes
    head = fit_head(rows, one_hot(labels, classes), C=C)
    expected = LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(rows, labels)
    np.testing.assert_allclose(head.coef_, expected.coef_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(head.intercept_, expected.intercept_, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(head.classes_, np.arange(classes))


def penalised_cross_entropy(
    coef: torch.Tensor, intercept: torch.Tensor, rows: Floats, targets: Floats, weights: Floats
) -> torch.Tensor:
    """Objective of scikit-learn at C = 1: summed cross-entropy and half the squared norm of the weights."""
    logits = torch.tensor(rows, dtype=torch.float64) @ coef.double().T + intercept.double()
    if targets.shape[1] == 2:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    entropies = -(torch.tensor(targets, dtype=torch.float64) * logits.log_softmax(dim=1)).sum(dim=1)
    return (torch.tensor(weights, dtype=torch.float64) * entropies).sum() + coef.square().sum() / 2


@few_examples
@given(seeds, st.integers(2, 4), st.booleans())
def test_head_minimizes_cross_entropy_of_soft_labels(seed: int, classes: int, weighted: bool) -> None:
    rows, targets = vectors(seed, 40, 3), distributions(seed, 40, classes)
    targets = np.where(targets < 0.002, 0, targets)
    targets = (targets / targets.sum(axis=1, keepdims=True)).astype(np.float32)
    weights = np.random.default_rng(seed).uniform(0.2, 3, 40).astype(np.float32) if weighted else None
    head = fit_head(rows, targets, weights, C=1.0)

    size = 1 if classes == 2 else classes
    coef = torch.zeros(size, 3, dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    text_weights = np.ones(40, np.float32) if weights is None else weights
    optimizer: Any = torch.optim.LBFGS(
        [coef, intercept], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = penalised_cross_entropy(coef, intercept, rows, targets, text_weights)
        torch.autograd.backward(value)
        return value.item()

    optimizer.step(closure)
    minimum = penalised_cross_entropy(coef, intercept, rows, targets, text_weights).item()
    value = penalised_cross_entropy(
        torch.tensor(head.coef_), torch.tensor(head.intercept_), rows, targets, text_weights
    )
    assert value.item() == pytest.approx(minimum, rel=1e-4)
    np.testing.assert_allclose(head.coef_, coef.detach().numpy(), atol=0.02)


def test_head_keeps_classes_without_weight() -> None:
    head = fit_head(vectors(0, 40, 4), one_hot(np.arange(40) % 2 * 2, 3))
    assert head.predict_proba(vectors(1, 5, 4)).shape == (5, 3)


@pytest.mark.parametrize("classes", [2, 3])
def test_head_is_unchanged_after_saving_and_loading(tmp_path: Path, classes: int) -> None:
    head = soft_head(classes=classes)
    assert save_head(head, tmp_path)
    loaded = load_head(tmp_path)
    assert loaded is not None
    rows = vectors(5, 20, 16)
    np.testing.assert_array_equal(loaded.predict_proba(rows), head.predict_proba(rows))
    np.testing.assert_array_equal(loaded.predict(rows), head.predict(rows))
    assert {path.name for path in tmp_path.iterdir()} == {"head.json", "head.safetensors"}


def test_saved_head_keeps_string_classes(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    rows, names = vectors(0, 30, 4), np.array(LABELS)[np.arange(30) % 3]
    save_head(LogisticRegression().fit(rows, names), tmp_path)
    loaded = load_head(tmp_path)
    assert loaded is not None
    assert set(loaded.predict(rows)) <= set(LABELS)


def test_other_types_of_heads_are_not_saved(tmp_path: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    assert not save_head(KNeighborsClassifier(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert load_head(tmp_path) is None


# Models


@pytest.fixture
def model(student_body: SentenceTransformer) -> SetFitModel:
    classifier = new_model(student_body, LABELS)
    classifier.model_head = soft_head()
    return classifier


@pytest.fixture
def saved(model: SetFitModel, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "saved", title="Tiny")
    return tmp_path / "saved"


def test_load_and_setfit_predict_the_same_as_the_saved_model(model: SetFitModel, saved: Path) -> None:
    from setfit import SetFitModel

    expected = predict_proba(model, TEXTS)
    np.testing.assert_allclose(expected.sum(axis=1), 1, atol=1e-6)
    by_setfit = SetFitModel.from_pretrained(str(saved), device="cpu")
    for loaded in (load(saved, device="cpu"), load(str(saved), device="cpu"), by_setfit):
        np.testing.assert_allclose(predict_proba(loaded, TEXTS), expected, atol=1e-6)
        assert loaded.predict(TEXTS) == [LABELS[i] for i in expected.argmax(axis=1)]
        assert list(loaded.labels) == LABELS


def test_saving_keeps_the_model_usable_and_leaves_no_other_files(model: SetFitModel, tmp_path: Path) -> None:
    expected = predict_proba(model, TEXTS[:4])
    save_model(model, tmp_path / "a" / "saved")
    np.testing.assert_array_equal(predict_proba(model, TEXTS[:4]), expected)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["saved"]


def test_normalize_embeddings_is_saved(model: SetFitModel, tmp_path: Path) -> None:
    unnormalized = predict_proba(model, TEXTS)
    model.normalize_embeddings = True
    expected = predict_proba(model, TEXTS)
    assert np.abs(expected - unnormalized).max() > 1e-4
    save_model(model, tmp_path / "normalized")
    np.testing.assert_allclose(predict_proba(load(tmp_path / "normalized", device="cpu"), TEXTS), expected, atol=1e-6)


def test_existing_model_is_not_overwritten(model: SetFitModel, saved: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with pytest.raises(OutputError):
        save_model(model, saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_saving_and_loading_print_nothing(
    model: SetFitModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(model, tmp_path / "saved")
    load(tmp_path / "saved", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_model_card_contains_title_and_classes(saved: Path) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "# Tiny" in card
    assert "over 3 classes: Übermorgen" in card


def test_model_with_numeric_labels_can_be_saved(model: SetFitModel, tmp_path: Path) -> None:
    model.labels = [1, 2, 3]
    save_model(model, tmp_path / "numbers")
    assert len(load(tmp_path / "numbers", device="cpu").predict(TEXTS[:2])) == 2


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_head_is_not_unpickled(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bomb = pickle.dumps(_Bomb(marker))
    (saved / "model_head.pkl").write_bytes(bomb)
    load(saved, device="cpu")
    (saved / "head.json").unlink()
    with pytest.raises(ModelError, match="trust"):
        load(saved, device="cpu")
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()


def test_trusted_pickled_head_is_loaded(model: SetFitModel, saved: Path) -> None:
    (saved / "head.json").unlink()
    (saved / "head.safetensors").unlink()
    loaded = load(saved, device="cpu", trust_pickle=True)
    np.testing.assert_allclose(predict_proba(loaded, TEXTS), predict_proba(model, TEXTS), atol=1e-6)


def test_string_classes_of_pickled_head_are_matched_by_name(
    model: SetFitModel, saved: Path, student_body: SentenceTransformer, tmp_path: Path
) -> None:
    """SetFit trains heads on string labels in alphabetical order, regardless of the order of the labels."""
    from sklearn.linear_model import LogisticRegression

    from setfit_kd.export.bundle import export_bundle
    from setfit_kd.runtime.classify import Classifier

    gold = [LABELS[row % 3] for row in range(len(TEXTS))]
    labels = sorted(LABELS, reverse=True)
    head = LogisticRegression(C=1e4).fit(student_body.encode(TEXTS), gold)
    (saved / "head.json").unlink()
    joblib.dump(head, saved / "model_head.pkl")
    (saved / "config_setfit.json").write_text(json.dumps({"labels": labels, "normalize_embeddings": False}))
    loaded = load(saved, device="cpu", trust_pickle=True)
    expected = list(head.predict(student_body.encode(TEXTS)))
    assert [loaded.labels[row] for row in predict_proba(loaded, TEXTS).argmax(axis=1)] == expected
    assert list(loaded.predict(TEXTS)) == expected
    export_bundle(loaded, tmp_path / "bundle", texts=TEXTS, format="onnx")
    assert Classifier(tmp_path / "bundle").predict(TEXTS) == expected
    (saved / "config_setfit.json").write_text(json.dumps({"labels": ["x", "y", "z"]}))
    with pytest.raises(ModelError, match="must match the classes of the head"):
        load(saved, device="cpu", trust_pickle=True)


@pytest.mark.parametrize("kind", ["one-vs-rest", "multi-output", "classifier-chain"])
def test_multi_label_head_is_rejected(kind: str, saved: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.multioutput import ClassifierChain, MultiOutputClassifier

    kinds = {
        "one-vs-rest": OneVsRestClassifier,
        "multi-output": MultiOutputClassifier,
        "classifier-chain": ClassifierChain,
    }
    rng = np.random.default_rng(0)
    head = kinds[kind](LogisticRegression()).fit(rng.normal(size=(30, 16)), rng.integers(2, size=(30, 3)))
    (saved / "head.json").unlink()
    joblib.dump(head, saved / "model_head.pkl")
    with pytest.raises(ModelError, match="several labels"):
        load(saved, device="cpu", trust_pickle=True)


def _write(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: _ignore((folder / file).write_text(content))


def _change_head(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        description = json.loads((folder / "head.json").read_text())
        (folder / "head.json").write_text(json.dumps({**description, **changes}))

    return change


def _write_weights(*shapes: tuple[int, ...]) -> Callable[[Path], None]:
    names = ("coef", "intercept")
    return lambda folder: save_file(
        {name: np.zeros(shape) for name, shape in zip(names, shapes, strict=False)}, folder / "head.safetensors"
    )


def _ignore(_: object) -> None:
    return None


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_write("head.json", ""), id="empty description"),
        pytest.param(_write("head.json", "[]"), id="description is a list"),
        pytest.param(_write("head.json", "{}"), id="description without keys"),
        pytest.param(_change_head(format=99), id="newer format"),
        pytest.param(_change_head(kind="neural"), id="other head type"),
        pytest.param(_change_head(classes=[0, 1]), id="fewer classes than weights"),
        pytest.param(_change_head(classes=3), id="classes is a number"),
        pytest.param(_write("head.safetensors", "not tensors"), id="invalid weights"),
        pytest.param(lambda folder: (folder / "head.safetensors").unlink(), id="no weights"),
        pytest.param(_write_weights((3, 16)), id="no intercept"),
        pytest.param(_write_weights((3, 16), (2,)), id="intercept too short"),
        pytest.param(_write_weights((3, 7), (3,)), id="other dimension than the body"),
        pytest.param(_write("config_setfit.json", "{"), id="truncated config"),
        pytest.param(_write("config_setfit.json", "[]"), id="config is a list"),
        pytest.param(_write("config_setfit.json", '{"labels": ["one", "two"]}'), id="fewer labels than classes"),
        pytest.param(_write("modules.json", "{"), id="damaged body"),
    ],
)
def test_damaged_model_is_rejected(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(ModelError):
        load(saved, device="cpu")


def test_body_without_head_is_rejected(tiny_student: Path) -> None:
    with pytest.raises(ModelError, match="no head"):
        load(tiny_student, device="cpu")


def test_run_without_student_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ModelError, match="no student"):
        load(tmp_path, device="cpu")


def test_run_folder_is_loaded_as_its_student(model: SetFitModel, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    save_model(model, tmp_path / "run" / "student")
    loaded = load(tmp_path / "run", device="cpu")
    np.testing.assert_allclose(predict_proba(loaded, TEXTS), predict_proba(model, TEXTS), atol=1e-6)


# Content hash


def _pad_left(body: Any) -> None:
    body.tokenizer.padding_side = "left"


def _truncate_left(body: Any) -> None:
    body.tokenizer.truncation_side = "left"


def _set_shorter_max_length(body: Any) -> None:
    body.tokenizer.model_max_length = 5


def _truncate_static(body: Any) -> None:
    body.tokenizer.enable_truncation(3)


def _pad_static(body: Any) -> None:
    body.tokenizer.enable_padding(length=40)


def _remove_attention_mask(body: Any) -> None:
    body.tokenizer.model_input_names = ["input_ids"]


def _split_special_tokens(body: Any) -> None:
    body.tokenizer.split_special_tokens = True


def _change_first_token(body: Any) -> None:
    from tokenizers import processors

    body.tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[MASK]", 4))


def _exclude_prompt(body: Any) -> None:
    body[1].include_prompt = False


def _change_prompt(body: Any) -> None:
    body.prompts["task"] = "of "


def _normalize_tokens(body: Any) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    body.insert(1, Normalize("token_embeddings"))


def _truncate_dimensions(body: Any) -> None:
    body.truncate_dim = 4


def _sum_tokens(body: Any) -> None:
    body[0].embedding.mode = "sum"


def _change_epsilon(body: Any) -> None:
    body[0].auto_model.encoder.layer[0].output.LayerNorm.eps = 0.5


def _change_weights(body: Any) -> None:
    weight = next(body.parameters())
    with torch.no_grad():
        weight[:] = torch.nextafter(weight, weight + 1)


ENCODER_CHANGES: list[Callable[[Any], Any]] = [
    *(
        _pad_left,
        _truncate_left,
        _set_shorter_max_length,
        _remove_attention_mask,
        _split_special_tokens,
        _change_first_token,
    ),
    *(_exclude_prompt, _change_prompt, _normalize_tokens, _truncate_dimensions, _change_epsilon),
    *(torch.nn.Module.bfloat16, torch.nn.Module.double),
]
STATIC_CHANGES: list[Callable[[Any], Any]] = [
    *(_truncate_static, _pad_static, _sum_tokens, _change_weights, torch.nn.Module.double),
]


@pytest.fixture
def encoder(student_body: SentenceTransformer) -> SentenceTransformer:
    student_body.max_seq_length = 20
    student_body.prompts, student_body.default_prompt_name = {"task": "goal "}, "task"
    return student_body


@pytest.fixture
def static_body(student_body: SentenceTransformer) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    table = StaticEmbedding(student_body.tokenizer, embedding_weights=vectors(0, 2000, 8).astype(np.float32))
    return SentenceTransformer(modules=[table], device="cpu")


HASH_TEXTS = ["a [SEP] b", " ".join(row["text"] for row in newswire("train")[:2])]


@pytest.mark.parametrize(
    ("body", "change"),
    [*(("encoder", change) for change in ENCODER_CHANGES), *(("static_body", change) for change in STATIC_CHANGES)],
)
def test_hash_changes_with_the_embeddings(
    body: str, change: Callable[[Any], Any], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(body)
    before, embeddings = content_hash(model), model.encode(HASH_TEXTS, convert_to_numpy=False)
    assert content_hash(model) == before
    change(model)
    after = content_hash(model)
    changed = model.encode(HASH_TEXTS, convert_to_numpy=False)
    assert any(
        old.dtype != new.dtype or not torch.equal(old, new) for old, new in zip(embeddings, changed, strict=True)
    )
    assert after != before


def _change_path(body: Any) -> None:
    body.tokenizer.name_or_path = body[0].auto_model.config._name_or_path = "elsewhere"


def _add_unused_prompt(body: Any) -> None:
    body.prompts["other"] = "never used "


def _change_dropout(body: Any) -> None:
    for module in body.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5


@pytest.mark.parametrize("change", [_change_path, _add_unused_prompt, _change_dropout, torch.nn.Module.train])
def test_hash_ignores_changes_that_do_not_affect_embeddings(
    encoder: SentenceTransformer, change: Callable[[Any], Any]
) -> None:
    before, embeddings = content_hash(encoder), encoder.encode(HASH_TEXTS)
    change(encoder)
    np.testing.assert_array_equal(encoder.encode(HASH_TEXTS), embeddings)
    assert content_hash(encoder) == before


def test_hash_is_independent_of_the_folder(tiny_student: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_student, tmp_path / "copy")
    assert content_hash(load_body(copied)) == content_hash(load_body(tiny_student))
