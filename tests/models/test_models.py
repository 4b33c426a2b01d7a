"""Bodies, heads and whole models: cut, run, fitted, saved and read again."""

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
from setfit_kd.memory import resolve_device
from setfit_kd.models import (
    bodies,
    content_hash,
    cut_layers,
    embed,
    fit_head,
    layers,
    load,
    load_body,
    load_head,
    locate,
    n_layers,
    new_model,
    predict_proba,
    save_head,
    save_model,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Floats = npt.NDArray[np.float32]

TEXTS = [row["text"] for row in newswire("train")[:12]]
LABELS = ["Übermorgen", "a, b", "two\nlines"]
CPU = resolve_device("cpu")

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def vectors(seed: int, n: int, d: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def distributions(seed: int, n: int, classes: int) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.4), size=n).astype(np.float32)


def one_hot(labels: npt.NDArray[np.int64], classes: int) -> Floats:
    return np.eye(classes, dtype=np.float32)[labels]


def soft_head(seed: int = 0, *, d: int = 16, classes: int = 3) -> Any:
    return fit_head(vectors(seed, 60, d), distributions(seed, 60, classes))


# Finding and loading


def test_a_model_folder_is_its_own_location(tiny_student: Path) -> None:
    assert locate(tiny_student) == tiny_student
    assert locate(str(tiny_student)) == tiny_student


def test_a_plain_transformers_folder_is_a_body(tiny_student: Path) -> None:
    plain = tiny_student.with_name("student-plain")
    assert load_body(locate(plain)).encode(TEXTS[:2]).shape == (2, 16)


@pytest.mark.parametrize(
    "name", ["./missing", "/nowhere/missing", "~/missing", "a/b/c", "models/", "demo:another", "file"]
)
def test_what_is_no_model_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("not a model")
    with pytest.raises(ModelError, match=name.rstrip("/")):
        locate(name)


def test_the_demo_model_is_found_with_the_published_weights(demo_model: str) -> None:
    assert (locate(demo_model) / "modules.json").is_file()


def test_the_demo_model_with_other_weights_is_refused(demo_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_DEMO_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="sha256"):
        locate(demo_model)


def test_without_its_package_the_demo_model_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_DEMO_PACKAGE", "no_such_package_at_all")
    with pytest.raises(UnavailableError, match="not installed"):
        locate(bodies.DEMO)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        pytest.param("modules.json", "{", id="modules cut off"),
        pytest.param("config.json", "{}", id="no architecture"),
        pytest.param("model.safetensors", "not tensors", id="weights foreign"),
        pytest.param("model.safetensors", None, id="no weights"),
    ],
)
def test_a_damaged_body_is_refused(tiny_student: Path, tmp_path: Path, file: str, content: str | None) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "damaged"))
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match="damaged"):
        load_body(folder)


SPY = "from pathlib import Path\nPath({path!r}).write_text('ran')\nfrom transformers import BertModel as Spy\n"


def test_code_in_a_model_folder_is_never_run(tiny_student: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    module = Path(shutil.copytree(tiny_student, tmp_path / "module"))
    modules = json.loads((module / "modules.json").read_text())
    modules[0]["type"] = "spy.Spy"
    (module / "modules.json").write_text(json.dumps(modules))
    model = Path(shutil.copytree(tiny_student, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "spy", "auto_map": {"AutoConfig": "spy.Spy", "AutoModel": "spy.Spy"}}
    (model / "config.json").write_text(json.dumps(config))
    for folder in (module, model):
        (folder / "spy.py").write_text(SPY.format(path=str(evidence)))
        with pytest.raises(ModelError, match="does not load"):
            load_body(folder)
    assert not evidence.exists()


@pytest.mark.parametrize("name", ["cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        specials: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        return tf.ModernBertModel, tf.ModernBertConfig(**common, **specials, local_attention=4)
    if name == "ALBERT":
        return tf.AlbertModel, tf.AlbertConfig(**common)
    return tf.BertModel, tf.BertConfig(**common)


def make(name: str, tokenizer: Path, folder: Path) -> SentenceTransformer:
    from transformers import AutoTokenizer

    make_model, config = _architecture(name)
    torch.manual_seed(0)
    make_model(config).save_pretrained(folder)
    from_pretrained: Any = AutoTokenizer.from_pretrained
    from_pretrained(tokenizer).save_pretrained(folder)
    return load_body(folder)


def config_of(body: SentenceTransformer) -> Any:
    encoder: Any = body[0]
    return encoder.auto_model.config


def layers_of(body: SentenceTransformer) -> list[dict[str, torch.Tensor]]:
    return [layer.state_dict() for layer in layers._layers(body)[2]]


def around_layers(body: SentenceTransformer) -> dict[str, torch.Tensor]:
    path = next(path for path in layers._LAYER_PATHS if any(f".{path}.0." in name for name in body.state_dict()))
    return {name: tensor for name, tensor in body.state_dict().items() if f".{path}." not in name}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def cut_and_compare(body: SentenceTransformer, keep: tuple[int, ...], folder: Path) -> None:
    """Cut, compare part by part, and compare the outputs with those after a folder."""
    whole, before = layers_of(body), body.encode(TEXTS[:4])
    small = cut_layers(body, keep)
    assert n_layers(small) == config_of(small).num_hidden_layers == len(keep)
    for kept, index in zip(layers_of(small), keep, strict=True):
        assert_same(kept, whole[index])
    assert_same(around_layers(small), around_layers(body))
    assert n_layers(body) == config_of(body).num_hidden_layers == 4

    outputs = small.encode(TEXTS[:4])
    assert np.allclose(outputs, before, atol=1e-6) is (keep == (0, 1, 2, 3))
    small.save_pretrained(str(folder), create_model_card=False)
    again = load_body(folder)
    assert n_layers(again) == len(keep)
    np.testing.assert_allclose(again.encode(TEXTS[:4]), outputs, atol=1e-6)


@pytest.mark.parametrize("keep", [(0,), (0, 1, 2, 3), (3, 0)])
def test_a_cut_body_keeps_its_parts_and_survives_a_folder(
    teacher_body: SentenceTransformer, keep: tuple[int, ...], tmp_path: Path
) -> None:
    cut_and_compare(teacher_body, keep, tmp_path / "small")


@pytest.mark.parametrize("name", ["DistilBERT", "RoBERTa", "MPNet"])
def test_other_encoders_are_cut_like_bert(name: str, tiny_student: Path, tmp_path: Path) -> None:
    cut_and_compare(make(name, tiny_student, tmp_path / "whole"), (1, 3), tmp_path / "small")


@pytest.mark.parametrize("keep", [(0, 2), (1, 3)])
def test_an_encoder_whose_layers_differ_by_place_is_cut_rightly_or_refused(
    keep: tuple[int, ...], tiny_student: Path, tmp_path: Path
) -> None:
    body = make("ModernBERT", tiny_student, tmp_path / "whole")
    try:
        cut_layers(body, keep)
    except ModelError:
        return
    cut_and_compare(body, keep, tmp_path / "small")


def test_a_cut_body_shares_no_memory_with_the_whole(teacher_body: SentenceTransformer) -> None:
    small = cut_layers(teacher_body, (0, 1))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for name, parameter in teacher_body.named_parameters() if "bias" not in name)


@pytest.mark.parametrize("keep", [(), (4,), (-1,), (0, 0), (0, 1, 9)])
def test_layers_that_are_not_there_are_refused(teacher_body: SentenceTransformer, keep: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="body with 4"):
        cut_layers(teacher_body, keep)


def test_a_body_whose_layers_share_weights_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="transformer encoder"):
        cut_layers(make("ALBERT", tiny_student, tmp_path / "albert"), (0, 1))


def test_a_body_without_a_transformer_is_refused() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    body = SentenceTransformer(modules=[BoW(vocab=["a", "b"])], device="cpu")
    with pytest.raises(ModelError, match="transformer encoder"):
        n_layers(body)


# Running


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_embed_gives_what_encode_gives_in_the_texts_order(
    student_body: SentenceTransformer, batch_size: int, normalize: bool
) -> None:
    texts = [*TEXTS, "", "short", TEXTS[0]]
    ours = embed(student_body, texts, batch_size=batch_size, normalize=normalize)
    theirs = student_body.encode(texts, normalize_embeddings=normalize)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


def test_embed_keeps_the_order_across_chunks(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.models.encode._CHUNK", 7)
    np.testing.assert_allclose(embed(student_body, TEXTS), student_body.encode(TEXTS), atol=1e-5)


def test_embed_of_nothing_has_no_rows(student_body: SentenceTransformer) -> None:
    assert embed(student_body, []).shape == (0, 16)
    assert embed(student_body, []).dtype == np.float32


def test_embed_runs_without_dropout(student_body: SentenceTransformer) -> None:
    expected = embed(student_body, TEXTS[:4])
    student_body.train()
    np.testing.assert_array_equal(embed(student_body, TEXTS[:4]), expected)


# Heads


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_on_hard_labels_a_head_is_a_plain_logistic_regression(classes: int, strength: float) -> None:
    from sklearn.linear_model import LogisticRegression

    rows = vectors(0, 80, 6)
    labels = np.arange(80) % classes
    ours = fit_head(rows, one_hot(labels, classes), C=strength)
    plain = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(rows, labels)
    np.testing.assert_allclose(ours.coef_, plain.coef_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ours.intercept_, plain.intercept_, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(ours.classes_, np.arange(classes))


def penalised_cross_entropy(
    coef: torch.Tensor, intercept: torch.Tensor, rows: Floats, targets: Floats, weights: Floats
) -> torch.Tensor:
    """What scikit-learn minimises at C = 1: cross-entropy summed over the texts, and half the squared length."""
    logits = torch.tensor(rows, dtype=torch.float64) @ coef.double().T + intercept.double()
    if targets.shape[1] == 2:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    entropies = -(torch.tensor(targets, dtype=torch.float64) * logits.log_softmax(dim=1)).sum(dim=1)
    return (torch.tensor(weights, dtype=torch.float64) * entropies).sum() + coef.square().sum() / 2


@few
@given(seeds, st.integers(2, 4), st.booleans())
def test_a_head_minimises_the_soft_cross_entropy(seed: int, classes: int, weighted: bool) -> None:
    rows, targets = vectors(seed, 40, 3), distributions(seed, 40, classes)
    targets = np.where(targets < 0.002, 0, targets)
    targets = (targets / targets.sum(axis=1, keepdims=True)).astype(np.float32)
    weights = np.random.default_rng(seed).uniform(0.2, 3, 40).astype(np.float32) if weighted else None
    head = fit_head(rows, targets, weights, C=1.0)

    size = 1 if classes == 2 else classes
    coef = torch.zeros(size, 3, dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    mass = np.ones(40, np.float32) if weights is None else weights
    optimizer: Any = torch.optim.LBFGS(
        [coef, intercept], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = penalised_cross_entropy(coef, intercept, rows, targets, mass)
        torch.autograd.backward(value)
        return value.item()

    optimizer.step(closure)
    best = penalised_cross_entropy(coef, intercept, rows, targets, mass).item()
    found = penalised_cross_entropy(torch.tensor(head.coef_), torch.tensor(head.intercept_), rows, targets, mass)
    assert found.item() == pytest.approx(best, rel=1e-4)
    np.testing.assert_allclose(head.coef_, coef.detach().numpy(), atol=0.02)


def test_a_class_without_weight_is_still_a_class_of_the_head() -> None:
    head = fit_head(vectors(0, 40, 4), one_hot(np.arange(40) % 2 * 2, 3))
    assert head.predict_proba(vectors(1, 5, 4)).shape == (5, 3)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_saved_head_is_the_same_head(tmp_path: Path, classes: int) -> None:
    head = soft_head(classes=classes)
    assert save_head(head, tmp_path)
    again = load_head(tmp_path)
    assert again is not None
    rows = vectors(5, 20, 16)
    np.testing.assert_array_equal(again.predict_proba(rows), head.predict_proba(rows))
    np.testing.assert_array_equal(again.predict(rows), head.predict(rows))
    assert {path.name for path in tmp_path.iterdir()} == {"head.json", "head.safetensors"}


def test_a_saved_head_keeps_classes_that_are_strings(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    rows, names = vectors(0, 30, 4), np.array(LABELS)[np.arange(30) % 3]
    save_head(LogisticRegression().fit(rows, names), tmp_path)
    again = load_head(tmp_path)
    assert again is not None
    assert set(again.predict(rows)) <= set(LABELS)


def test_another_kind_of_head_is_not_saved(tmp_path: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    assert not save_head(KNeighborsClassifier(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert load_head(tmp_path) is None


# Whole models


@pytest.fixture
def model(student_body: SentenceTransformer) -> SetFitModel:
    classifier = new_model(student_body, LABELS)
    classifier.model_head = soft_head()
    return classifier


@pytest.fixture
def saved(model: SetFitModel, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "saved", title="Tiny")
    return tmp_path / "saved"


def test_both_loaders_predict_what_the_model_predicted(model: SetFitModel, saved: Path) -> None:
    from setfit import SetFitModel

    expected = predict_proba(model, TEXTS)
    np.testing.assert_allclose(expected.sum(axis=1), 1, atol=1e-6)
    plain = SetFitModel.from_pretrained(str(saved), device="cpu")
    for again in (load(saved, device="cpu"), load(str(saved), device="cpu"), plain):
        np.testing.assert_allclose(predict_proba(again, TEXTS), expected, atol=1e-6)
        assert again.predict(TEXTS) == [LABELS[i] for i in expected.argmax(axis=1)]
        assert list(again.labels) == LABELS


def test_saving_leaves_the_model_usable_and_only_the_folder(model: SetFitModel, tmp_path: Path) -> None:
    expected = predict_proba(model, TEXTS[:4])
    save_model(model, tmp_path / "a" / "saved")
    np.testing.assert_array_equal(predict_proba(model, TEXTS[:4]), expected)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["saved"]


def test_a_model_of_normalized_embeddings_stays_one(model: SetFitModel, tmp_path: Path) -> None:
    raw = predict_proba(model, TEXTS)
    model.normalize_embeddings = True
    expected = predict_proba(model, TEXTS)
    assert np.abs(expected - raw).max() > 1e-4
    save_model(model, tmp_path / "normalized")
    np.testing.assert_allclose(predict_proba(load(tmp_path / "normalized", device="cpu"), TEXTS), expected, atol=1e-6)


def test_an_existing_model_is_left_alone(model: SetFitModel, saved: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with pytest.raises(OutputError):
        save_model(model, saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_saving_draws_nothing_on_the_screen(
    model: SetFitModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(model, tmp_path / "saved")
    load(tmp_path / "saved", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_the_card_names_title_and_classes(saved: Path) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "# Tiny" in card
    assert "over 3 classes: Übermorgen" in card


def test_a_model_whose_labels_are_numbers_can_be_saved(model: SetFitModel, tmp_path: Path) -> None:
    model.labels = [1, 2, 3]
    save_model(model, tmp_path / "numbers")
    assert len(load(tmp_path / "numbers", device="cpu").predict(TEXTS[:2])) == 2


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_head_that_is_a_pickle_only_is_not_opened(saved: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    bomb = pickle.dumps(_Bomb(evidence))
    (saved / "model_head.pkl").write_bytes(bomb)
    load(saved, device="cpu")
    (saved / "head.json").unlink()
    with pytest.raises(ModelError, match="trust"):
        load(saved, device="cpu")
    assert not evidence.exists()
    pickle.loads(bomb)
    assert evidence.exists()


def test_a_trusted_pickle_gives_the_same_model(model: SetFitModel, saved: Path) -> None:
    (saved / "head.json").unlink()
    (saved / "head.safetensors").unlink()
    again = load(saved, device="cpu", trust_pickle=True)
    np.testing.assert_allclose(predict_proba(again, TEXTS), predict_proba(model, TEXTS), atol=1e-6)


def test_a_pickled_head_whose_classes_are_names_is_matched_by_name(
    model: SetFitModel, saved: Path, student_body: SentenceTransformer, tmp_path: Path
) -> None:
    """As SetFit trains one on labels that are strings: in alphabetical order, whatever the order of the labels."""
    from sklearn.linear_model import LogisticRegression

    from setfit_kd.export import export_bundle
    from setfit_kd.runtime import Classifier

    gold = [LABELS[row % 3] for row in range(len(TEXTS))]
    labels = sorted(LABELS, reverse=True)
    head = LogisticRegression(C=1e4).fit(student_body.encode(TEXTS), gold)
    (saved / "head.json").unlink()
    joblib.dump(head, saved / "model_head.pkl")
    (saved / "config_setfit.json").write_text(json.dumps({"labels": labels, "normalize_embeddings": False}))
    again = load(saved, device="cpu", trust_pickle=True)
    expected = list(head.predict(student_body.encode(TEXTS)))
    assert [again.labels[row] for row in predict_proba(again, TEXTS).argmax(axis=1)] == expected
    assert list(again.predict(TEXTS)) == expected
    export_bundle(again, tmp_path / "bundle", texts=TEXTS, format="onnx")
    assert Classifier(tmp_path / "bundle").predict(TEXTS) == expected
    (saved / "config_setfit.json").write_text(json.dumps({"labels": ["x", "y", "z"]}))
    with pytest.raises(ModelError, match="names the labels"):
        load(saved, device="cpu", trust_pickle=True)


@pytest.mark.parametrize("kind", ["one-vs-rest", "multi-output", "classifier-chain"])
def test_a_head_of_several_labels_is_refused(kind: str, saved: Path) -> None:
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


def _set(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / file).write_text(content))


def _head(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        described = json.loads((folder / "head.json").read_text())
        (folder / "head.json").write_text(json.dumps({**described, **changes}))

    return change


def _weights(*shapes: tuple[int, ...]) -> Callable[[Path], None]:
    names = ("coef", "intercept")
    return lambda folder: save_file(
        {name: np.zeros(shape) for name, shape in zip(names, shapes, strict=False)}, folder / "head.safetensors"
    )


def void(_: object) -> None:
    return None


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_set("head.json", ""), id="description empty"),
        pytest.param(_set("head.json", "[]"), id="description a list"),
        pytest.param(_set("head.json", "{}"), id="description without content"),
        pytest.param(_head(format=99), id="a later format"),
        pytest.param(_head(kind="neural"), id="another kind"),
        pytest.param(_head(classes=[0, 1]), id="fewer classes than weights"),
        pytest.param(_head(classes=3), id="classes a number"),
        pytest.param(_set("head.safetensors", "not tensors"), id="weights foreign"),
        pytest.param(lambda folder: (folder / "head.safetensors").unlink(), id="no weights"),
        pytest.param(_weights((3, 16)), id="no intercept"),
        pytest.param(_weights((3, 16), (2,)), id="intercept too short"),
        pytest.param(_weights((3, 7), (3,)), id="another dimension than the body"),
        pytest.param(_set("config_setfit.json", "{"), id="settings cut off"),
        pytest.param(_set("config_setfit.json", "[]"), id="settings a list"),
        pytest.param(_set("config_setfit.json", '{"labels": ["one", "two"]}'), id="fewer labels than classes"),
        pytest.param(_set("modules.json", "{"), id="body damaged"),
    ],
)
def test_a_damaged_model_is_refused(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(ModelError):
        load(saved, device="cpu")


def test_a_body_alone_is_no_classifier(tiny_student: Path) -> None:
    with pytest.raises(ModelError, match="no head"):
        load(tiny_student, device="cpu")


def test_a_run_without_a_student_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ModelError, match="no student"):
        load(tmp_path, device="cpu")


def test_a_run_folder_stands_for_its_student(model: SetFitModel, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    save_model(model, tmp_path / "run" / "student")
    again = load(tmp_path / "run", device="cpu")
    np.testing.assert_allclose(predict_proba(again, TEXTS), predict_proba(model, TEXTS), atol=1e-6)


# What a body is


def _pad_left(body: Any) -> None:
    body.tokenizer.padding_side = "left"


def _truncate_left(body: Any) -> None:
    body.tokenizer.truncation_side = "left"


def _shorter(body: Any) -> None:
    body.tokenizer.model_max_length = 5


def _static_shorter(body: Any) -> None:
    body.tokenizer.enable_truncation(3)


def _static_padded(body: Any) -> None:
    body.tokenizer.enable_padding(length=40)


def _without_mask(body: Any) -> None:
    body.tokenizer.model_input_names = ["input_ids"]


def _special_tokens_split(body: Any) -> None:
    body.tokenizer.split_special_tokens = True


def _other_first_token(body: Any) -> None:
    from tokenizers import processors

    body.tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[MASK]", 4))


def _prompt_left_out(body: Any) -> None:
    body[1].include_prompt = False


def _other_prompt(body: Any) -> None:
    body.prompts["task"] = "of "


def _tokens_normalised(body: Any) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    body.insert(1, Normalize("token_embeddings"))


def _fewer_dimensions(body: Any) -> None:
    body.truncate_dim = 4


def _summed(body: Any) -> None:
    body[0].embedding.mode = "sum"


def _other_epsilon(body: Any) -> None:
    body[0].auto_model.encoder.layer[0].output.LayerNorm.eps = 0.5


def _next_weight(body: Any) -> None:
    weight = next(body.parameters())
    with torch.no_grad():
        weight[:] = torch.nextafter(weight, weight + 1)


ENCODER_CHANGES: list[Callable[[Any], Any]] = [
    *(_pad_left, _truncate_left, _shorter, _without_mask, _special_tokens_split, _other_first_token),
    *(_prompt_left_out, _other_prompt, _tokens_normalised, _fewer_dimensions, _other_epsilon),
    *(torch.nn.Module.bfloat16, torch.nn.Module.double),
]
STATIC_CHANGES: list[Callable[[Any], Any]] = [
    *(_static_shorter, _static_padded, _summed, _next_weight, torch.nn.Module.double),
]


@pytest.fixture
def encoder(student_body: SentenceTransformer) -> SentenceTransformer:
    student_body.max_seq_length = 20
    student_body.prompts, student_body.default_prompt_name = {"task": "goal "}, "task"
    return student_body


@pytest.fixture
def vectors_of_tokens(student_body: SentenceTransformer) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    table = StaticEmbedding(student_body.tokenizer, embedding_weights=vectors(0, 2000, 8).astype(np.float32))
    return SentenceTransformer(modules=[table], device="cpu")


IDENTITY_TEXTS = ["a [SEP] b", " ".join(row["text"] for row in newswire("train")[:2])]


@pytest.mark.parametrize(
    ("body", "change"),
    [*(("encoder", of) for of in ENCODER_CHANGES), *(("vectors_of_tokens", of) for of in STATIC_CHANGES)],
)
def test_what_changes_embeddings_changes_the_hash(
    body: str, change: Callable[[Any], Any], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(body)
    before, embeddings = content_hash(model), model.encode(IDENTITY_TEXTS, convert_to_numpy=False)
    assert content_hash(model) == before
    change(model)
    after = content_hash(model)
    changed = model.encode(IDENTITY_TEXTS, convert_to_numpy=False)
    assert any(
        old.dtype != new.dtype or not torch.equal(old, new) for old, new in zip(embeddings, changed, strict=True)
    )
    assert after != before


def _another_path(body: Any) -> None:
    body.tokenizer.name_or_path = body[0].auto_model.config._name_or_path = "elsewhere"


def _another_unused_prompt(body: Any) -> None:
    body.prompts["other"] = "never used "


def _another_dropout(body: Any) -> None:
    for module in body.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5


@pytest.mark.parametrize("change", [_another_path, _another_unused_prompt, _another_dropout, torch.nn.Module.train])
def test_what_leaves_embeddings_alone_leaves_the_hash(
    encoder: SentenceTransformer, change: Callable[[Any], Any]
) -> None:
    before, embeddings = content_hash(encoder), encoder.encode(IDENTITY_TEXTS)
    change(encoder)
    np.testing.assert_array_equal(encoder.encode(IDENTITY_TEXTS), embeddings)
    assert content_hash(encoder) == before


def test_a_body_in_another_folder_has_the_same_hash(tiny_student: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_student, tmp_path / "copy")
    assert content_hash(load_body(copied)) == content_hash(load_body(tiny_student))
