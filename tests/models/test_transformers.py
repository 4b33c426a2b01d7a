"""Transformers trained end to end: the same classifier in every library, copied, blank, fine-tuned and distilled."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import FAST, newswire
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.special import rel_entr, softmax
from sklearn.metrics import accuracy_score, f1_score
from synthetic import NAMES, POOL, few_labels, pool_signals, same, texts_and_labels, weights
from torch import Tensor

from setfit_kd import RunResult, TeacherSignals, distill, load, train_student, train_teacher
from setfit_kd.config import Family, FinetuneConfig, StudentConfig, TeacherConfig, resolved
from setfit_kd.data import LabeledSet
from setfit_kd.errors import ConfigError, DataError, ModelError, SetFitKDError
from setfit_kd.evaluation import measure_quality
from setfit_kd.evaluation.cost import count_parameters
from setfit_kd.export import export_bundle
from setfit_kd.finetune import finetune, resolve_batch_size
from setfit_kd.finetune.validation import ValidationCallback
from setfit_kd.memory import resolve_device
from setfit_kd.models import (
    cut_layers,
    family_of,
    get_head,
    is_static,
    load_body,
    locate_body,
    new_model,
    predict_proba,
    save_model,
    static_body,
)
from setfit_kd.models.transformer_head import transformer_module
from setfit_kd.run import teacher_stages as teaching_module
from setfit_kd.runtime import Classifier
from setfit_kd.student import folder_names, locate_student
from setfit_kd.student.agreement import AgreementCallback
from setfit_kd.teacher import resolve_teacher_batch_size
from setfit_kd.teacher.steps import to_finetune_config
from setfit_kd.training.loop import _schedule, record_losses

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Floats = npt.NDArray[np.floating]

CPU = resolve_device("cpu")
NEWS = [row["text"] for row in newswire("eval")[:40]]
TEXTS = [*NEWS[:10], "goal", "", " ".join(NEWS[:6])]
"""Texts of many lengths, the last longer than any of the tiny transformers reads."""
PLAIN: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


# Tiny transformers

SIZES: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 4},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 4},
    "roberta": {"num_hidden_layers": 4},
    "mpnet": {"num_hidden_layers": 4},
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 4},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
}
"""The architectures, with what their configs have beside or in the place of `USUAL`."""
USUAL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    # As wide as this, what an untrained network says of two texts differs.
    "initializer_range": 0.3,
}
LAYER = re.compile(r"\.layer\.(\d+)\.")

Maker = Callable[..., Path]


def transformers() -> Any:
    import transformers

    return transformers


def config_of(architecture: str, **changes: Any) -> Any:
    usual = USUAL
    if architecture == "distilbert":
        usual = {name: USUAL[name] for name in ("max_position_embeddings", "pad_token_id", "initializer_range")}
    return transformers().AutoConfig.for_model(architecture, **{**usual, **SIZES[architecture], **changes})


@pytest.fixture(scope="session")
def tokenizer(tiny_student: Path) -> Any:
    return transformers().AutoTokenizer.from_pretrained(tiny_student)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Maker:
    """Folder of an encoder without a head, and with the tiny teacher's tokenizer."""
    made: dict[str, Path] = {}

    def make(architecture: str, **changes: Any) -> Path:
        key = json.dumps([architecture, changes])
        if key not in made:
            folder = tmp_path_factory.mktemp("encoders") / architecture
            config = config_of(architecture, vocab_size=len(tokenizer), **changes)
            torch.manual_seed(0)
            transformers().AutoModel.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


def loaded(folder: Path, names: Sequence[str] = NAMES, *, seed: int = 0) -> SentenceTransformer:
    return locate_body(f"transformer:{folder}").load(names, seed=seed)


def classifier(body: SentenceTransformer, names: Sequence[str] = NAMES) -> SetFitModel:
    model = new_model(body, names)
    model.model_head = get_head(body)
    return model


def network_of(body: SentenceTransformer) -> Any:
    return transformer_module(body).model


def tensors(body: SentenceTransformer) -> dict[str, Tensor]:
    """All weights by the names that transformers has for them, the last layer's by ``head``."""
    head = transformer_module(body).head.state_dict()
    return {**network_of(body).state_dict(), **{f"head.{name}": value for name, value in head.items()}}


def by_transformers(folder: Path, texts: Sequence[str]) -> Floats:
    """What transformers alone says of texts, with nothing but a folder."""
    network = transformers().AutoModelForSequenceClassification.from_pretrained(folder).eval()
    reader = transformers().AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = network(**reader(list(texts), padding=True, truncation=True, return_tensors="pt")).logits
    return cast("Floats", softmax(logits.double().numpy(), axis=1))


@pytest.fixture(scope="session")
def bert(encoder: Maker) -> Path:
    return encoder("bert")


@pytest.fixture(scope="session")
def learner(encoder: Maker) -> Path:
    """Folder of an encoder that learns in a few steps."""
    return encoder("bert", num_hidden_layers=1, initializer_range=0.1)


@pytest.fixture(scope="session")
def saved(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole classifier."""
    folder = tmp_path_factory.mktemp("classifiers") / "bert"
    save_model(classifier(loaded(bert)), folder)
    return folder


# The same classifier


@pytest.mark.parametrize("classes", [2, 16])  # 16 is how wide the networks are
@pytest.mark.parametrize("architecture", SIZES)
def test_a_transformer_is_the_same_classifier_in_every_library(
    architecture: str, classes: int, encoder: Maker, tmp_path: Path
) -> None:
    names = [f"class {index}" for index in range(classes)]
    body = loaded(encoder(architecture), names)
    assert family_of(body) == "transformer"
    save_model(classifier(body, names), tmp_path / "saved")
    theirs = by_transformers(tmp_path / "saved", TEXTS)
    assert np.ptp(theirs, axis=0).max() > 0.01
    features = body.encode(TEXTS, show_progress_bar=False)
    assert features.shape == (len(TEXTS), body.get_embedding_dimension())
    np.testing.assert_allclose(get_head(body).predict_proba(features), theirs, atol=1e-6)
    again = load(tmp_path / "saved", device="cpu")
    assert again.labels == names
    np.testing.assert_allclose(predict_proba(again, TEXTS), theirs, atol=1e-6)
    assert [str(label) for label in again.predict(TEXTS)] == [names[index] for index in theirs.argmax(axis=1)]


def test_what_a_saved_transformers_card_says_works(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert "library_name: transformers" in card
    classify = transformers().pipeline("text-classification", model=str(saved), top_k=None)
    for text in TEXTS:
        said = {row["label"]: row["score"] for row in classify([text], truncation=True)[0]}
        np.testing.assert_allclose([said[name] for name in NAMES], by_transformers(saved, [text])[0], atol=1e-6)


@pytest.mark.parametrize("names", [NAMES[:2], NAMES, [f"class {index}" for index in range(16)]])
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta"])
def test_a_head_for_the_same_classes_is_kept(
    architecture: str, names: Sequence[str], encoder: Maker, tmp_path: Path
) -> None:
    body = loaded(encoder(architecture), names)
    save_model(classifier(body, names), tmp_path / "saved")
    again = tensors(loaded(tmp_path / "saved", names, seed=1))
    assert again.keys() == tensors(body).keys()
    assert all(torch.equal(value, again[name]) for name, value in tensors(body).items())


@pytest.mark.parametrize("shuffled", [False, True], ids=["file", "classes"])
def test_a_head_is_kept_by_the_names_of_its_classes(shuffled: bool, encoder: Maker, tmp_path: Path) -> None:
    """Whatever the order of the keys in ``config.json``, as text "10" comes before "2", and of the classes."""
    names = [f"class {index}" for index in range(12)]
    body = loaded(encoder("bert"), names)
    save_model(classifier(body, names), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["id2label"] = dict(sorted(config["id2label"].items()))
    assert list(config["id2label"]) != sorted(config["id2label"], key=int)
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    order = list(np.random.default_rng(0).permutation(12)) if shuffled else list(range(12))
    again = loaded(tmp_path / "saved", [names[index] for index in order])
    features = body.encode(TEXTS, show_progress_bar=False)
    expected = get_head(body).predict_proba(features)[:, order]
    np.testing.assert_allclose(get_head(again).predict_proba(features), expected, atol=1e-6)


@pytest.mark.parametrize("names", [("a", "b", "c", "d"), NAMES[:2], (*NAMES, "weather")], ids=["other", "few", "more"])
def test_for_other_classes_there_is_a_new_head_on_the_same_network(names: Sequence[str], saved: Path) -> None:
    before, after = tensors(loaded(saved)), tensors(loaded(saved, names))
    assert after["head.weight"].shape == (len(names), 16)
    rows = min(len(names), len(NAMES))
    assert not torch.isclose(after["head.weight"][:rows], before["head.weight"][:rows]).any()
    assert not after["head.bias"].any()
    assert after["head.weight"].std().item() == pytest.approx(USUAL["initializer_range"], rel=0.3)
    assert all(torch.equal(value, before[name]) for name, value in after.items() if not name.startswith("head."))


@pytest.mark.parametrize(("architecture", "first"), [("bert", None), ("distilbert", "pre_"), ("roberta", "classifier")])
def test_what_a_folder_has_no_weights_for_is_decided_by_the_seed(
    architecture: str, first: str | None, encoder: Maker
) -> None:
    folder, state = encoder(architecture), torch.get_rng_state()
    one, again, other = (tensors(loaded(folder, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    differ = {name for name, value in one.items() if not torch.equal(value, other[name])}
    assert differ == {name for name in one if name.endswith("weight") and name.startswith(("head", first or "head"))}


@pytest.mark.parametrize(
    "name", ["transformer:BERT", "layers:2@transformer:BERT", "layers:2:distilbert@transformer:BERT"]
)
def test_the_seed_of_a_run_decides_the_head_of_a_student_that_has_none(name: str, bert: Path) -> None:
    source, teacher = locate_student(name.replace("BERT", str(bert))), loaded(bert)
    one, again, other = (
        tensors(source.prepare(teacher, NAMES, seed=seed).make(teacher, [], CPU))["head.weight"] for seed in (3, 3, 4)
    )
    assert torch.equal(one, again)
    assert not torch.isclose(one, other).any()


def test_weights_in_half_precision_are_made_single(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "half")
    whole = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert {value.dtype for value in tensors(loaded(folder)).values() if value.is_floating_point()} == {torch.float32}


def test_parameters_of_a_transformer_are_those_of_its_network(saved: Path) -> None:
    network = transformers().AutoModelForSequenceClassification.from_pretrained(saved)
    assert count_parameters(load(saved, device="cpu")) == network.num_parameters()


# Every pairing

SMALL: dict[str, Any] = {**FAST, "shots": 4, "pool_size": 32, "batch_size": 16, "cache": False}


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Folder of a DistilBERT's config, and nothing else."""
    folder = tmp_path_factory.mktemp("configs") / "blank"
    config_of("distilbert", vocab_size=len(tokenizer), n_layers=1).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Pairings:
    """A run of one teacher and every kind of student."""

    teacher: Family
    names: dict[str, str]
    result: RunResult

    @property
    def folder(self) -> Path:
        assert self.result.output_dir is not None
        return self.result.output_dir

    def place(self, kind: str) -> str:
        slug = folder_names(list(self.names.values()))[list(self.names).index(kind)]
        return f"students/{slug}"


KINDS = ("setfit", "transformer", "layers", "distilbert", "static", "blank")


@pytest.fixture(scope="module")
def pairings_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path, blank: Path
) -> Callable[[Family], Pairings]:
    made: dict[Family, Pairings] = {}

    def run(family: Family) -> Pairings:
        if family not in made:
            names = {
                "setfit": str(tiny_student),
                "transformer": f"transformer:{tiny_student}",
                "layers": "layers:2",
                "distilbert": "layers:0,2:distilbert" + (f"@transformer:{tiny_teacher}" if family == "setfit" else ""),
                "static": "static:8",
                "blank": f"blank:{blank}",
            }
            teacher = str(tiny_teacher) if family == "setfit" else f"transformer:{tiny_teacher}"
            folder = tmp_path_factory.mktemp("runs") / family
            evaluated = tmp_path_factory.mktemp("data") / "eval.jsonl"
            evaluated.write_text("".join(json.dumps(row) + "\n" for row in newswire("eval")[:40]))
            sources = ["bundled:newswire", "bundled:newswire", str(evaluated)]
            result = distill(*sources, teacher=teacher, student=tuple(names.values()), output_dir=folder, **SMALL)
            made[family] = Pairings(family, names, result)
        return made[family]

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["setfit", "transformer"])
def test_every_pairing_is_trained_measured_and_kept(
    family: Family, kind: str, pairings_of: Callable[[Family], Pairings]
) -> None:
    run = pairings_of(family)
    place = run.place(kind)
    student = run.result.students[run.names[kind]]
    is_transformer = kind in ("transformer", "distilbert", "blank") or (family, kind) == ("transformer", "layers")
    assert family_of(student.model_body) == ("transformer" if is_transformer else "setfit")
    assert is_static(student.model_body) is (kind == "static")
    evaluations = run.result.evaluations
    for name in ("teacher", place.replace("students", "baselines"), place):
        measured, again = evaluations[name], load(run.folder / name, device="cpu")
        assert measured.probabilities.shape == (len(NEWS), 4)
        np.testing.assert_allclose(predict_proba(again, NEWS), measured.probabilities, atol=1e-6)
        if name != "teacher":
            assert family_of(again.model_body) == family_of(student.model_body)
    measured = evaluations[place]
    assert evaluations["teacher"].quality.agreement is None
    assert measured.quality.agreement is not None
    np.testing.assert_allclose(predict_proba(student, NEWS), measured.probabilities, atol=1e-6)
    if is_transformer:  # the softmax of its logits as they are, at whatever temperature it was trained
        np.testing.assert_allclose(by_transformers(run.folder / place, NEWS), measured.probabilities, atol=1e-6)


@pytest.mark.parametrize("kind", ["transformer", "layers", "distilbert", "blank"])
def test_a_bundle_of_a_transformer_student_agrees_with_it(
    kind: str, pairings_of: Callable[[Family], Pairings], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    run = pairings_of("transformer")
    student = load(run.folder / run.place(kind), device="cpu")
    bundle = export_bundle(student, tmp_path / "bundle", texts=TEXTS, format="onnx")
    assert bundle.parity.agreement == 1
    found = Classifier(tmp_path / "bundle")
    assert found.labels == list(student.labels or ())
    np.testing.assert_allclose(
        found.predict_proba(NEWS), run.result.evaluations[run.place(kind)].probabilities, atol=1e-5
    )


def test_a_finished_run_of_transformers_is_taken_as_it_is(
    pairings_of: Callable[[Family], Pairings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = pairings_of("transformer")
    with caplog.at_level("INFO", "setfit_kd"):
        again = distill(resume=shutil.copytree(run.folder, tmp_path / "run"))
    stages = json.loads((run.folder / "run.json").read_text())["stages"]
    assert caplog.text.count(": taken from") == len(stages)
    for name, student in again.students.items():
        assert same(weights(student), weights(run.result.students[name]))


def test_a_static_students_vectors_are_the_features_of_the_transformers_tokens(bert: Path) -> None:
    teacher = loaded(bert)
    prepared = locate_student("static:8").prepare(teacher, NAMES)
    assert prepared.family == "setfit"
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    first: Any = prepared.make(teacher, TEXTS, CPU)[0]
    expected: Any = static_body(teacher, TEXTS, dimension=8)[0]
    assert torch.equal(first.embedding.weight, expected.embedding.weight)


# Copies


def perturb(body: SentenceTransformer) -> None:
    """What fine-tuning does: no weight is what it was."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("name", "keep"),
    [("layers:0,2", (0, 2)), ("layers:2", (0, 3)), ("layers:3,1", (3, 1)), ("layers:4", (0, 1, 2, 3))],
)
@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet", "distilbert"])
def test_a_student_is_a_copy_of_the_fine_tuned_teachers_layers_and_of_all_around_them(
    architecture: str, name: str, keep: tuple[int, ...], encoder: Maker
) -> None:
    teacher = loaded(encoder(architecture))
    prepared = locate_student(name).prepare(teacher, NAMES)
    perturb(teacher)
    student = prepared.make(teacher, [], CPU)
    assert family_of(student) == prepared.family == "transformer"
    whole, small = tensors(teacher), tensors(student)
    for part, value in small.items():
        original = LAYER.sub(lambda match: f".layer.{keep[int(match[1])]}.", part)
        assert torch.equal(value, whole.pop(original)), part
    left = {int(match[1]) if (match := LAYER.search(part)) else part for part in whole}
    assert left == {0, 1, 2, 3} - set(keep)
    assert network_of(student).config.num_hidden_layers == len(keep)


@pytest.mark.parametrize("output_dir", [None, "run"])
def test_in_a_run_layers_and_head_are_those_of_the_trained_and_refined_teacher(
    output_dir: str | None, tiny_teacher: Path
) -> None:
    names = ("layers:0,2", "layers:0,2:distilbert")
    settings = {**SMALL, "learning_rate": 1e-9, "output_dir": output_dir}  # so low that nothing moves
    result = distill(*["bundled:newswire"] * 2, teacher=f"transformer:{tiny_teacher}", student=names, **settings)
    assert result.teacher is not None
    teacher, head = result.teacher.model_body, result.teacher.model_head
    before, whole = (tensors(body) for body in (loaded(tiny_teacher, result.signals.label_names), teacher))
    expected = (tensors(cut_layers(teacher, (0, 2))), in_distilbert(whole, (0, 2)))
    for name, wanted in zip(names, expected, strict=True):
        student = result.students[name].model_body
        assert tensors(student).keys() == wanted.keys()
        for part, value in tensors(student).items():
            torch.testing.assert_close(value, wanted[part], atol=1e-6, rtol=0)
        np.testing.assert_allclose(get_head(student).coef_, head.coef_, atol=1e-5)
        np.testing.assert_allclose(get_head(student).intercept_, head.intercept_, atol=1e-5)
    for part in ("head.weight", "bert.encoder.layer.2.output.dense.weight"):
        assert (whole[part] - before[part]).abs().max() > 1e-3  # it was trained


# DistilBERT

EMBEDDINGS = "embeddings.{}_embeddings.weight"
IN_BERT = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


def in_distilbert(bert: dict[str, Tensor], keep: Sequence[int]) -> dict[str, Tensor]:
    """All that a DistilBERT of some of a BERT's layers has to hold."""
    word, position, token_type = (
        bert["bert." + EMBEDDINGS.format(kind)] for kind in ("word", "position", "token_type")
    )
    expected = {
        "distilbert." + EMBEDDINGS.format("word"): word,
        "distilbert." + EMBEDDINGS.format("position"): position + token_type[0],
    }
    for kind in ("weight", "bias"):
        expected[f"distilbert.embeddings.LayerNorm.{kind}"] = bert[f"bert.embeddings.LayerNorm.{kind}"]
        expected[f"pre_classifier.{kind}"] = bert[f"bert.pooler.dense.{kind}"]
        expected[f"head.{kind}"] = bert[f"head.{kind}"]
        for new, old in enumerate(keep):
            for part, original in IN_BERT.items():
                value = bert[f"bert.encoder.layer.{old}.{original}.{kind}"]
                expected[f"distilbert.transformer.layer.{new}.{part}.{kind}"] = value
    return expected


@pytest.mark.parametrize(("name", "keep"), [("layers:0,2", (0, 2)), ("layers:3,1", (3, 1)), ("layers:2", (0, 3))])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_distilbert_has_the_weights_of_the_fine_tuned_bert_under_its_own_names(
    name: str, keep: tuple[int, ...], classes: int, bert: Path
) -> None:
    teacher = loaded(bert, NAMES[:classes])
    prepared = locate_student(f"{name}:distilbert").prepare(teacher, NAMES[:classes])
    perturb(teacher)
    student = prepared.make(teacher, [], CPU)
    assert network_of(student).config.model_type == "distilbert"
    assert list(network_of(student).config.id2label.values()) == list(NAMES[:classes])
    found, expected = tensors(student), in_distilbert(tensors(teacher), keep)
    assert found.keys() == expected.keys()
    for part, value in found.items():
        assert torch.equal(value, expected[part]), part


@pytest.mark.parametrize("keep", [(0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_distilbert_reads_texts_as_the_bert_does(keep: tuple[int, ...], activation: str, encoder: Maker) -> None:
    teacher = loaded(encoder("bert", hidden_act=activation, num_attention_heads=4))
    perturb(teacher)
    name = f"layers:{','.join(map(str, keep))}:distilbert"
    student = locate_student(name).prepare(teacher, NAMES).make(teacher, [], CPU)
    read: Any = teacher.tokenizer
    features = read(TEXTS, padding=True, truncation=True, return_tensors="pt")
    ids, mask = features["input_ids"], features["attention_mask"]
    assert student.preprocess(TEXTS)["input_ids"].tolist() == ids.tolist()
    with torch.inference_mode():
        hidden = [
            network_of(body).base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            for body in (cut_layers(teacher, keep), student)
        ]
    assert hidden[0][mask == 1].std() > 0.1
    torch.testing.assert_close(*(states[mask == 1] for states in hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "setfit", "gelu_new"])
def test_only_a_bert_becomes_a_distilbert(architecture: str, encoder: Maker, tiny_teacher: Path) -> None:
    if architecture == "setfit":
        teacher = load_body(tiny_teacher)
    elif architecture == "gelu_new":
        teacher = loaded(encoder("bert", hidden_act=architecture))
    else:
        teacher = loaded(encoder(architecture))
    with pytest.raises(ModelError, match=r"Only a BERT's layers|no gelu_new layers") as raised:
        locate_student("layers:2:distilbert").prepare(teacher, NAMES)
    assert "without :distilbert" in str(raised.value.hint)


# Blank transformers


def test_a_blank_student_is_untrained_and_as_its_config_says(blank: Path, tokenizer: Any, bert: Path) -> None:
    prepared = locate_student(f"blank:{blank}").prepare(loaded(bert), NAMES)
    assert prepared.family == "transformer"
    body = prepared.make(loaded(bert), [], CPU)
    config = network_of(body).config
    assert (config.model_type, config.n_layers, config.dim, config.n_heads) == ("distilbert", 1, 16, 2)
    assert list(config.id2label.values()) == list(NAMES)
    for name, value in tensors(body).items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name.lower():
            assert (value == 1).all(), name
        else:
            assert value.std().item() == pytest.approx(USUAL["initializer_range"], rel=0.3), name
    read: Any = body.tokenizer
    assert read.get_vocab() == tokenizer.get_vocab()
    assert read(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("source", ["config", "weights too"])
def test_a_blank_students_weights_are_decided_by_the_seed_alone(source: str, blank: Path, bert: Path) -> None:
    folder, state = blank if source == "config" else bert, torch.get_rng_state()
    one, again, other = (
        tensors(locate_student(f"blank:{folder}").prepare(loaded(bert), NAMES, seed=seed).make(loaded(bert), [], CPU))
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    whole = tensors(loaded(bert, seed=3))
    drawn = [name for name, value in one.items() if value.dim() == 2]
    assert len(drawn) > 5
    for name in drawn:
        assert not torch.isclose(one[name], other[name]).all(), name
        assert name.startswith("head") or name not in whole or not torch.equal(one[name], whole[name]), name


@pytest.mark.parametrize("family", ["setfit", "transformer"])
def test_a_blank_student_reads_by_the_tokenizer_beside_its_config_or_else_by_the_teachers(
    family: Family, tokenizer: Any, bert: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = loaded(bert) if family == "transformer" else load_body(tiny_teacher)
    own = transformers().AutoTokenizer.from_pretrained(bert)
    own.add_tokens(["thematch"])
    ids = {}
    for name in ("own", "none"):
        config_of("bert", vocab_size=len(own)).save_pretrained(tmp_path / name)
        if name == "own":
            own.save_pretrained(tmp_path / name)
        body = locate_student(f"blank:{tmp_path / name}").prepare(teacher, NAMES).make(teacher, [], CPU)
        ids[name] = body.preprocess(["thematch was lost"])["input_ids"][0].tolist()
        assert np.isfinite(body.encode(TEXTS, show_progress_bar=False)).all()
    assert ids["own"] == own("thematch was lost")["input_ids"]
    assert ids["none"] == tokenizer("thematch was lost")["input_ids"]
    assert ids["own"] != ids["none"]


@pytest.mark.parametrize(("beside", "whose"), [(False, "the teacher's"), (True, "its")])
def test_a_config_that_knows_fewer_tokens_than_the_tokenizer_is_refused(
    beside: bool, whose: str, tokenizer: Any, bert: Path, tmp_path: Path
) -> None:
    known = len(tokenizer) - 1
    config_of("bert", vocab_size=known).save_pretrained(tmp_path)
    if beside:
        tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"knows {known} tokens, {whose} tokenizer {known + 1}"):
        locate_student(f"blank:{tmp_path}").prepare(loaded(bert), NAMES)


def test_without_any_tokenizer_there_is_no_blank_student(blank: Path, tiny_teacher: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer in"):
        locate_student(f"blank:{blank}").prepare(static_body(load_body(tiny_teacher), [], dimension=8), NAMES)


# What a student learns


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("setfit", {"temperature": 1.0, "dropout": False, "freeze_embeddings": True, "max_length": None}),
        ("transformer", {"temperature": 5.0, "dropout": True, "freeze_embeddings": False, "max_length": 128}),
        ("setfit", {"objective": "similarity,soft-labels=3", "learning_rate": None}),
        ("transformer", {"objective": "soft-labels", "learning_rate": 2e-5}),
    ],
)
def test_each_family_has_settings_that_are_usual_for_it(family: Family, expected: dict[str, Any]) -> None:
    assert StudentConfig.of().alpha == 0.5
    usual = StudentConfig.of().with_family_defaults(family)
    assert {name: getattr(usual, name) for name in expected} == expected
    given = {"temperature": 2.0, "dropout": family == "setfit", "objective": "embedding", "max_length": 16}
    kept = StudentConfig.of(**given).with_family_defaults(family)
    assert {name: getattr(kept, name) for name in given} == given


def expected_loss(logits: Floats, signals: TeacherSignals, gold: Floats, temperature: float, alpha: float) -> float:
    """The mean over texts, ``gold`` being a row of zeros where there is none."""
    teacher = softmax(np.log(signals.probabilities.astype(np.float64)) / temperature, axis=1)
    divergence = rel_entr(teacher, softmax(logits / temperature, axis=1)).sum(axis=1)
    share = alpha * gold.sum(axis=1)
    hard = rel_entr(gold, softmax(logits, axis=1)).sum(axis=1)
    return float((share * hard + (1 - share) * temperature**2 * divergence).mean())


@pytest.mark.parametrize(
    ("labeled", "settings", "temperature", "alpha"),
    [
        (0, {}, 5, 0.5),
        (16, {}, 5, 0.5),
        (16, {"temperature": 1}, 1, 0.5),
        (16, {"temperature": 2.5, "alpha": 0.2}, 2.5, 0.2),
        (16, {"alpha": 1}, 5, 1),
    ],
)
def test_a_transformer_begins_with_the_loss_of_its_own_logits(
    labeled: int, settings: dict[str, Any], temperature: float, alpha: float, bert: Path
) -> None:
    signals, body = pool_signals(), loaded(bert)
    head = transformer_module(body).head
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.5, -0.5, 1.0, 0.0]))
    logits = np.asarray(body.encode(signals.texts, show_progress_bar=False), np.float64) @ np.asarray(
        head.weight.detach().double().numpy().T
    ) + np.asarray(head.bias.detach().double().numpy())
    gold = np.zeros((POOL, 4))
    gold[np.arange(labeled), np.arange(labeled) % 4] = 1
    options = {**PLAIN, "batch_size": POOL, "epochs": 1, "dropout": False, **settings}
    with record_losses() as losses:
        train_student(signals, body, labeled=few_labels(labeled) if labeled else None, **options)
    assert losses == pytest.approx([expected_loss(logits, signals, gold, temperature, alpha)], rel=1e-3)


@pytest.mark.parametrize("objective", ["soft-labels", "similarity,soft-labels", "similarity"])
def test_a_transformer_student_comes_to_say_what_the_teacher_says(
    objective: str, learner: Path, tmp_path: Path
) -> None:
    signals, body = pool_signals(), loaded(learner)
    before, meant = predict_proba(classifier(body), signals.texts), signals.probabilities.argmax(axis=1)
    settings = {**PLAIN, "objective": objective, "epochs": 20, "learning_rate": 1e-2, "batch_size": 11}
    student = train_student(signals, body, labeled=few_labels(), **settings)
    after = predict_proba(student, signals.texts)
    assert (before.argmax(axis=1) == meant).mean() < 0.5
    assert (after.argmax(axis=1) == meant).mean() > 0.9
    save_model(student, tmp_path / "saved")
    np.testing.assert_allclose(by_transformers(tmp_path / "saved", signals.texts), after, atol=1e-6)


def test_early_stopping_keeps_the_head_of_the_best_look_with_its_body(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []

    def measure(at: AgreementCallback, _: int) -> float:
        seen.append({name: value.clone() for name, value in at.body.state_dict().items()})
        return [0.1, 0.5, 0.4, 0.3][len(seen) - 1]

    monkeypatch.setattr(AgreementCallback, "measure", measure)
    settings = {**PLAIN, "epochs": 6, "patience": 2, "learning_rate": 0.02, "batch_size": 8}
    student = train_student(pool_signals(), f"transformer:{tiny_student}", labeled=few_labels(), **settings)
    assert len(seen) == 4
    assert all(torch.equal(value, seen[1][name]) for name, value in student.model_body.state_dict().items())
    expected = get_head(student.model_body)
    np.testing.assert_array_equal(student.model_head.coef_, expected.coef_)
    np.testing.assert_array_equal(student.model_head.intercept_, expected.intercept_)


# Fine-tuning

TRAINING = LabeledSet(*texts_and_labels(64), NAMES)
VALIDATION = LabeledSet([f"{text} again" for text in TRAINING.texts[:31]], TRAINING.labels[:31], NAMES)


def of_two(data: LabeledSet) -> LabeledSet:
    """The texts of the first three classes, the first two as one: half as many of the second class as of the first."""
    rows = np.flatnonzero(data.labels < 3)
    texts = [data.texts[row] for row in rows]
    return LabeledSet(texts, np.maximum(data.labels[rows] - 1, 0), ("sports or business", "politics"))


def finetuned(folder: Path, labeled: LabeledSet = TRAINING, **settings: Any) -> SetFitModel:
    return finetune(labeled, folder, **{**PLAIN, "learning_rate": 5e-3, "batch_size": 8, **settings})


def predicted(model: SetFitModel, data: LabeledSet) -> npt.NDArray[np.int64]:
    return np.asarray(predict_proba(model, data.texts).argmax(axis=1), np.int64)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The learning rate of each step of each training."""
    optimizers: list[Any] = []
    found: list[list[float]] = []
    step: Any = torch.optim.AdamW.step

    def noted(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not optimizers or optimizers[-1] is not optimizer:
            optimizers.append(optimizer)
            found.append([])
        found[-1].append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return found


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[ValidationCallback]:
    """What has looked at validation texts in each training."""
    found: list[ValidationCallback] = []
    restore = ValidationCallback.restore

    def noted(at: ValidationCallback) -> None:
        found.append(at)
        restore(at)

    monkeypatch.setattr(ValidationCallback, "restore", noted)
    return found


def figures(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Have the looks at validation texts find these figures."""
    left = iter(values)
    monkeypatch.setattr(ValidationCallback, "measure", lambda *_: next(left))


def test_finetuning_learns_from_labels(learner: Path, tmp_path: Path) -> None:
    model = finetuned(learner, epochs=5, learning_rate=1e-2)
    assert (predicted(model, VALIDATION) == VALIDATION.labels).mean() > 0.9
    assert not model.model_body.training
    save_model(model, tmp_path / "saved")
    np.testing.assert_allclose(by_transformers(tmp_path / "saved", TEXTS), predict_proba(model, TEXTS), atol=1e-6)


def test_a_loaded_body_is_finetuned_in_place_and_sources_are_read(tiny_student: Path) -> None:
    rows = [(text, NAMES[label]) for text, label in zip(TRAINING.texts, TRAINING.labels, strict=True)]
    body = loaded(tiny_student, sorted(NAMES))
    before = {name: value.clone() for name, value in tensors(body).items()}
    model = finetune(rows, body, validation=rows[:9], **PLAIN, steps=2, learning_rate=1e-3)
    assert model.model_body is body
    assert model.labels == sorted(NAMES)
    moved = {name for name, value in tensors(body).items() if not torch.equal(value, before[name])}
    assert {"head.weight", "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"} <= moved


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 24),
        ({"epochs": 1}, 8),
        ({"epochs": 1, "batch_size": 60}, 2),
        ({"epochs": 2, "batch_size": None}, 8),
        ({"steps": 5}, 5),
        ({"steps": 5, "epochs": 9}, 5),
    ],
)
def test_the_steps_are_those_of_the_passes_or_as_many_as_asked_for(
    settings: dict[str, Any], steps: int, tiny_student: Path, rates: list[list[float]]
) -> None:
    finetuned(tiny_student, learning_rate=1e-5, **settings)
    assert [len(training) for training in rates] == [steps]


@pytest.mark.parametrize(
    ("device", "given", "size"),
    [("cpu", None, 16), ("cuda", None, 32), ("mps", None, 32), ("cpu", 5, 5), ("cuda", 5, 5)],
)
def test_batches_are_larger_on_an_accelerator_unless_told_otherwise(device: str, given: int | None, size: int) -> None:
    assert resolve_batch_size(torch.device(device), FinetuneConfig.of(batch_size=given)) == size


@pytest.mark.parametrize(
    ("values", "best"), [([0.1, 0.5, 0.3, 0.4], 1), ([0.5, 0.5, 0.2, 0.5], 0), ([0.1, 0.2, 0.3, 0.4], 3)]
)
def test_the_weights_of_the_first_best_look_are_kept(
    values: list[float], best: int, tiny_student: Path, looks: list[ValidationCallback], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []

    def measure(at: ValidationCallback, _: int) -> float:
        seen.append({name: value.clone() for name, value in at.body.state_dict().items()})
        return values[len(seen) - 1]

    monkeypatch.setattr(ValidationCallback, "measure", measure)
    model = finetuned(tiny_student, validation=VALIDATION, steps=7, eval_steps=2)
    assert looks[0].history == list(zip([2, 4, 6, 7], values, strict=True))
    assert looks[0].best_step == [2, 4, 6, 7][best]
    state = model.model_body.state_dict()
    for index, weights_then in enumerate(seen):
        assert all(torch.equal(value, weights_then[name]) for name, value in state.items()) is (index == best)
    np.testing.assert_array_equal(model.model_head.coef_, get_head(model.model_body).coef_)


def test_without_steps_between_looks_there_is_one_a_pass(tiny_student: Path, looks: list[ValidationCallback]) -> None:
    finetuned(tiny_student, validation=VALIDATION, epochs=2, batch_size=30)
    assert [step for step, _ in looks[0].history] == [3, 6]


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy_score,
    "f1-macro": lambda gold, found: f1_score(gold, found, average="macro", zero_division=0),
    "f1-weighted": lambda gold, found: f1_score(gold, found, average="weighted", zero_division=0),
    "f1-binary": lambda gold, found: f1_score(gold, found, average="binary", zero_division=0),
}


@pytest.mark.parametrize("metric", METRICS)
def test_looks_are_compared_by_the_metric_that_is_named(
    metric: str, tiny_student: Path, looks: list[ValidationCallback]
) -> None:
    data, labeled = of_two(VALIDATION), of_two(TRAINING)
    settings: dict[str, Any] = {"steps": 8, "eval_steps": 1, "learning_rate": 3e-3, "schedule": "constant"}
    model = finetuned(tiny_student, labeled, validation=data, metric=metric, **settings)
    found = {name: measure(data.labels, predicted(model, data)) for name, measure in METRICS.items()}
    assert len(set(found.values())) == len(found)
    assert looks[0].best == max(figure for _, figure in looks[0].history) == pytest.approx(found[metric])


def test_binary_f1_is_of_two_classes(tiny_student: Path) -> None:
    with pytest.raises(ConfigError, match="4 classes, binary F1 is of two") as raised:
        finetuned(tiny_student, validation=VALIDATION, metric="f1-binary")
    assert "f1-macro" in str(raised.value.hint)
    with pytest.raises(ConfigError, match="metric"):
        finetuned(tiny_student, validation=VALIDATION, metric="f1")


@given(
    st.integers(2, 4).flatmap(
        lambda classes: st.tuples(
            st.just(classes),
            st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=30),
        )
    )
)
def test_the_scores_are_those_of_scikit_learn(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = drawn
    found, gold = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    scores = measure_quality(found, gold, NAMES[:classes]).scores
    assert set(scores) == {"accuracy", "f1-macro", "f1-weighted"} | ({"f1-binary"} if classes == 2 else set())
    options: dict[str, Any] = {"labels": sorted(set(gold.tolist())), "zero_division": 0}
    assert scores["accuracy"] == pytest.approx(accuracy_score(gold, found))
    assert scores["f1-macro"] == pytest.approx(f1_score(gold, found, average="macro", **options))
    assert scores["f1-weighted"] == pytest.approx(f1_score(gold, found, average="weighted", **options))
    if classes == 2:
        assert scores["f1-binary"] == pytest.approx(f1_score(gold, found, zero_division=0))


@pytest.mark.parametrize(
    ("patience", "values", "steps"),
    [
        (1, [0.5, 0.6, 0.6], 6),
        (1, [0.5, 0.4], 4),
        (2, [0.5, 0.4, 0.6, 0.6, 0.5], 10),
        (None, [0.5, 0.4, 0.4, 0.4, 0.4, 0.4], 12),
        (6, [0.5, 0.4, 0.4, 0.4, 0.4, 0.4], 12),
    ],
)
def test_patience_ends_a_training_after_so_many_looks_without_a_better_one(
    patience: int | None,
    values: list[float],
    steps: int,
    tiny_student: Path,
    rates: list[list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures(monkeypatch, values)
    finetuned(tiny_student, validation=VALIDATION, steps=12, eval_steps=2, patience=patience)
    assert [len(training) for training in rates] == [steps]


@pytest.mark.parametrize(
    ("schedule", "values", "expected"),
    [
        ("plateau", [0.1, 0.2, 0.3, 0.4], [1, 1, 1, 1]),
        ("plateau", [0.5, 0.5, 0.5, 0.5], [1, 1, 0.5, 0.25]),
        ("plateau", [0.4, 0.3, 0.5, 0.1], [1, 1, 0.5, 0.5]),
        ("constant", [0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1]),
    ],
)
def test_on_a_plateau_the_rate_is_halved_after_each_look_that_is_no_better(
    schedule: str,
    values: list[float],
    expected: list[float],
    tiny_student: Path,
    rates: list[list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures(monkeypatch, values)
    settings: dict[str, Any] = {"schedule": schedule, "warmup_steps": 0, "learning_rate": 4e-3}
    finetuned(tiny_student, validation=VALIDATION, steps=12, eval_steps=3, **settings)
    assert rates[0][2::3] == pytest.approx([4e-3 * factor for factor in expected])
    assert rates[0] == sorted(rates[0], reverse=True)


@pytest.mark.parametrize(
    ("given", "warmup", "schedule"), [(None, 3, "linear"), (None, 3, "constant"), (0, 0, "linear"), (10, 10, "linear")]
)
def test_the_rate_rises_to_its_height_and_goes_on_as_scheduled(
    given: int | None, warmup: int, schedule: str, tiny_student: Path, rates: list[list[float]]
) -> None:
    finetuned(tiny_student, steps=30, warmup_steps=given, schedule=schedule, learning_rate=1e-3)
    step = np.arange(30)
    falling = (30 - step) / (30 - warmup) if schedule == "linear" else np.ones(30)
    assert rates[0] == pytest.approx((1e-3 * np.where(step < warmup, step / max(warmup, 1), falling)).tolist())


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (10, 1), (11, 2), (5_000, 500), (5_001, 500), (100_000, 500)])
def test_a_tenth_of_the_steps_warms_up_and_500_at_most(steps: int, warmup: int) -> None:
    arguments = SimpleNamespace()
    _schedule(arguments, FinetuneConfig.of(), steps)
    assert arguments.warmup_steps == warmup


def test_a_finetuning_refuses_what_it_cannot_use(tiny_student: Path) -> None:
    with pytest.raises(DataError, match="over other classes"):
        finetuned(tiny_student, validation=of_two(VALIDATION))
    with pytest.raises(DataError, match="labels that the training set lacks"):
        finetuned(tiny_student, validation=[("rain", "weather")])
    with pytest.raises(ModelError, match="no last layer to be fine-tuned"):
        finetune(TRAINING, load_body(tiny_student), **PLAIN)


def teacher_of(body: SentenceTransformer, **settings: Any) -> SetFitModel:
    renamed = {"teacher_dropout" if name == "dropout" else name: value for name, value in settings.items()}
    every: dict[str, Any] = {**PLAIN, "teacher_steps": 2, "teacher_batch_size": 8, "teacher_learning_rate": 1e-4}
    return train_teacher(LONG, body, **{**every, **renamed})


def student_of(body: SentenceTransformer, **settings: Any) -> SetFitModel:
    signals = TeacherSignals(LONG.texts, np.eye(4, dtype=np.float32)[LONG.labels], NAMES, np.eye(len(LONG)))
    return train_student(signals, body, **{**PLAIN, "batch_size": 8, "epochs": 1, "learning_rate": 1e-4, **settings})


def finetuned_body(body: SentenceTransformer, **settings: Any) -> SetFitModel:
    return finetune(LONG, body, **{**PLAIN, "batch_size": 8, "epochs": 1, **settings})


LONG = LabeledSet([f"{text} " + "goal " * 400 for text in TRAINING.texts[:8]], TRAINING.labels[:8], NAMES)
TRAININGS: dict[str, Callable[..., SetFitModel]] = {
    "finetune": finetuned_body,
    "teacher": teacher_of,
    "student": student_of,
}


@pytest.fixture(scope="session")
def far_reader(encoder: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an encoder that reads 300 tokens."""
    folder = shutil.copytree(
        encoder("bert", num_hidden_layers=1, max_position_embeddings=300), tmp_path_factory.mktemp("far") / "reader"
    )
    reader = transformers().AutoTokenizer.from_pretrained(folder, model_max_length=10_000)
    reader.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", SIZES)
def test_no_transformer_reads_past_its_last_position(architecture: str, encoder: Maker, tmp_path: Path) -> None:
    folder = shutil.copytree(encoder(architecture, pad_token_id=1), tmp_path / "reader")
    transformers().AutoTokenizer.from_pretrained(folder, model_max_length=10_000).save_pretrained(folder)
    body = loaded(folder)
    read = body.tokenize(LONG.texts[:1])["input_ids"].shape[1]
    assert read == (78 if architecture in ("roberta", "mpnet") else 80)
    assert np.isfinite(body.encode(LONG.texts[:2])).all()


@pytest.mark.parametrize(("given", "longest"), [(None, 128), (16, 16), (200, 200), (1000, 300)])
@pytest.mark.parametrize("training", TRAININGS)
def test_a_transformer_reads_128_tokens_unless_told_otherwise(
    training: str, given: int | None, longest: int, far_reader: Path, tmp_path: Path
) -> None:
    body, seen = loaded(far_reader), list[int]()
    body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]["input_ids"].shape[1]))
    model = TRAININGS[training](body, max_length=given)
    assert set(seen) == {longest}
    save_model(model, tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu")
    assert again.model_body.max_seq_length == longest
    said = predict_proba(again, LONG.texts[:2])
    np.testing.assert_allclose(said, by_transformers(tmp_path / "saved", LONG.texts[:2]), atol=1e-6)


def test_a_setfit_body_reads_as_many_tokens_as_ever(far_reader: Path) -> None:
    assert teacher_of(load_body(far_reader)).model_body.max_seq_length == 300


@pytest.mark.parametrize(
    ("family", "settings", "on"),
    [
        ("transformer", {}, True),
        ("transformer", {"dropout": True}, True),
        ("transformer", {"dropout": False}, False),
        ("setfit", {}, False),
        ("setfit", {"dropout": True}, True),
    ],
)
@pytest.mark.parametrize("training", TRAININGS)
def test_dropout_is_on_in_training_a_transformer_unless_told_otherwise(
    training: str, family: Family, settings: dict[str, Any], on: bool, tiny_student: Path
) -> None:
    if training == "finetune" and family == "setfit":
        with pytest.raises(ModelError):
            finetuned_body(load_body(tiny_student), **settings)
        return
    body = loaded(tiny_student) if family == "transformer" else load_body(tiny_student)
    modes: list[bool] = []
    drops: Any = [module for module in body.modules() if isinstance(module, torch.nn.Dropout)]

    def note(module: torch.nn.Module, *_: object) -> None:
        if torch.is_grad_enabled():
            modes.append(module.training)

    for drop in drops:
        drop.register_forward_hook(note)
    model = TRAININGS[training](body, **settings)
    assert set(modes) == {on}
    assert not any(module.training for module in model.model_body.modules())


# The baseline


@pytest.mark.parametrize(("settings", "steps"), [({}, 12), ({"patience": 9}, 8)])
def test_the_baseline_of_a_transformer_is_its_body_fine_tuned_on_labels_for_the_students_steps(
    settings: dict[str, Any],
    steps: int,
    tiny_teacher: Path,
    tiny_student: Path,
    rates: list[list[float]],
    tmp_path: Path,
) -> None:
    rows = newswire("train")[:100]
    by_label = {label: [row for row in rows if row["label"] == label][:4] for label in {row["label"] for row in rows}}
    labeled = [(row["text"], row["label"]) for row in rows if row in by_label[row["label"]]]
    pool = [row["text"] for row in newswire("train")[100:148]]
    evaluated = [(row["text"], row["label"]) for row in newswire("eval")[:20]]
    every = {**PLAIN, "batch_size": 12, "epochs": 2, "learning_rate": 2e-3, "teacher_steps": 3, "weight_decay": 0.02}
    result = distill(
        labeled,
        pool,
        evaluated,
        teacher=f"transformer:{tiny_teacher}",
        student=f"transformer:{tiny_student}",
        output_dir=tmp_path / "run",
        **{**every, **settings},
    )
    assert [len(training) for training in rates] == [3, steps, steps]
    assert rates[1] == rates[2]
    alone = finetune(labeled, tiny_student, **PLAIN, batch_size=12, steps=steps, learning_rate=2e-3, weight_decay=0.02)
    assert alone.labels == list(result.signals.label_names)
    assert same(weights(load(tmp_path / "run" / "baseline", device="cpu")), weights(alone))
    assert same(weights(load(tmp_path / "run", device="cpu")), weights(result.student))
    assert not same(weights(result.student), weights(alone))


def test_a_teacher_with_few_labels_takes_150_steps_and_with_many_three_passes() -> None:
    few, many = (LabeledSet(*texts_and_labels(n), NAMES) for n in (16, 1000))
    assert to_finetune_config(TeacherConfig.of(), few, CPU).steps == 150
    assert to_finetune_config(TeacherConfig.of(), many, CPU).steps == 3 * 63
    assert to_finetune_config(TeacherConfig.of(), many, torch.device("cuda")).steps == 150
    assert to_finetune_config(TeacherConfig.of(teacher_batch_size=10), many, CPU).steps == 300
    assert to_finetune_config(TeacherConfig.of(teacher_steps=7), many, CPU).steps == 7


def test_a_checkpoint_is_of_one_size_of_batches() -> None:
    labeled = LabeledSet(*texts_and_labels(100), NAMES)

    def sizes(family: Family, **settings: Any) -> list[int]:
        devices = [torch.device(name) for name in ("cpu", "cuda")]
        config = TeacherConfig.of(**settings)
        return [resolve_teacher_batch_size(config, labeled, family=family, device=device) for device in devices]

    assert sizes("transformer") == [16, 32]
    assert sizes("transformer", teacher_batch_size=8) == [8, 8]
    assert sizes("setfit") == [64, 64]


def test_a_transformer_teacher_learns_faster_than_one_that_is_fine_tuned_alone() -> None:
    labeled = LabeledSet(*texts_and_labels(16), NAMES)
    documented = TeacherConfig.model_fields["teacher_learning_rate"].description or ""
    usual = to_finetune_config(TeacherConfig.of(), labeled, CPU).learning_rate
    assert usual is not None
    assert usual > resolved(FinetuneConfig.of().with_family_defaults("transformer").learning_rate)
    assert f"{usual:.0e} for a transformer".replace("e-0", "e-") in documented
    assert to_finetune_config(TeacherConfig.of(teacher_learning_rate=3e-5), labeled, CPU).learning_rate == 3e-5


def test_a_transformer_student_trains_on_labeled_texts_without_signals(tiny_student: Path) -> None:
    signals, texts = pool_signals(32), NEWS[:4]
    labeled = LabeledSet([*texts, f"{signals.texts[0].upper()} "], np.arange(5) % 4, NAMES)
    joined = TeacherSignals(
        [*signals.texts, *texts], np.concatenate([signals.probabilities, np.eye(4, dtype=np.float32)]), NAMES
    )

    def trained(of: TeacherSignals, gold: LabeledSet | None = labeled, **settings: Any) -> list[Tensor]:
        quick = {**PLAIN, "epochs": 1, "batch_size": 18, "learning_rate": 1e-3}
        return weights(train_student(of, f"transformer:{tiny_student}", labeled=gold, **quick, **settings))

    assert same(trained(signals), trained(joined))
    assert same(trained(signals, alpha=0), trained(signals, None, alpha=0))
    both = "soft-labels,embedding"  # needs embeddings, which the labeled texts lack
    assert same(trained(signals, objective=both), trained(signals, labeled.take([4]), objective=both))


# What cannot be used


def without(saved: Path, folder: Path, part: str) -> Path:
    """A copy of a saved classifier whose weights lack all that have ``part`` in their names."""
    shutil.copytree(saved, folder)
    left = {name: value for name, value in load_file(saved / "model.safetensors").items() if part not in name}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("bert.", r"no weights for 7[01] parts of a BertForSequenceClassification, bert\."),
        (
            "layer.1.output.dense.weight",
            r"no weights for 1 parts of .*, bert\.encoder\.layer\.1\.output\.dense\.weight",
        ),
        ("word_embeddings", r"bert\.embeddings\.word_embeddings\.weight"),
    ],
)
def test_an_encoder_that_is_not_whole_is_refused(part: str, told: str, saved: Path, tmp_path: Path) -> None:
    folder = without(saved, tmp_path / "damaged", part)
    for read in (loaded, load):
        with pytest.raises(ModelError, match=told) as raised:
            cast("Any", read)(folder)
        assert raised.value.hint


@pytest.mark.parametrize("part", ["classifier", "pooler"])
def test_a_classifier_that_is_not_whole_is_refused(part: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load(without(saved, tmp_path / "damaged", part), device="cpu")


def damaged_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a regression": (lambda folder: damaged_config(folder, id2label={"0": "LABEL_0"}), "gives one number, not classes"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "does not load"),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-99]),
        "does not load",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "does not load"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    "names of another kind": (lambda folder: damaged_config(folder, id2label=["a", "b"]), "cannot be read"),
    "an unknown kind": (lambda folder: damaged_config(folder, model_type="nonesuch"), "does not load"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_transformer_is_refused_by_its_folder(damage: str, saved: Path, tmp_path: Path) -> None:
    change, told = DAMAGES[damage]
    change(shutil.copytree(saved, tmp_path / "damaged"))
    with pytest.raises(ModelError, match=told) as raised:
        load(tmp_path / "damaged", device="cpu")
    assert str(tmp_path / "damaged") in raised.value.message
    assert raised.value.hint


WRONG: list[tuple[str, type[SetFitKDError], str]] = [
    ("layers:9", ModelError, "of a body with 4"),
    ("layers:0,4", ModelError, "of a body with 4"),
    ("layers:9:distilbert", ModelError, "of a body with 4"),
    ("layers:x:distilbert", ConfigError, "'layers:x:distilbert' does not name layers"),
    ("layers:2:bert", ConfigError, "'layers:2:bert' does not name layers"),
    ("layers:2:distilbert@SETFIT", ModelError, "Only a BERT's layers make a DistilBERT"),
    ("layers:2:distilbert@transformer:ROBERTA", ModelError, "Only a BERT's layers make a DistilBERT"),
    ("layers:2@transformer:ALBERT", ModelError, "cut out of a transformer encoder"),
    ("layers:2@transformer:MODERNBERT", ModelError, "differ in kind"),
    ("static:17", ModelError, "16 dimensions, 17 are asked for"),
    ("transformer:./nowhere", ModelError, "no model folder ./nowhere"),
    ("blank:./nowhere", ModelError, "no model folder ./nowhere"),
    ("transformer:", ModelError, "no name of a model in 'transformer:'"),
    ("blank:EMPTY", ModelError, "is not a model"),
    ("blank:UNREADABLE", ModelError, "does not load"),
]


@pytest.mark.parametrize(("name", "error", "fragment"), WRONG)
def test_a_wrong_name_is_told_before_a_transformer_is_trained(
    name: str,
    error: type[SetFitKDError],
    fragment: str,
    encoder: Maker,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teaching_module, "train_teacher", lambda *_, **__: pytest.fail("training began"))
    for folder in ("empty", "unreadable"):
        (tmp_path / folder).mkdir()
    (tmp_path / "unreadable" / "config.json").write_text("{")
    places = {"SETFIT": tiny_student, "EMPTY": tmp_path / "empty", "UNREADABLE": tmp_path / "unreadable"}
    for architecture in ("modernbert", "albert", "roberta"):
        if architecture.upper() in name:
            places[architecture.upper()] = encoder(architecture)
    for place, folder_of in places.items():
        name = re.sub(rf"\b{place}\b", str(folder_of), name)
    with pytest.raises(error, match=re.escape(fragment)) as raised:
        distill(*["bundled:newswire"] * 3, teacher=f"transformer:{encoder('bert')}", student=name, **SMALL)
    assert raised.value.hint
