"""Locating, loading, cutting, running and saving bodies, heads and models."""

from __future__ import annotations

import json
import os
import pickle
import re
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
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, Normalize, StaticEmbedding
from sklearn.linear_model import LogisticRegression

from setfit_kd.errors import InputError, ModelError, OutputError, UnavailableError
from setfit_kd.models import heads
from setfit_kd.models.bodies import content_hash, load_body, locate_model
from setfit_kd.models.demo import DEMO_MODELS, DemoModel
from setfit_kd.models.encode import embed, predict_proba
from setfit_kd.models.heads import C_PER_CLASS, balanced_weights, fit_head, head_task, load_head, save_head
from setfit_kd.models.io import load, new_model, save_model
from setfit_kd.models.layers import cut_layers, n_layers
from setfit_kd.tasks.classification import MULTI_LABEL
from setfit_kd.utils.files import file_hash

if TYPE_CHECKING:
    from setfit import SetFitModel

Floats = npt.NDArray[np.float32]

TEXTS = [row["text"] for row in newswire("train")[:12]]
LABELS = ["Übermorgen", "a, b", "two\nlines"]


def vectors(seed: int, n: int, d: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def distributions(seed: int, n: int, classes: int) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.4), size=n).astype(np.float32)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Locating and loading


@pytest.mark.parametrize(
    ("function", "name", "error", "message"),
    [
        (locate_model, "~/missing", ModelError, "No such model folder: ~/missing"),
        (locate_model, "a/b/c", ModelError, "No such model folder: a/b/c"),
        (locate_model, "file", ModelError, "No such model folder: file"),
        (locate_model, "models/", ModelError, "The folder models is not a model"),
        (locate_model, "nope", UnavailableError, "'nope' is neither a local path nor in the local cache"),
        (load, "nope", ModelError, r"^No such file or folder: nope\n.*USER/NAME"),
        (load, "user/nope", UnavailableError, "'user/nope' is neither a local path nor in the local cache"),
        (load, "demo:nope", ModelError, "demo model must be"),
    ],
)
def test_missing_model_is_named_in_the_error(function: Any, name: str, error: type[InputError], message: str) -> None:
    Path("models").mkdir()
    Path("file").touch()
    with pytest.raises(error, match=message) as error_info:
        function(name)
    assert error_info.value.hint


def test_demo_model_is_installed_and_has_the_published_weights(
    demo_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (locate_model(demo_model) / "modules.json").is_file()
    monkeypatch.setitem(DEMO_MODELS, demo_model, DEMO_MODELS[demo_model]._replace(sha256="0" * 64))
    with pytest.raises(ModelError, match="sha256"):
        locate_model(demo_model)
    monkeypatch.setitem(DEMO_MODELS, demo_model, DEMO_MODELS[demo_model]._replace(packages=("no-such-package==1",)))
    with pytest.raises(UnavailableError, match="not installed") as error_info:
        locate_model(demo_model)
    assert "setfit-kd[demo]" in str(error_info.value.hint)


@pytest.fixture
def split_model(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Install demo:all-mpnet-base-v2 as a tiny model in two packages; return the parts of its zip file."""
    archive = Path(shutil.make_archive(str(tmp_path / "model"), "zip", tiny_student.parent, tiny_student.name))
    content, parts = archive.read_bytes(), []
    for number, part in enumerate((content[: len(content) // 2], content[len(content) // 2 :])):
        (tmp_path / "site" / f"part_{number}").mkdir(parents=True)
        parts.append(tmp_path / "site" / f"part_{number}" / f"model.zip.00{number}")
        parts[-1].write_bytes(part)
        (tmp_path / "site" / f"part_{number}" / "__init__.py").write_text("raise AssertionError('imported')")
        information = tmp_path / "site" / f"part_{number}-1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: part-{number}\nVersion: 1\n")
        (information / "RECORD").write_text("".join(f"part_{number}/{path.name},,\n" for path in parts[-1:]))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("SETFIT_KD_CACHE", str(tmp_path / "cache"))
    sha256 = file_hash(tiny_student / "model.safetensors")
    names = ("part-0==1", "part-1==1"), ("model.zip.000", "model.zip.001")
    monkeypatch.setitem(DEMO_MODELS, "demo:all-mpnet-base-v2", DemoModel("mpnet", *names, sha256))
    return parts


def test_model_in_several_packages_is_unpacked_once(split_model: list[Path], tiny_student: Path) -> None:
    folder = locate_model("demo:all-mpnet-base-v2")
    assert load_body(folder).state_dict().keys() == load_body(tiny_student).state_dict().keys()
    assert {path.name for path in folder.iterdir()} == {path.name for path in tiny_student.iterdir()}
    split_model[0].write_bytes(b"")  # no longer used
    assert locate_model("demo:all-mpnet-base-v2") == folder
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ModelError, match="are not those of all-mpnet-base-v2: expected sha256") as error_info:
        locate_model("demo:all-mpnet-base-v2")
    assert str(folder) in str(error_info.value.hint)


def test_damaged_packages_leave_nothing_in_the_cache(split_model: list[Path], tmp_path: Path) -> None:
    split_model[0].write_bytes(split_model[1].read_bytes())
    with pytest.raises(ModelError, match="damaged") as error_info:
        locate_model("demo:all-mpnet-base-v2")
    assert "--force-reinstall part-0==1 part-1==1" in str(error_info.value.hint)
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_code_of_a_module_is_never_run(tiny_student: Path, tmp_path: Path) -> None:
    folder, marker = Path(shutil.copytree(tiny_student, tmp_path / "module")), tmp_path / "marker"
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "spy.Spy"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "spy.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\nSpy = None\n")
    with pytest.raises(ModelError, match="Cannot load"):
        load_body(folder)
    assert not marker.exists()


# Cutting layers

LAYER = re.compile(r"\.layers?\.(\d+)\.")


@pytest.mark.parametrize(
    ("architecture", "keep"),
    [("bert", (0,)), ("bert", (0, 1, 2, 3)), ("bert", (3, 0)), ("distilbert", (1, 3)), ("mpnet", (1, 3))],
)
def test_cut_body_keeps_its_layers_and_can_be_saved(
    architecture: str, keep: tuple[int, ...], make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    body = load_body(make_encoder(architecture))
    small, original = cut_layers(body, keep), body.state_dict()
    encoder: Any = small[0]
    assert n_layers(small) == encoder.auto_model.config.num_hidden_layers == len(keep)
    for name, value in small.state_dict().items():
        name = LAYER.sub(lambda match: match[0].replace(match[1], str(keep[int(match[1])])), name)
        assert torch.equal(value, original.pop(name)), name
    assert {int(match[1]) if (match := LAYER.search(name)) else name for name in original} == {0, 1, 2, 3} - set(keep)
    pointers = ({parameter.data_ptr() for parameter in model.parameters()} for model in (body, small))
    assert not set.intersection(*pointers)
    assert n_layers(body) == 4

    outputs = small.encode(TEXTS[:4])
    assert np.allclose(outputs, body.encode(TEXTS[:4]), atol=1e-6) is (keep == (0, 1, 2, 3))
    small.save_pretrained(str(tmp_path / "small"), create_model_card=False)
    np.testing.assert_allclose(load_body(tmp_path / "small").encode(TEXTS[:4]), outputs, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "keep", "message"),
    [
        *(("bert", keep, "body with 4 layers") for keep in [(), (4,), (-1,), (0, 0), (0, 1, 9)]),
        ("albert", (0, 1), "transformer encoder"),  # its layers share their weights
        ("modernbert", (0, 2), "differ in type"),
    ],
)
def test_layers_that_cannot_be_cut_are_rejected(
    architecture: str, keep: tuple[int, ...], message: str, make_encoder: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError, match=message):
        cut_layers(load_body(make_encoder(architecture)), keep)


def test_body_without_transformer_has_no_layers() -> None:
    first, second = (SentenceTransformer(modules=[BoW(vocab=["a", word])], device="cpu") for word in "bc")
    with pytest.raises(ModelError, match="transformer encoder"):
        n_layers(first)
    assert content_hash(first) != content_hash(second)


# Running


@pytest.mark.parametrize(("batch_size", "normalize"), [(4, False), (64, True)])
def test_embed_matches_encode_across_chunks(
    student_body: SentenceTransformer, batch_size: int, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.models.encode._CHUNK", 7)
    texts = [*TEXTS, "", "short", TEXTS[0]]
    expected = student_body.encode(texts, normalize_embeddings=normalize)
    student_body.train()  # dropout must be off
    embeddings = embed(student_body, texts, batch_size=batch_size, normalize=normalize)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert embeddings.dtype == np.float32
    assert embed(student_body, []).shape == (0, 16)


# Heads


@pytest.mark.parametrize(("classes", "C", "width"), [(2, 0.1, 6), (5, 30.0, 6), (5, 1.0, 100)])
def test_head_of_hard_labels_matches_scikit_learn(classes: int, C: float, width: int) -> None:  # noqa: N803
    rows, labels = vectors(0, 80, width), np.arange(80) % classes
    head = fit_head(rows, np.eye(classes)[labels], C=C)
    scale = np.sqrt(rows.var(axis=0, dtype=np.float64).sum())
    expected = LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(rows.astype(np.float64) / scale, labels)
    np.testing.assert_allclose(head.coef_ * scale, expected.coef_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(head.intercept_, expected.intercept_, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(head.classes_, np.arange(classes))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.booleans(), st.booleans())
def test_head_minimizes_penalized_cross_entropy_of_soft_labels(
    seed: int, classes: int, weighted: bool, by_class: bool
) -> None:
    """At the minimum, which is the only one of a convex function, the gradient is zero."""
    rows, targets = vectors(seed, 40, 3), distributions(seed, 40, classes)
    targets = np.where(targets < 0.002, 0, targets)
    targets /= targets.sum(axis=1, keepdims=True)
    weights = np.random.default_rng(seed).uniform(0.2, 3, 40).astype(np.float32) if weighted else None
    start = fit_head(rows, targets[::-1], C=100.0) if weighted else None
    class_weights = np.random.default_rng(seed).uniform(0.2, 3, classes) if by_class else None
    head = fit_head(rows, targets, weights, C=1.0, class_weights=class_weights, start=start)

    terms = targets * (1 if weights is None else weights[:, None])  # the weight of each class of each text
    if class_weights is not None:
        terms = terms * class_weights * terms.sum() / (terms * class_weights).sum()
    coef, intercept = (torch.tensor(values, requires_grad=True) for values in (head.coef_, head.intercept_))
    logits = torch.tensor(rows, dtype=torch.float64) @ coef.T + intercept
    if classes == 2:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    share = terms.sum(axis=1) / terms.sum()
    spread = share @ np.square(rows - share @ rows).sum(axis=1)  # the mean squared distance from the mean
    loss = -(torch.tensor(terms) * logits.log_softmax(dim=1)).sum() + spread * coef.square().sum() / 2
    for gradient in torch.autograd.grad(loss, [coef, intercept]):
        assert gradient.abs().max().item() < 1e-2


def test_head_fit_converges_fast_from_similar_head_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, targets = vectors(0, 200, 20), distributions(0, 200, 40)
    head = fit_head(rows, targets, C=1000.0)
    again = fit_head(rows, targets, C=1100.0, start=head)
    assert again.n_iter_[0] <= 3 < head.n_iter_[0]
    expected = fit_head(rows, targets, C=1100.0).predict_proba(rows)
    np.testing.assert_allclose(again.predict_proba(rows), expected, atol=1e-4)
    monkeypatch.setattr(heads, "_MAX_PRODUCTS", 1)
    assert fit_head(rows, targets, C=1000.0).n_iter_[0] < head.n_iter_[0]


def test_head_keeps_classes_without_texts() -> None:
    head = fit_head(vectors(0, 40, 4), np.eye(3)[np.arange(40) % 2 * 2])
    assert head.predict_proba(vectors(1, 5, 4)).shape == (5, 3)


@pytest.mark.parametrize(
    ("counts", "exponent", "weights"),
    [
        ([90, 10], 0, None),
        ([5, 5, 5], 1, None),
        ([90, 10], 1, [5 / 9, 5]),
        ([16, 4], 0.5, [5 / 6, 5 / 3]),
        ([4, 0], 0.5, [1, 2]),
        ([0, 0], 1, None),
    ],
)
def test_balanced_weights(counts: list[int], exponent: float, weights: list[float] | None) -> None:
    result = balanced_weights(np.array(counts), exponent)
    assert result is None if weights is None else np.allclose(np.asarray(result), weights)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.floats(-4, 4), st.integers(0, 20))
def test_head_does_not_depend_on_scale_position_and_constant_dimensions(
    seed: int, classes: int, log_scale: float, n_constant: int
) -> None:
    rows, targets = vectors(seed, 60, 8), distributions(seed, 60, classes)
    changed = np.column_stack([10**log_scale * (rows.astype(np.float64) + 0.5), np.ones((60, n_constant))])
    expected, probabilities = (fit_head(x, targets).predict_proba(x) for x in (rows, changed))
    np.testing.assert_allclose(probabilities, expected, atol=2e-3)


def test_default_c_grows_with_the_number_of_classes() -> None:
    for classes in (2, 5):
        rows, targets = vectors(0, 60, 8), distributions(0, 60, classes)
        head, expected = fit_head(rows, targets), fit_head(rows, targets, C=C_PER_CLASS * classes)
        np.testing.assert_array_equal(head.coef_, expected.coef_)


def test_head_is_unchanged_after_saving_and_loading(tmp_path: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    save_head(KNeighborsClassifier(), tmp_path)  # another type of head
    assert list(tmp_path.iterdir()) == []
    assert load_head(tmp_path) is None
    rows = vectors(0, 60, 16)
    strings = LogisticRegression().fit(rows, np.array(LABELS)[np.arange(60) % 3])
    for head in (fit_head(rows, distributions(0, 60, 2)), strings):
        save_head(head, tmp_path)
        loaded = load_head(tmp_path)
        assert loaded is not None
        np.testing.assert_array_equal(loaded.predict_proba(rows), head.predict_proba(rows))
        np.testing.assert_array_equal(loaded.predict(rows), head.predict(rows))
    assert {path.name for path in tmp_path.iterdir()} == {"head.json", "head.safetensors"}


# Models


@pytest.fixture
def model(student_body: SentenceTransformer) -> SetFitModel:
    classifier = new_model(student_body, LABELS)
    classifier.model_head = fit_head(vectors(0, 60, 16), distributions(0, 60, 3))
    return classifier


@pytest.fixture
def saved(model: SetFitModel, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "models" / "saved", title="Tiny")
    return tmp_path / "models" / "saved"


@pytest.mark.parametrize("normalize", [False, True])
def test_load_and_setfit_predict_the_same_as_the_saved_model(
    model: SetFitModel, normalize: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from setfit import SetFitModel

    model.normalize_embeddings = normalize
    expected = predict_proba(model, TEXTS)
    np.testing.assert_allclose(expected.sum(axis=1), 1, atol=1e-6)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")  # a run folder is loaded as its student
    save_model(model, run / "student")
    np.testing.assert_array_equal(predict_proba(model, TEXTS), expected)
    loaded = [load(folder, device="cpu") for folder in (str(run), run / "student")]
    assert capfd.readouterr() == ("", "")
    for result in (*loaded, SetFitModel.from_pretrained(str(run / "student"), device="cpu")):
        np.testing.assert_allclose(predict_proba(result, TEXTS), expected, atol=1e-6)
        assert result.predict(TEXTS) == [LABELS[i] for i in expected.argmax(axis=1)]
        assert list(result.labels) == LABELS
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "student"]


def test_existing_model_is_not_overwritten(model: SetFitModel, saved: Path, tmp_path: Path) -> None:
    model.labels = [1, 2, 3]  # numbers can be saved too
    save_model(model, tmp_path / "numbers")
    assert len(load(tmp_path / "numbers", device="cpu").predict(TEXTS[:2])) == 2
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with pytest.raises(OutputError):
        save_model(model, saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    assert "over 3 classes: Übermorgen" in (saved / "README.md").read_text(encoding="utf-8")


def test_differentiable_head_predicts_probabilities(model: SetFitModel) -> None:
    from setfit import SetFitHead

    model.model_head = SetFitHead(in_features=16, out_features=3)
    embeddings = torch.tensor(model.model_body.encode(TEXTS))
    expected = (embeddings @ model.model_head.linear.weight.T + model.model_head.linear.bias).softmax(dim=1)
    np.testing.assert_allclose(predict_proba(model, TEXTS), expected.detach().numpy(), atol=1e-5)
    assert predict_proba(model, []).shape == (0, 3)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("marker",)


def test_pickled_head_is_not_unpickled(saved: Path, tmp_path: Path) -> None:
    marker, bomb = tmp_path / "marker", pickle.dumps(_Bomb())
    (saved / "model_head.pkl").write_bytes(bomb)
    load(saved, device="cpu")
    (saved / "head.json").unlink()
    with pytest.raises(ModelError, match="trust"):
        load(saved, device="cpu")
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()
    (saved / "model_head.pkl").write_bytes(b"not a pickle")
    with pytest.raises(ModelError, match="Cannot unpickle"):
        load(saved, device="cpu", trust_pickle=True)


def test_string_classes_of_pickled_head_are_matched_by_name(saved: Path, student_body: SentenceTransformer) -> None:
    """SetFit trains heads on string labels in alphabetical order, regardless of the order of the labels."""
    gold = [LABELS[row % 3] for row in range(len(TEXTS))]
    head = LogisticRegression(C=1e4).fit(student_body.encode(TEXTS), gold)
    (saved / "head.json").unlink()
    joblib.dump(head, saved / "model_head.pkl")
    change_json(saved / "config_setfit.json", labels=sorted(LABELS, reverse=True))
    loaded = load(saved, device="cpu", trust_pickle=True)
    expected = list(head.predict(student_body.encode(TEXTS)))
    assert [loaded.labels[row] for row in predict_proba(loaded, TEXTS).argmax(axis=1)] == expected
    assert list(loaded.predict(TEXTS)) == expected
    change_json(saved / "config_setfit.json", labels=["x", "y", "z"])
    with pytest.raises(ModelError, match="must match the classes of the head"):
        load(saved, device="cpu", trust_pickle=True)


def test_pickled_multi_label_heads(saved: Path, student_body: SentenceTransformer) -> None:
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.multioutput import MultiOutputClassifier

    embeddings, labels = student_body.encode(TEXTS), np.random.default_rng(0).integers(2, size=(len(TEXTS), 3))
    (saved / "head.json").unlink()
    one_vs_rest, multi_output = (
        head_class(LogisticRegression()).fit(embeddings, labels)
        for head_class in (OneVsRestClassifier, MultiOutputClassifier)
    )
    joblib.dump(one_vs_rest, saved / "model_head.pkl")
    loaded = load(saved, device="cpu", trust_pickle=True)
    np.testing.assert_allclose(predict_proba(loaded, TEXTS), one_vs_rest.predict_proba(embeddings), atol=1e-5)
    assert head_task(loaded.model_head) is MULTI_LABEL
    joblib.dump(multi_output, saved / "model_head.pkl")
    with pytest.raises(ModelError, match="MultiOutputClassifier"):
        load(saved, device="cpu", trust_pickle=True)


def write_weights(folder: Path, width: int, value: float = 0) -> None:
    save_file({"coef": np.full((3, width), value), "intercept": np.zeros(3)}, folder / "head.safetensors")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "description is a list": lambda folder: (folder / "head.json").write_text("[]"),
    "description without keys": lambda folder: (folder / "head.json").write_text("{}"),
    "later format": lambda folder: change_json(folder / "head.json", format=99),
    "fewer classes than weights": lambda folder: change_json(folder / "head.json", classes=[0, 1]),
    "invalid weights": lambda folder: (folder / "head.safetensors").write_text("not tensors"),
    "no weights": lambda folder: (folder / "head.safetensors").unlink(),
    "other dimension than the body": lambda folder: write_weights(folder, 7),
    "infinite weights": lambda folder: write_weights(folder, 16, value=float("inf")),
    "config is a list": lambda folder: (folder / "config_setfit.json").write_text("[]"),
    "fewer labels than classes": lambda folder: change_json(folder / "config_setfit.json", labels=["one", "two"]),
    "truncated modules.json": lambda folder: (folder / "modules.json").write_text("{"),
    "no weights of the body": lambda folder: (folder / "model.safetensors").unlink(),
    "no head": lambda folder: (folder / "head.json").unlink() or (folder / "model_head.pkl").unlink(),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_is_rejected(saved: Path, damage: str) -> None:
    DAMAGES[damage](saved)
    with pytest.raises(ModelError, match=re.escape(str(saved))) as error_info:
        load(saved, device="cpu")
    assert error_info.value.hint


def test_run_must_have_one_student(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ModelError, match="no student"):
        load(tmp_path, device="cpu")
    for name in ("b", "a"):
        (tmp_path / "students" / name).mkdir(parents=True)
    with pytest.raises(ModelError, match="2 students: a, b") as error_info:
        load(tmp_path, device="cpu")
    assert f"{tmp_path}/students/a" in str(error_info.value.hint)


# Content hash


CHANGES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "encoder": {
        "left padding": lambda body: setattr(body.tokenizer, "padding_side", "left"),
        "shorter texts": lambda body: setattr(body.tokenizer, "model_max_length", 5),
        "split special tokens": lambda body: setattr(body.tokenizer, "split_special_tokens", True),
        "prompt not pooled": lambda body: setattr(body[1], "include_prompt", False),
        "other prompt": lambda body: body.prompts.update(task="of "),
        "normalized tokens": lambda body: body.insert(1, Normalize("token_embeddings")),
        "fewer dimensions": lambda body: setattr(body, "truncate_dim", 4),
        "epsilon": lambda body: setattr(body[0].auto_model.encoder.layer[0].output.LayerNorm, "eps", 0.5),
        "bfloat16": torch.nn.Module.bfloat16,
    },
    "static_body": {
        "truncation": lambda body: body.tokenizer.enable_truncation(3),
        "sum": lambda body: setattr(body[0].embedding, "mode", "sum"),
        "weights": lambda body: next(body.parameters()).data.mul_(1 + 1e-6),
    },
}
HASH_TEXTS = ["a [SEP] b", " ".join(TEXTS[:2])]


@pytest.fixture
def encoder(student_body: SentenceTransformer) -> SentenceTransformer:
    student_body.max_seq_length = 20
    student_body.prompts, student_body.default_prompt_name = {"task": "goal "}, "task"
    return student_body


@pytest.fixture
def static_body(student_body: SentenceTransformer) -> SentenceTransformer:
    table = StaticEmbedding(student_body.tokenizer, embedding_weights=vectors(0, 2000, 8))
    return SentenceTransformer(modules=[table], device="cpu")


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind, names in CHANGES.items() for change in names])
def test_hash_changes_with_the_embeddings(kind: str, change: str, request: pytest.FixtureRequest) -> None:
    body = request.getfixturevalue(kind)
    before, embeddings = content_hash(body), body.encode(HASH_TEXTS, convert_to_numpy=False)
    assert content_hash(body) == before
    CHANGES[kind][change](body)
    after = content_hash(body)
    changed = body.encode(HASH_TEXTS, convert_to_numpy=False)
    pairs = zip(embeddings, changed, strict=True)
    assert any(old.dtype != new.dtype or not torch.equal(old, new) for old, new in pairs)
    assert after != before


def test_hash_ignores_changes_that_do_not_affect_embeddings(
    encoder: SentenceTransformer, tiny_student: Path, tmp_path: Path
) -> None:
    before, embeddings = content_hash(encoder), encoder.encode(HASH_TEXTS)
    encoder.prompts["other"] = "never used "
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    encoder.train()
    assert content_hash(encoder) == before
    np.testing.assert_array_equal(encoder.encode(HASH_TEXTS), embeddings)
    copied = shutil.copytree(tiny_student, tmp_path / "copy")
    assert content_hash(load_body(copied)) == content_hash(load_body(tiny_student))
