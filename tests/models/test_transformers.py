"""Transformers trained end to end: loading, saving, copying layers, fine-tuning and distillation."""

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
from synthetic import LABEL_NAMES, POOL_SIZE, equal_weights, few_labels, pool_signals, texts_and_labels, weights
from torch import Tensor

from setfit_kd import RunResult, TeacherSignals, distill, load, train_student, train_teacher
from setfit_kd.config.base import Family, resolved
from setfit_kd.config.stages import FinetuneConfig, StudentConfig, TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import ConfigError, DataError, ModelError, SetFitKDError
from setfit_kd.evaluation.cost import count_parameters
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.export.bundle import export_bundle
from setfit_kd.finetune.steps import resolve_batch_size
from setfit_kd.finetune.train import finetune
from setfit_kd.finetune.validation import ValidationCallback
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import family_of, is_static, load_body, locate_body
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.io import new_model, save_model
from setfit_kd.models.layers import cut_layers
from setfit_kd.models.static import static_body
from setfit_kd.models.transformer_head import get_head, transformer_module
from setfit_kd.run import teacher_stages as teaching_module
from setfit_kd.runtime.classify import Classifier
from setfit_kd.student.agreement import AgreementCallback
from setfit_kd.student.kinds import folder_names, locate_student
from setfit_kd.teacher.steps import resolve_teacher_batch_size, to_finetune_config
from setfit_kd.training.loop import _set_schedule, record_losses

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Floats = npt.NDArray[np.floating]

CPU = resolve_device("cpu")
NEWS = [row["text"] for row in newswire("eval")[:40]]
TEXTS = [*NEWS[:10], "goal", "", " ".join(NEWS[:6])]
"""Texts of different lengths; the last is longer than the maximum length of the tiny transformers."""
CPU_FP32: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


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
"""Architectures with their config values, in addition to `COMMON_CONFIG`."""
COMMON_CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    # Large enough that an untrained network predicts different probabilities for different texts.
    "initializer_range": 0.3,
}
LAYER = re.compile(r"\.layer\.(\d+)\.")

EncoderFactory = Callable[..., Path]


def transformers() -> Any:
    import transformers

    return transformers


def config_of(architecture: str, **changes: Any) -> Any:
    common = COMMON_CONFIG
    if architecture == "distilbert":
        common = {
            name: COMMON_CONFIG[name] for name in ("max_position_embeddings", "pad_token_id", "initializer_range")
        }
    return transformers().AutoConfig.for_model(architecture, **{**common, **SIZES[architecture], **changes})


@pytest.fixture(scope="session")
def tokenizer(tiny_student: Path) -> Any:
    return transformers().AutoTokenizer.from_pretrained(tiny_student)


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> EncoderFactory:
    """Factory of folders with an encoder without a head and the tiny teacher's tokenizer."""
    folders: dict[str, Path] = {}

    def create(architecture: str, **changes: Any) -> Path:
        key = json.dumps([architecture, changes])
        if key not in folders:
            folder = tmp_path_factory.mktemp("encoders") / architecture
            config = config_of(architecture, vocab_size=len(tokenizer), **changes)
            torch.manual_seed(0)
            transformers().AutoModel.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[key] = folder
        return folders[key]

    return create


def load_transformer(folder: Path, names: Sequence[str] = LABEL_NAMES, *, seed: int = 0) -> SentenceTransformer:
    return locate_body(f"transformer:{folder}").load(names, seed=seed)


def to_classifier(body: SentenceTransformer, names: Sequence[str] = LABEL_NAMES) -> SetFitModel:
    model = new_model(body, names)
    model.model_head = get_head(body)
    return model


def network_of(body: SentenceTransformer) -> Any:
    return transformer_module(body).model


def named_weights(body: SentenceTransformer) -> dict[str, Tensor]:
    """Return all weights by their names in transformers; those of the last layer start with ``head``."""
    head = transformer_module(body).head.state_dict()
    return {**network_of(body).state_dict(), **{f"head.{name}": value for name, value in head.items()}}


def predict_with_transformers(folder: Path, texts: Sequence[str]) -> Floats:
    """Predict probabilities from a folder with transformers only."""
    network = transformers().AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = network(**tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")).logits
    return cast("Floats", softmax(logits.double().numpy(), axis=1))


@pytest.fixture(scope="session")
def bert(make_encoder: EncoderFactory) -> Path:
    return make_encoder("bert")


@pytest.fixture(scope="session")
def learner(make_encoder: EncoderFactory) -> Path:
    """Folder of an encoder that can be trained in a few steps."""
    return make_encoder("bert", num_hidden_layers=1, initializer_range=0.1)


@pytest.fixture(scope="session")
def saved(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete classifier."""
    folder = tmp_path_factory.mktemp("classifiers") / "bert"
    save_model(to_classifier(load_transformer(bert)), folder)
    return folder


# Loading and saving


@pytest.mark.parametrize("classes", [2, 16])  # 16 is also the width of the networks
@pytest.mark.parametrize("architecture", SIZES)
def test_saved_transformer_predicts_the_same_in_transformers(
    architecture: str, classes: int, make_encoder: EncoderFactory, tmp_path: Path
) -> None:
    names = [f"class {index}" for index in range(classes)]
    body = load_transformer(make_encoder(architecture), names)
    assert family_of(body) == "transformer"
    save_model(to_classifier(body, names), tmp_path / "saved")
    expected = predict_with_transformers(tmp_path / "saved", TEXTS)
    assert np.ptp(expected, axis=0).max() > 0.01
    features = body.encode(TEXTS, show_progress_bar=False)
    assert features.shape == (len(TEXTS), body.get_embedding_dimension())
    np.testing.assert_allclose(get_head(body).predict_proba(features), expected, atol=1e-6)
    reloaded = load(tmp_path / "saved", device="cpu")
    assert reloaded.labels == names
    np.testing.assert_allclose(predict_proba(reloaded, TEXTS), expected, atol=1e-6)
    assert [str(label) for label in reloaded.predict(TEXTS)] == [names[index] for index in expected.argmax(axis=1)]


def test_pipeline_from_the_model_card_works(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert "library_name: transformers" in card
    classify = transformers().pipeline("text-classification", model=str(saved), top_k=None)
    for text in TEXTS:
        scores = {row["label"]: row["score"] for row in classify([text], truncation=True)[0]}
        np.testing.assert_allclose(
            [scores[name] for name in LABEL_NAMES], predict_with_transformers(saved, [text])[0], atol=1e-6
        )


@pytest.mark.parametrize("names", [LABEL_NAMES[:2], LABEL_NAMES, [f"class {index}" for index in range(16)]])
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta"])
def test_head_for_the_same_classes_is_kept(
    architecture: str, names: Sequence[str], make_encoder: EncoderFactory, tmp_path: Path
) -> None:
    body = load_transformer(make_encoder(architecture), names)
    save_model(to_classifier(body, names), tmp_path / "saved")
    reloaded = named_weights(load_transformer(tmp_path / "saved", names, seed=1))
    assert reloaded.keys() == named_weights(body).keys()
    assert all(torch.equal(value, reloaded[name]) for name, value in named_weights(body).items())


@pytest.mark.parametrize("shuffled", [False, True], ids=["file", "classes"])
def test_head_is_matched_by_class_names(shuffled: bool, make_encoder: EncoderFactory, tmp_path: Path) -> None:
    """The order of the classes and of the keys in ``config.json``, where "10" sorts before "2", does not matter."""
    names = [f"class {index}" for index in range(12)]
    body = load_transformer(make_encoder("bert"), names)
    save_model(to_classifier(body, names), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["id2label"] = dict(sorted(config["id2label"].items()))
    assert list(config["id2label"]) != sorted(config["id2label"], key=int)
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    order = list(np.random.default_rng(0).permutation(12)) if shuffled else list(range(12))
    reloaded = load_transformer(tmp_path / "saved", [names[index] for index in order])
    features = body.encode(TEXTS, show_progress_bar=False)
    expected = get_head(body).predict_proba(features)[:, order]
    np.testing.assert_allclose(get_head(reloaded).predict_proba(features), expected, atol=1e-6)


@pytest.mark.parametrize(
    "names", [("a", "b", "c", "d"), LABEL_NAMES[:2], (*LABEL_NAMES, "weather")], ids=["other", "few", "more"]
)
def test_other_classes_get_a_new_head_on_the_same_network(names: Sequence[str], saved: Path) -> None:
    before, after = named_weights(load_transformer(saved)), named_weights(load_transformer(saved, names))
    assert after["head.weight"].shape == (len(names), 16)
    rows = min(len(names), len(LABEL_NAMES))
    assert not torch.isclose(after["head.weight"][:rows], before["head.weight"][:rows]).any()
    assert not after["head.bias"].any()
    assert after["head.weight"].std().item() == pytest.approx(COMMON_CONFIG["initializer_range"], rel=0.3)
    assert all(torch.equal(value, before[name]) for name, value in after.items() if not name.startswith("head."))


@pytest.mark.parametrize(
    ("architecture", "pooler"), [("bert", None), ("distilbert", "pre_"), ("roberta", "classifier")]
)
def test_missing_weights_are_initialized_from_the_seed(
    architecture: str, pooler: str | None, make_encoder: EncoderFactory
) -> None:
    folder, state = make_encoder(architecture), torch.get_rng_state()
    first, repeated, other_seed = (named_weights(load_transformer(folder, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, repeated[name]) for name, value in first.items())
    different = {name for name, value in first.items() if not torch.equal(value, other_seed[name])}
    assert different == {
        name for name in first if name.endswith("weight") and name.startswith(("head", pooler or "head"))
    }


@pytest.mark.parametrize(
    "name", ["transformer:BERT", "layers:2@transformer:BERT", "layers:2:distilbert@transformer:BERT"]
)
def test_new_head_of_a_student_is_initialized_from_the_seed(name: str, bert: Path) -> None:
    source, teacher = locate_student(name.replace("BERT", str(bert))), load_transformer(bert)
    first, repeated, other_seed = (
        named_weights(source.prepare(teacher, LABEL_NAMES, seed=seed).build(teacher, [], CPU))["head.weight"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, repeated)
    assert not torch.isclose(first, other_seed).any()


def test_half_precision_weights_are_loaded_as_fp32(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "half")
    half = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert {value.dtype for value in named_weights(load_transformer(folder)).values() if value.is_floating_point()} == {
        torch.float32
    }


def test_parameter_count_matches_transformers(saved: Path) -> None:
    network = transformers().AutoModelForSequenceClassification.from_pretrained(saved)
    assert count_parameters(load(saved, device="cpu")) == network.num_parameters()


# Pairings of teachers and students

SMALL_RUN: dict[str, Any] = {**FAST, "shots": 4, "pool_size": 32, "batch_size": 16, "cache": False}


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Folder with only the config of a DistilBERT."""
    folder = tmp_path_factory.mktemp("configs") / "blank"
    config_of("distilbert", vocab_size=len(tokenizer), n_layers=1).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Pairings:
    """A run with one teacher and every type of student."""

    teacher: Family
    names: dict[str, str]
    result: RunResult

    @property
    def folder(self) -> Path:
        assert self.result.output_dir is not None
        return self.result.output_dir

    def student_folder(self, kind: str) -> str:
        slug = folder_names(list(self.names.values()))[list(self.names).index(kind)]
        return f"students/{slug}"


KINDS = ("setfit", "transformer", "layers", "distilbert", "static", "blank")


@pytest.fixture(scope="module")
def run_pairings(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path, blank: Path
) -> Callable[[Family], Pairings]:
    pairings: dict[Family, Pairings] = {}

    def run(family: Family) -> Pairings:
        if family not in pairings:
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
            eval_path = tmp_path_factory.mktemp("data") / "eval.jsonl"
            eval_path.write_text("".join(json.dumps(row) + "\n" for row in newswire("eval")[:40]))
            sources = ["bundled:newswire", "bundled:newswire", str(eval_path)]
            result = distill(*sources, teacher=teacher, student=tuple(names.values()), output_dir=folder, **SMALL_RUN)
            pairings[family] = Pairings(family, names, result)
        return pairings[family]

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["setfit", "transformer"])
def test_every_teacher_student_pairing_is_trained_evaluated_and_saved(
    family: Family, kind: str, run_pairings: Callable[[Family], Pairings]
) -> None:
    run = run_pairings(family)
    student_folder = run.student_folder(kind)
    student = run.result.students[run.names[kind]]
    is_transformer = kind in ("transformer", "distilbert", "blank") or (family, kind) == ("transformer", "layers")
    assert family_of(student.model_body) == ("transformer" if is_transformer else "setfit")
    assert is_static(student.model_body) is (kind == "static")
    evaluations = run.result.evaluations
    for name in ("teacher", student_folder.replace("students", "baselines"), student_folder):
        evaluation, reloaded = evaluations[name], load(run.folder / name, device="cpu")
        assert evaluation.probabilities.shape == (len(NEWS), 4)
        np.testing.assert_allclose(predict_proba(reloaded, NEWS), evaluation.probabilities, atol=1e-6)
        if name != "teacher":
            assert family_of(reloaded.model_body) == family_of(student.model_body)
    evaluation = evaluations[student_folder]
    assert evaluations["teacher"].quality.agreement is None
    assert evaluation.quality.agreement is not None
    np.testing.assert_allclose(predict_proba(student, NEWS), evaluation.probabilities, atol=1e-6)
    if is_transformer:  # the softmax of its logits, regardless of the training temperature
        by_transformers = predict_with_transformers(run.folder / student_folder, NEWS)
        np.testing.assert_allclose(by_transformers, evaluation.probabilities, atol=1e-6)


@pytest.mark.parametrize("kind", ["transformer", "layers", "distilbert", "blank"])
def test_bundle_of_a_transformer_student_predicts_the_same(
    kind: str, run_pairings: Callable[[Family], Pairings], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    run = run_pairings("transformer")
    student = load(run.folder / run.student_folder(kind), device="cpu")
    bundle = export_bundle(student, tmp_path / "bundle", texts=TEXTS, format="onnx")
    assert bundle.parity.agreement == 1
    classifier = Classifier(tmp_path / "bundle")
    assert classifier.labels == list(student.labels or ())
    np.testing.assert_allclose(
        classifier.predict_proba(NEWS), run.result.evaluations[run.student_folder(kind)].probabilities, atol=1e-5
    )


def test_finished_transformer_run_is_loaded_from_cache(
    run_pairings: Callable[[Family], Pairings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_pairings("transformer")
    with caplog.at_level("INFO", "setfit_kd"):
        resumed = distill(resume=shutil.copytree(run.folder, tmp_path / "run"))
    stages = json.loads((run.folder / "run.json").read_text())["stages"]
    assert caplog.text.count(": loaded from") == len(stages)
    for name, student in resumed.students.items():
        assert equal_weights(weights(student), weights(run.result.students[name]))


def test_static_student_is_distilled_from_the_fine_tuned_transformer(bert: Path) -> None:
    teacher = load_transformer(bert)
    prepared = locate_student("static:8").prepare(teacher, LABEL_NAMES)
    assert prepared.family == "setfit"
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    first: Any = prepared.build(teacher, TEXTS, CPU)[0]
    expected: Any = static_body(teacher, TEXTS, dimension=8)[0]
    assert torch.equal(first.embedding.weight, expected.embedding.weight)


# Layers of the teacher


def perturb(body: SentenceTransformer) -> None:
    """Change all weights, as fine-tuning does."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("name", "keep"),
    [("layers:0,2", (0, 2)), ("layers:2", (0, 3)), ("layers:3,1", (3, 1)), ("layers:4", (0, 1, 2, 3))],
)
@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet", "distilbert"])
def test_layers_student_copies_the_fine_tuned_teacher(
    architecture: str, name: str, keep: tuple[int, ...], make_encoder: EncoderFactory
) -> None:
    teacher = load_transformer(make_encoder(architecture))
    prepared = locate_student(name).prepare(teacher, LABEL_NAMES)
    perturb(teacher)
    student = prepared.build(teacher, [], CPU)
    assert family_of(student) == prepared.family == "transformer"
    teacher_weights = named_weights(teacher)
    for name, value in named_weights(student).items():
        original = LAYER.sub(lambda match: f".layer.{keep[int(match[1])]}.", name)
        assert torch.equal(value, teacher_weights.pop(original)), name
    remaining = {int(match[1]) if (match := LAYER.search(name)) else name for name in teacher_weights}
    assert remaining == {0, 1, 2, 3} - set(keep)
    assert network_of(student).config.num_hidden_layers == len(keep)


@pytest.mark.parametrize("output_dir", [None, "run"])
def test_layers_student_in_a_run_copies_the_refined_teacher(output_dir: str | None, tiny_teacher: Path) -> None:
    names = ("layers:0,2", "layers:0,2:distilbert")
    settings = {**SMALL_RUN, "learning_rate": 1e-9, "output_dir": output_dir}  # so low that the weights do not change
    result = distill(*["bundled:newswire"] * 2, teacher=f"transformer:{tiny_teacher}", student=names, **settings)
    assert result.teacher is not None
    teacher, head = result.teacher.model_body, result.teacher.model_head
    before, after = (
        named_weights(body) for body in (load_transformer(tiny_teacher, result.signals.label_names), teacher)
    )
    expected = (named_weights(cut_layers(teacher, (0, 2))), expected_distilbert_weights(after, (0, 2)))
    for name, expected_weights in zip(names, expected, strict=True):
        student = result.students[name].model_body
        assert named_weights(student).keys() == expected_weights.keys()
        for part, value in named_weights(student).items():
            torch.testing.assert_close(value, expected_weights[part], atol=1e-6, rtol=0)
        np.testing.assert_allclose(get_head(student).coef_, head.coef_, atol=1e-5)
        np.testing.assert_allclose(get_head(student).intercept_, head.intercept_, atol=1e-5)
    for part in ("head.weight", "bert.encoder.layer.2.output.dense.weight"):
        assert (after[part] - before[part]).abs().max() > 1e-3  # the teacher was trained


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


def expected_distilbert_weights(bert: dict[str, Tensor], keep: Sequence[int]) -> dict[str, Tensor]:
    """Return the weights expected in a DistilBERT made from some layers of a BERT."""
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
def test_distilbert_has_the_weights_of_the_fine_tuned_bert(
    name: str, keep: tuple[int, ...], classes: int, bert: Path
) -> None:
    teacher = load_transformer(bert, LABEL_NAMES[:classes])
    prepared = locate_student(f"{name}:distilbert").prepare(teacher, LABEL_NAMES[:classes])
    perturb(teacher)
    student = prepared.build(teacher, [], CPU)
    assert network_of(student).config.model_type == "distilbert"
    assert list(network_of(student).config.id2label.values()) == list(LABEL_NAMES[:classes])
    converted, expected = named_weights(student), expected_distilbert_weights(named_weights(teacher), keep)
    assert converted.keys() == expected.keys()
    for part, value in converted.items():
        assert torch.equal(value, expected[part]), part


@pytest.mark.parametrize("keep", [(0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_distilbert_computes_the_same_hidden_states_as_bert(
    keep: tuple[int, ...], activation: str, make_encoder: EncoderFactory
) -> None:
    teacher = load_transformer(make_encoder("bert", hidden_act=activation, num_attention_heads=4))
    perturb(teacher)
    name = f"layers:{','.join(map(str, keep))}:distilbert"
    student = locate_student(name).prepare(teacher, LABEL_NAMES).build(teacher, [], CPU)
    tokenizer: Any = teacher.tokenizer
    features = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
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
def test_only_bert_is_converted_to_distilbert(
    architecture: str, make_encoder: EncoderFactory, tiny_teacher: Path
) -> None:
    if architecture == "setfit":
        teacher = load_body(tiny_teacher)
    elif architecture == "gelu_new":
        teacher = load_transformer(make_encoder("bert", hidden_act=architecture))
    else:
        teacher = load_transformer(make_encoder(architecture))
    with pytest.raises(ModelError, match=r"Only layers of a BERT|hidden_act=gelu_new") as error_info:
        locate_student("layers:2:distilbert").prepare(teacher, LABEL_NAMES)
    assert "without :distilbert" in str(error_info.value.hint)


# Blank transformers


def test_blank_student_is_untrained_and_matches_its_config(blank: Path, tokenizer: Any, bert: Path) -> None:
    prepared = locate_student(f"blank:{blank}").prepare(load_transformer(bert), LABEL_NAMES)
    assert prepared.family == "transformer"
    body = prepared.build(load_transformer(bert), [], CPU)
    config = network_of(body).config
    assert (config.model_type, config.n_layers, config.dim, config.n_heads) == ("distilbert", 1, 16, 2)
    assert list(config.id2label.values()) == list(LABEL_NAMES)
    for name, value in named_weights(body).items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name.lower():
            assert (value == 1).all(), name
        else:
            assert value.std().item() == pytest.approx(COMMON_CONFIG["initializer_range"], rel=0.3), name
    own_tokenizer: Any = body.tokenizer
    assert own_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert own_tokenizer(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("source", ["config", "config and weights"])
def test_blank_student_weights_depend_only_on_the_seed(source: str, blank: Path, bert: Path) -> None:
    folder, state = blank if source == "config" else bert, torch.get_rng_state()
    first, repeated, other_seed = (
        named_weights(
            locate_student(f"blank:{folder}")
            .prepare(load_transformer(bert), LABEL_NAMES, seed=seed)
            .build(load_transformer(bert), [], CPU)
        )
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, repeated[name]) for name, value in first.items())
    saved = named_weights(load_transformer(bert, seed=3))
    random_names = [name for name, value in first.items() if value.dim() == 2]
    assert len(random_names) > 5
    for name in random_names:
        assert not torch.isclose(first[name], other_seed[name]).all(), name
        assert name.startswith("head") or name not in saved or not torch.equal(first[name], saved[name]), name


@pytest.mark.parametrize("family", ["setfit", "transformer"])
def test_blank_student_uses_its_own_tokenizer_or_the_teachers(
    family: Family, tokenizer: Any, bert: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = load_transformer(bert) if family == "transformer" else load_body(tiny_teacher)
    own = transformers().AutoTokenizer.from_pretrained(bert)
    own.add_tokens(["thematch"])
    ids = {}
    for name in ("own", "none"):
        config_of("bert", vocab_size=len(own)).save_pretrained(tmp_path / name)
        if name == "own":
            own.save_pretrained(tmp_path / name)
        body = locate_student(f"blank:{tmp_path / name}").prepare(teacher, LABEL_NAMES).build(teacher, [], CPU)
        ids[name] = body.preprocess(["thematch was lost"])["input_ids"][0].tolist()
        assert np.isfinite(body.encode(TEXTS, show_progress_bar=False)).all()
    assert ids["own"] == own("thematch was lost")["input_ids"]
    assert ids["none"] == tokenizer("thematch was lost")["input_ids"]
    assert ids["own"] != ids["none"]


@pytest.mark.parametrize(("has_tokenizer", "owner"), [(False, "the teacher's"), (True, "its")])
def test_config_with_too_small_vocabulary_is_rejected(
    has_tokenizer: bool, owner: str, tokenizer: Any, bert: Path, tmp_path: Path
) -> None:
    vocab_size = len(tokenizer) - 1
    config_of("bert", vocab_size=vocab_size).save_pretrained(tmp_path)
    if has_tokenizer:
        tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"at least {vocab_size + 1}, the size of {owner} tokenizer, got {vocab_size}"):
        locate_student(f"blank:{tmp_path}").prepare(load_transformer(bert), LABEL_NAMES)


def test_blank_student_without_tokenizer_is_rejected(blank: Path, tiny_teacher: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer in"):
        locate_student(f"blank:{blank}").prepare(static_body(load_body(tiny_teacher), [], dimension=8), LABEL_NAMES)


# Training students


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("setfit", {"temperature": 1.0, "dropout": False, "freeze_embeddings": True, "max_length": None}),
        ("transformer", {"temperature": 5.0, "dropout": True, "freeze_embeddings": False, "max_length": 128}),
        ("setfit", {"objective": "similarity,soft-labels=3", "learning_rate": None}),
        ("transformer", {"objective": "soft-labels", "learning_rate": 2e-5}),
    ],
)
def test_each_model_family_has_its_own_defaults(family: Family, expected: dict[str, Any]) -> None:
    assert StudentConfig.of().alpha == 0.5
    defaults = StudentConfig.of().with_family_defaults(family)
    assert {name: getattr(defaults, name) for name in expected} == expected
    settings = {"temperature": 2.0, "dropout": family == "setfit", "objective": "embedding", "max_length": 16}
    config = StudentConfig.of(**settings).with_family_defaults(family)
    assert {name: getattr(config, name) for name in settings} == settings


def expected_loss(logits: Floats, signals: TeacherSignals, gold: Floats, temperature: float, alpha: float) -> float:
    """Compute the mean loss over texts; rows of zeros in ``gold`` stand for no gold label."""
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
def test_first_loss_of_a_transformer_is_computed_from_its_own_logits(
    labeled: int, settings: dict[str, Any], temperature: float, alpha: float, bert: Path
) -> None:
    signals, body = pool_signals(), load_transformer(bert)
    head = transformer_module(body).head
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.5, -0.5, 1.0, 0.0]))
    logits = np.asarray(body.encode(signals.texts, show_progress_bar=False), np.float64) @ np.asarray(
        head.weight.detach().double().numpy().T
    ) + np.asarray(head.bias.detach().double().numpy())
    gold = np.zeros((POOL_SIZE, 4))
    gold[np.arange(labeled), np.arange(labeled) % 4] = 1
    options = {**CPU_FP32, "batch_size": POOL_SIZE, "epochs": 1, "dropout": False, **settings}
    with record_losses() as losses:
        train_student(signals, body, labeled=few_labels(labeled) if labeled else None, **options)
    assert losses == pytest.approx([expected_loss(logits, signals, gold, temperature, alpha)], rel=1e-3)


@pytest.mark.parametrize("objective", ["soft-labels", "similarity,soft-labels", "similarity"])
def test_transformer_student_learns_the_teachers_predictions(objective: str, learner: Path, tmp_path: Path) -> None:
    signals, body = pool_signals(), load_transformer(learner)
    before, expected = predict_proba(to_classifier(body), signals.texts), signals.probabilities.argmax(axis=1)
    settings = {**CPU_FP32, "objective": objective, "epochs": 20, "learning_rate": 1e-2, "batch_size": 11}
    student = train_student(signals, body, labeled=few_labels(), **settings)
    after = predict_proba(student, signals.texts)
    assert (before.argmax(axis=1) == expected).mean() < 0.5
    assert (after.argmax(axis=1) == expected).mean() > 0.9
    save_model(student, tmp_path / "saved")
    np.testing.assert_allclose(predict_with_transformers(tmp_path / "saved", signals.texts), after, atol=1e-6)


def test_early_stopping_keeps_body_and_head_of_the_best_checkpoint(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Tensor]] = []

    def measure(callback: AgreementCallback, _: int) -> float:
        states.append({name: value.clone() for name, value in callback.body.state_dict().items()})
        return [0.1, 0.5, 0.4, 0.3][len(states) - 1]

    monkeypatch.setattr(AgreementCallback, "measure", measure)
    settings = {**CPU_FP32, "epochs": 6, "patience": 2, "learning_rate": 0.02, "batch_size": 8}
    student = train_student(pool_signals(), f"transformer:{tiny_student}", labeled=few_labels(), **settings)
    assert len(states) == 4
    assert all(torch.equal(value, states[1][name]) for name, value in student.model_body.state_dict().items())
    expected = get_head(student.model_body)
    np.testing.assert_array_equal(student.model_head.coef_, expected.coef_)
    np.testing.assert_array_equal(student.model_head.intercept_, expected.intercept_)


# Fine-tuning

TRAINING = LabeledSet(*texts_and_labels(64), LABEL_NAMES)
VALIDATION = LabeledSet([f"{text} again" for text in TRAINING.texts[:31]], TRAINING.labels[:31], LABEL_NAMES)


def merge_to_two_classes(data: LabeledSet) -> LabeledSet:
    """Keep three classes and merge the first two, so that one class has twice as many texts as the other."""
    rows = np.flatnonzero(data.labels < 3)
    texts = [data.texts[row] for row in rows]
    return LabeledSet(texts, np.maximum(data.labels[rows] - 1, 0), ("sports or business", "politics"))


def run_finetuning(folder: Path, labeled: LabeledSet = TRAINING, **settings: Any) -> SetFitModel:
    return finetune(labeled, folder, **{**CPU_FP32, "learning_rate": 5e-3, "batch_size": 8, **settings})


def predict_labels(model: SetFitModel, data: LabeledSet) -> npt.NDArray[np.int64]:
    return np.asarray(predict_proba(model, data.texts).argmax(axis=1), np.int64)


@pytest.fixture
def learning_rates(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Learning rates of all steps, one list per training."""
    optimizers: list[Any] = []
    rates: list[list[float]] = []
    step: Any = torch.optim.AdamW.step

    def recorded_step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not optimizers or optimizers[-1] is not optimizer:
            optimizers.append(optimizer)
            rates.append([])
        rates[-1].append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    return rates


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> list[ValidationCallback]:
    """Validation callback of each training."""
    restored: list[ValidationCallback] = []
    restore = ValidationCallback.restore_best_weights

    def recorded_restore(callback: ValidationCallback) -> None:
        restored.append(callback)
        restore(callback)

    monkeypatch.setattr(ValidationCallback, "restore_best_weights", recorded_restore)
    return restored


def set_validation_scores(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Replace the scores of the evaluation steps by these values."""
    scores = iter(values)
    monkeypatch.setattr(ValidationCallback, "measure", lambda *_: next(scores))


def test_finetuning_learns_from_labels(learner: Path, tmp_path: Path) -> None:
    model = run_finetuning(learner, epochs=5, learning_rate=1e-2)
    assert (predict_labels(model, VALIDATION) == VALIDATION.labels).mean() > 0.9
    assert not model.model_body.training
    save_model(model, tmp_path / "saved")
    np.testing.assert_allclose(
        predict_with_transformers(tmp_path / "saved", TEXTS), predict_proba(model, TEXTS), atol=1e-6
    )


def test_loaded_body_is_finetuned_in_place(tiny_student: Path) -> None:
    rows = [(text, LABEL_NAMES[label]) for text, label in zip(TRAINING.texts, TRAINING.labels, strict=True)]
    body = load_transformer(tiny_student, sorted(LABEL_NAMES))
    before = {name: value.clone() for name, value in named_weights(body).items()}
    model = finetune(rows, body, validation=rows[:9], **CPU_FP32, steps=2, learning_rate=1e-3)
    assert model.model_body is body
    assert model.labels == sorted(LABEL_NAMES)
    changed = {name for name, value in named_weights(body).items() if not torch.equal(value, before[name])}
    assert {"head.weight", "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"} <= changed


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
def test_number_of_steps_follows_epochs_or_steps(
    settings: dict[str, Any], steps: int, tiny_student: Path, learning_rates: list[list[float]]
) -> None:
    run_finetuning(tiny_student, learning_rate=1e-5, **settings)
    assert [len(training) for training in learning_rates] == [steps]


@pytest.mark.parametrize(
    ("device", "batch_size", "expected"),
    [("cpu", None, 16), ("cuda", None, 32), ("mps", None, 32), ("cpu", 5, 5), ("cuda", 5, 5)],
)
def test_default_batch_size_is_larger_on_accelerators(device: str, batch_size: int | None, expected: int) -> None:
    assert resolve_batch_size(torch.device(device), FinetuneConfig.of(batch_size=batch_size)) == expected


@pytest.mark.parametrize(
    ("values", "best"), [([0.1, 0.5, 0.3, 0.4], 1), ([0.5, 0.5, 0.2, 0.5], 0), ([0.1, 0.2, 0.3, 0.4], 3)]
)
def test_first_best_checkpoint_is_kept(
    values: list[float],
    best: int,
    tiny_student: Path,
    callbacks: list[ValidationCallback],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states: list[dict[str, Tensor]] = []

    def measure(callback: ValidationCallback, _: int) -> float:
        states.append({name: value.clone() for name, value in callback.body.state_dict().items()})
        return values[len(states) - 1]

    monkeypatch.setattr(ValidationCallback, "measure", measure)
    model = run_finetuning(tiny_student, validation=VALIDATION, steps=7, eval_steps=2)
    assert callbacks[0].history == list(zip([2, 4, 6, 7], values, strict=True))
    assert callbacks[0].best_step == [2, 4, 6, 7][best]
    state = model.model_body.state_dict()
    for index, earlier_state in enumerate(states):
        assert all(torch.equal(value, earlier_state[name]) for name, value in state.items()) is (index == best)
    np.testing.assert_array_equal(model.model_head.coef_, get_head(model.model_body).coef_)


def test_validation_runs_once_per_epoch_by_default(tiny_student: Path, callbacks: list[ValidationCallback]) -> None:
    run_finetuning(tiny_student, validation=VALIDATION, epochs=2, batch_size=30)
    assert [step for step, _ in callbacks[0].history] == [3, 6]


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy_score,
    "f1-macro": lambda gold, predicted: f1_score(gold, predicted, average="macro", zero_division=0),
    "f1-weighted": lambda gold, predicted: f1_score(gold, predicted, average="weighted", zero_division=0),
    "f1-binary": lambda gold, predicted: f1_score(gold, predicted, average="binary", zero_division=0),
}


@pytest.mark.parametrize("metric", METRICS)
def test_best_checkpoint_is_chosen_by_the_metric(
    metric: str, tiny_student: Path, callbacks: list[ValidationCallback]
) -> None:
    data, labeled = merge_to_two_classes(VALIDATION), merge_to_two_classes(TRAINING)
    settings: dict[str, Any] = {"steps": 8, "eval_steps": 1, "learning_rate": 3e-3, "schedule": "constant"}
    model = run_finetuning(tiny_student, labeled, validation=data, metric=metric, **settings)
    scores = {name: measure(data.labels, predict_labels(model, data)) for name, measure in METRICS.items()}
    assert len(set(scores.values())) == len(scores)
    assert callbacks[0].best_score == max(score for _, score in callbacks[0].history) == pytest.approx(scores[metric])


def test_binary_f1_requires_two_classes(tiny_student: Path) -> None:
    with pytest.raises(ConfigError, match="requires 2 classes, got 4") as error_info:
        run_finetuning(tiny_student, validation=VALIDATION, metric="f1-binary")
    assert "f1-macro" in str(error_info.value.hint)
    with pytest.raises(ConfigError, match="metric"):
        run_finetuning(tiny_student, validation=VALIDATION, metric="f1")


@given(
    st.integers(2, 4).flatmap(
        lambda classes: st.tuples(
            st.just(classes),
            st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=30),
        )
    )
)
def test_scores_match_scikit_learn(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = drawn
    predicted, gold = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    scores = measure_quality(predicted, gold, LABEL_NAMES[:classes]).scores
    assert set(scores) == {"accuracy", "f1-macro", "f1-weighted"} | ({"f1-binary"} if classes == 2 else set())
    options: dict[str, Any] = {"labels": sorted(set(gold.tolist())), "zero_division": 0}
    assert scores["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    assert scores["f1-macro"] == pytest.approx(f1_score(gold, predicted, average="macro", **options))
    assert scores["f1-weighted"] == pytest.approx(f1_score(gold, predicted, average="weighted", **options))
    if classes == 2:
        assert scores["f1-binary"] == pytest.approx(f1_score(gold, predicted, zero_division=0))


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
def test_patience_stops_training_without_improvement(
    patience: int | None,
    values: list[float],
    steps: int,
    tiny_student: Path,
    learning_rates: list[list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_validation_scores(monkeypatch, values)
    run_finetuning(tiny_student, validation=VALIDATION, steps=12, eval_steps=2, patience=patience)
    assert [len(training) for training in learning_rates] == [steps]


@pytest.mark.parametrize(
    ("schedule", "values", "expected"),
    [
        ("plateau", [0.1, 0.2, 0.3, 0.4], [1, 1, 1, 1]),
        ("plateau", [0.5, 0.5, 0.5, 0.5], [1, 1, 0.5, 0.25]),
        ("plateau", [0.4, 0.3, 0.5, 0.1], [1, 1, 0.5, 0.5]),
        ("constant", [0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1]),
    ],
)
def test_plateau_schedule_halves_the_learning_rate_without_improvement(
    schedule: str,
    values: list[float],
    expected: list[float],
    tiny_student: Path,
    learning_rates: list[list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_validation_scores(monkeypatch, values)
    settings: dict[str, Any] = {"schedule": schedule, "warmup_steps": 0, "learning_rate": 4e-3}
    run_finetuning(tiny_student, validation=VALIDATION, steps=12, eval_steps=3, **settings)
    assert learning_rates[0][2::3] == pytest.approx([4e-3 * factor for factor in expected])
    assert learning_rates[0] == sorted(learning_rates[0], reverse=True)


@pytest.mark.parametrize(
    ("warmup_steps", "expected_warmup", "schedule"),
    [(None, 3, "linear"), (None, 3, "constant"), (0, 0, "linear"), (10, 10, "linear")],
)
def test_learning_rate_follows_warmup_and_schedule(
    warmup_steps: int | None, expected_warmup: int, schedule: str, tiny_student: Path, learning_rates: list[list[float]]
) -> None:
    run_finetuning(tiny_student, steps=30, warmup_steps=warmup_steps, schedule=schedule, learning_rate=1e-3)
    step = np.arange(30)
    decay = (30 - step) / (30 - expected_warmup) if schedule == "linear" else np.ones(30)
    assert learning_rates[0] == pytest.approx(
        (1e-3 * np.where(step < expected_warmup, step / max(expected_warmup, 1), decay)).tolist()
    )


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (10, 1), (11, 2), (5_000, 500), (5_001, 500), (100_000, 500)])
def test_default_warmup_is_a_tenth_of_the_steps_up_to_500(steps: int, warmup: int) -> None:
    arguments = SimpleNamespace()
    _set_schedule(arguments, FinetuneConfig.of(), steps)
    assert arguments.warmup_steps == warmup


def test_finetuning_rejects_invalid_inputs(tiny_student: Path) -> None:
    with pytest.raises(DataError, match="have different classes"):
        run_finetuning(tiny_student, validation=merge_to_two_classes(VALIDATION))
    with pytest.raises(DataError, match="labels that are not in the training set"):
        run_finetuning(tiny_student, validation=[("rain", "weather")])
    with pytest.raises(ModelError, match="no classification layer to fine-tune"):
        finetune(TRAINING, load_body(tiny_student), **CPU_FP32)


def train_long_teacher(body: SentenceTransformer, **settings: Any) -> SetFitModel:
    renamed = {"teacher_dropout" if name == "dropout" else name: value for name, value in settings.items()}
    defaults: dict[str, Any] = {**CPU_FP32, "teacher_steps": 2, "teacher_batch_size": 8, "teacher_learning_rate": 1e-4}
    return train_teacher(LONG_TEXTS, body, **{**defaults, **renamed})


def train_long_student(body: SentenceTransformer, **settings: Any) -> SetFitModel:
    signals = TeacherSignals(
        LONG_TEXTS.texts, np.eye(4, dtype=np.float32)[LONG_TEXTS.labels], LABEL_NAMES, np.eye(len(LONG_TEXTS))
    )
    return train_student(signals, body, **{**CPU_FP32, "batch_size": 8, "epochs": 1, "learning_rate": 1e-4, **settings})


def finetune_long(body: SentenceTransformer, **settings: Any) -> SetFitModel:
    return finetune(LONG_TEXTS, body, **{**CPU_FP32, "batch_size": 8, "epochs": 1, **settings})


LONG_TEXTS = LabeledSet([f"{text} " + "goal " * 400 for text in TRAINING.texts[:8]], TRAINING.labels[:8], LABEL_NAMES)
TRAINERS: dict[str, Callable[..., SetFitModel]] = {
    "finetune": finetune_long,
    "teacher": train_long_teacher,
    "student": train_long_student,
}


@pytest.fixture(scope="session")
def long_context_encoder(make_encoder: EncoderFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an encoder with 300 positions."""
    folder = shutil.copytree(
        make_encoder("bert", num_hidden_layers=1, max_position_embeddings=300),
        tmp_path_factory.mktemp("encoders") / "long",
    )
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder, model_max_length=10_000)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", SIZES)
def test_texts_are_truncated_to_the_position_embeddings(
    architecture: str, make_encoder: EncoderFactory, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_encoder(architecture, pad_token_id=1), tmp_path / "encoder")
    transformers().AutoTokenizer.from_pretrained(folder, model_max_length=10_000).save_pretrained(folder)
    body = load_transformer(folder)
    n_tokens = body.tokenize(LONG_TEXTS.texts[:1])["input_ids"].shape[1]
    assert n_tokens == (78 if architecture in ("roberta", "mpnet") else 80)
    assert np.isfinite(body.encode(LONG_TEXTS.texts[:2])).all()


@pytest.mark.parametrize(("max_length", "expected"), [(None, 128), (16, 16), (200, 200), (1000, 300)])
@pytest.mark.parametrize("training", TRAINERS)
def test_transformers_read_128_tokens_by_default(
    training: str, max_length: int | None, expected: int, long_context_encoder: Path, tmp_path: Path
) -> None:
    body, lengths = load_transformer(long_context_encoder), list[int]()
    body.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0]["input_ids"].shape[1]))
    model = TRAINERS[training](body, max_length=max_length)
    assert set(lengths) == {expected}
    save_model(model, tmp_path / "saved")
    reloaded = load(tmp_path / "saved", device="cpu")
    assert reloaded.model_body.max_seq_length == expected
    by_transformers = predict_with_transformers(tmp_path / "saved", LONG_TEXTS.texts[:2])
    np.testing.assert_allclose(predict_proba(reloaded, LONG_TEXTS.texts[:2]), by_transformers, atol=1e-6)


def test_setfit_body_keeps_its_maximum_length(long_context_encoder: Path) -> None:
    assert train_long_teacher(load_body(long_context_encoder)).model_body.max_seq_length == 300


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("transformer", {}, True),
        ("transformer", {"dropout": True}, True),
        ("transformer", {"dropout": False}, False),
        ("setfit", {}, False),
        ("setfit", {"dropout": True}, True),
    ],
)
@pytest.mark.parametrize("training", TRAINERS)
def test_dropout_is_on_by_default_for_transformers_only(
    training: str, family: Family, settings: dict[str, Any], expected: bool, tiny_student: Path
) -> None:
    if training == "finetune" and family == "setfit":
        with pytest.raises(ModelError):
            finetune_long(load_body(tiny_student), **settings)
        return
    body = load_transformer(tiny_student) if family == "transformer" else load_body(tiny_student)
    modes: list[bool] = []
    dropouts: Any = [module for module in body.modules() if isinstance(module, torch.nn.Dropout)]

    def record_mode(module: torch.nn.Module, *_: object) -> None:
        if torch.is_grad_enabled():
            modes.append(module.training)

    for dropout in dropouts:
        dropout.register_forward_hook(record_mode)
    model = TRAINERS[training](body, **settings)
    assert set(modes) == {expected}
    assert not any(module.training for module in model.model_body.modules())


# The baseline


@pytest.mark.parametrize(("settings", "steps"), [({}, 12), ({"patience": 9}, 8)])
def test_transformer_baseline_is_fine_tuned_for_as_many_steps_as_the_student(
    settings: dict[str, Any],
    steps: int,
    tiny_teacher: Path,
    tiny_student: Path,
    learning_rates: list[list[float]],
    tmp_path: Path,
) -> None:
    rows = newswire("train")[:100]
    by_label = {label: [row for row in rows if row["label"] == label][:4] for label in {row["label"] for row in rows}}
    labeled = [(row["text"], row["label"]) for row in rows if row in by_label[row["label"]]]
    pool = [row["text"] for row in newswire("train")[100:148]]
    evaluation_set = [(row["text"], row["label"]) for row in newswire("eval")[:20]]
    options = {
        **CPU_FP32,
        "batch_size": 12,
        "epochs": 2,
        "learning_rate": 2e-3,
        "teacher_steps": 3,
        "weight_decay": 0.02,
    }
    result = distill(
        labeled,
        pool,
        evaluation_set,
        teacher=f"transformer:{tiny_teacher}",
        student=f"transformer:{tiny_student}",
        output_dir=tmp_path / "run",
        **{**options, **settings},
    )
    assert [len(training) for training in learning_rates] == [3, steps, steps]
    assert learning_rates[1] == learning_rates[2]
    expected = finetune(
        labeled, tiny_student, **CPU_FP32, batch_size=12, steps=steps, learning_rate=2e-3, weight_decay=0.02
    )
    assert expected.labels == list(result.signals.label_names)
    assert equal_weights(weights(load(tmp_path / "run" / "baseline", device="cpu")), weights(expected))
    assert equal_weights(weights(load(tmp_path / "run", device="cpu")), weights(result.student))
    assert not equal_weights(weights(result.student), weights(expected))


def test_teacher_trains_150_steps_or_three_epochs() -> None:
    few, many = (LabeledSet(*texts_and_labels(n), LABEL_NAMES) for n in (16, 1000))
    assert to_finetune_config(TeacherConfig.of(), few, CPU).steps == 150
    assert to_finetune_config(TeacherConfig.of(), many, CPU).steps == 3 * 63
    assert to_finetune_config(TeacherConfig.of(), many, torch.device("cuda")).steps == 150
    assert to_finetune_config(TeacherConfig.of(teacher_batch_size=10), many, CPU).steps == 300
    assert to_finetune_config(TeacherConfig.of(teacher_steps=7), many, CPU).steps == 7


def test_teacher_batch_size_depends_on_family_and_device() -> None:
    labeled = LabeledSet(*texts_and_labels(100), LABEL_NAMES)

    def sizes(family: Family, **settings: Any) -> list[int]:
        devices = [torch.device(name) for name in ("cpu", "cuda")]
        config = TeacherConfig.of(**settings)
        return [resolve_teacher_batch_size(config, labeled, family=family, device=device) for device in devices]

    assert sizes("transformer") == [16, 32]
    assert sizes("transformer", teacher_batch_size=8) == [8, 8]
    assert sizes("setfit") == [64, 64]


def test_transformer_teacher_has_a_higher_learning_rate_than_fine_tuning() -> None:
    labeled = LabeledSet(*texts_and_labels(16), LABEL_NAMES)
    documented = TeacherConfig.model_fields["teacher_learning_rate"].description or ""
    default = to_finetune_config(TeacherConfig.of(), labeled, CPU).learning_rate
    assert default is not None
    assert default > resolved(FinetuneConfig.of().with_family_defaults("transformer").learning_rate)
    assert f"{default:.0e} for a transformer".replace("e-0", "e-") in documented
    assert to_finetune_config(TeacherConfig.of(teacher_learning_rate=3e-5), labeled, CPU).learning_rate == 3e-5


def test_transformer_student_also_trains_on_labeled_texts_without_signals(tiny_student: Path) -> None:
    signals, texts = pool_signals(32), NEWS[:4]
    labeled = LabeledSet([*texts, f"{signals.texts[0].upper()} "], np.arange(5) % 4, LABEL_NAMES)
    joined = TeacherSignals(
        [*signals.texts, *texts], np.concatenate([signals.probabilities, np.eye(4, dtype=np.float32)]), LABEL_NAMES
    )

    def train(signals: TeacherSignals, gold: LabeledSet | None = labeled, **settings: Any) -> list[Tensor]:
        options = {**CPU_FP32, "epochs": 1, "batch_size": 18, "learning_rate": 1e-3}
        return weights(train_student(signals, f"transformer:{tiny_student}", labeled=gold, **options, **settings))

    assert equal_weights(train(signals), train(joined))
    assert equal_weights(train(signals, alpha=0), train(signals, None, alpha=0))
    objective = "soft-labels,embedding"  # requires embeddings, which the labeled texts lack
    assert equal_weights(train(signals, objective=objective), train(signals, labeled.take([4]), objective=objective))


# Invalid models


def remove_weights(saved: Path, folder: Path, part: str) -> Path:
    """Copy a saved classifier without the weights that have ``part`` in their names."""
    shutil.copytree(saved, folder)
    remaining = {name: value for name, value in load_file(saved / "model.safetensors").items() if part not in name}
    save_file(remaining, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("bert.", r"lacks 7[01] weights of BertForSequenceClassification, including bert\."),
        (
            "layer.1.output.dense.weight",
            r"lacks 1 weights of .*, including bert\.encoder\.layer\.1\.output\.dense\.weight",
        ),
        ("word_embeddings", r"bert\.embeddings\.word_embeddings\.weight"),
    ],
)
def test_encoder_with_missing_weights_is_rejected(part: str, message: str, saved: Path, tmp_path: Path) -> None:
    folder = remove_weights(saved, tmp_path / "damaged", part)
    for load_function in (load_transformer, load):
        with pytest.raises(ModelError, match=message) as error_info:
            cast("Any", load_function)(folder)
        assert error_info.value.hint


@pytest.mark.parametrize("part", ["classifier", "pooler"])
def test_classifier_with_missing_weights_is_rejected(part: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load(remove_weights(saved, tmp_path / "damaged", part), device="cpu")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "regression": (lambda folder: change_config(folder, id2label={"0": "LABEL_0"}), "has a single output"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "Cannot load"),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-99]),
        "Cannot load",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "Cannot load"),
    "invalid JSON": (lambda folder: (folder / "config.json").write_text("{"), "Cannot read"),
    "list of label names": (lambda folder: change_config(folder, id2label=["a", "b"]), "Cannot read"),
    "unknown model type": (lambda folder: change_config(folder, model_type="nonesuch"), "Cannot load"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_transformer_is_rejected_with_its_folder_in_the_message(
    damage: str, saved: Path, tmp_path: Path
) -> None:
    change, message = DAMAGES[damage]
    change(shutil.copytree(saved, tmp_path / "damaged"))
    with pytest.raises(ModelError, match=message) as error_info:
        load(tmp_path / "damaged", device="cpu")
    assert str(tmp_path / "damaged") in error_info.value.message
    assert error_info.value.hint


INVALID_STUDENTS: list[tuple[str, type[SetFitKDError], str]] = [
    ("layers:9", ModelError, "of a body with 4"),
    ("layers:0,4", ModelError, "of a body with 4"),
    ("layers:9:distilbert", ModelError, "of a body with 4"),
    ("layers:x:distilbert", ConfigError, "number of layers, got 'layers:x:distilbert'"),
    ("layers:2:bert", ConfigError, "number of layers, got 'layers:2:bert'"),
    ("layers:2:distilbert@SETFIT", ModelError, "Only layers of a BERT can be converted"),
    ("layers:2:distilbert@transformer:ROBERTA", ModelError, "Only layers of a BERT can be converted"),
    ("layers:2@transformer:ALBERT", ModelError, "cut out of a transformer encoder"),
    ("layers:2@transformer:MODERNBERT", ModelError, "differ in type"),
    ("static:17", ModelError, "at most 16 dimensions, as the teacher has, got 17"),
    ("transformer:./nowhere", ModelError, "No such model folder: ./nowhere"),
    ("blank:./nowhere", ModelError, "No such model folder: ./nowhere"),
    ("transformer:", ModelError, "The model name is missing in 'transformer:'"),
    ("blank:EMPTY", ModelError, "is not a model"),
    ("blank:UNREADABLE", ModelError, "Cannot load"),
]


@pytest.mark.parametrize(("name", "error", "fragment"), INVALID_STUDENTS)
def test_invalid_student_is_rejected_before_training(
    name: str,
    error: type[SetFitKDError],
    fragment: str,
    make_encoder: EncoderFactory,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teaching_module, "train_teacher", lambda *_, **__: pytest.fail("training began"))
    for folder in ("empty", "unreadable"):
        (tmp_path / folder).mkdir()
    (tmp_path / "unreadable" / "config.json").write_text("{")
    folders = {"SETFIT": tiny_student, "EMPTY": tmp_path / "empty", "UNREADABLE": tmp_path / "unreadable"}
    for architecture in ("modernbert", "albert", "roberta"):
        if architecture.upper() in name:
            folders[architecture.upper()] = make_encoder(architecture)
    for placeholder, path in folders.items():
        name = re.sub(rf"\b{placeholder}\b", str(path), name)
    with pytest.raises(error, match=re.escape(fragment)) as error_info:
        distill(*["bundled:newswire"] * 3, teacher=f"transformer:{make_encoder('bert')}", student=name, **SMALL_RUN)
    assert error_info.value.hint
