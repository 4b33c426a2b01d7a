"""Transformers trained end to end: loading, saving, copying layers, fine-tuning and distillation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checks import truncate_file
from conftest import ENCODERS, FAST, encoder_config, newswire
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score
from synthetic import LABEL_NAMES, equal_weights, few_labels, pool_signals, texts_and_labels, weights
from torch import Tensor

from setfit_kd import TeacherSignals, distill, load, train_student, train_teacher
from setfit_kd.config.base import Family
from setfit_kd.config.stages import FinetuneConfig, TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import ConfigError, DataError, ModelError
from setfit_kd.evaluation.measure import count_parameters
from setfit_kd.export.bundle import export_bundle
from setfit_kd.finetune.train import finetune
from setfit_kd.finetune.trainer import ValidationCallback
from setfit_kd.models.bodies import family_of, is_static, load_body, locate_body
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import get_head, last_layer
from setfit_kd.models.io import new_model, save_model
from setfit_kd.models.layers import cut_layers
from setfit_kd.models.static import static_body
from setfit_kd.runtime.classify import Classifier
from setfit_kd.student.kinds import folder_names, locate_student
from setfit_kd.teacher.train import steps_and_batch_size
from setfit_kd.training.loop import _set_schedule

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Floats = npt.NDArray[np.floating]

transformers: Any = import_module("transformers")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SAVED = Path("saved")  # in the empty folder of each test
NEWS = [row["text"] for row in newswire("eval")[:40]]
TEXTS = [*NEWS[:10], "goal", "", " ".join(NEWS[:6])]
"""Texts of different lengths; the last is longer than the maximum length of the tiny transformers."""
CPU_FP32: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


def load_transformer(folder: Path, names: Sequence[str] = LABEL_NAMES, *, seed: int = 0) -> SentenceTransformer:
    return locate_body(f"transformer:{folder}").load(names, seed=seed)


def make_student(
    name: str, teacher: SentenceTransformer, names: Sequence[str] = LABEL_NAMES, *, seed: int = 0, change: bool = False
) -> SentenceTransformer:
    """Build a student's body; ``change`` changes all weights of the teacher first, as fine-tuning does."""
    prepared = locate_student(name).prepare(teacher, names, seed=seed)
    if change:
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    student = prepared.create_body(teacher, TEXTS, CPU)
    assert family_of(student) == prepared.family == "transformer"
    return student


def to_classifier(body: SentenceTransformer, names: Sequence[str] = LABEL_NAMES) -> SetFitModel:
    model = new_model(body, names)
    model.model_head = get_head(body)
    return model


def network_of(body: SentenceTransformer) -> Any:
    first: Any = body[0]
    return first.model


def named_weights(body: SentenceTransformer) -> dict[str, Tensor]:
    """Return all weights by their names in transformers; those of the last layer start with ``head``."""
    head = last_layer(body).state_dict()
    return {**network_of(body).state_dict(), **{f"head.{name}": value for name, value in head.items()}}


def assert_equal_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def predict_with_transformers(folder: Path, texts: Sequence[str]) -> Floats:
    """Predict probabilities from a folder with transformers only."""
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = network(**tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")).logits
    return cast("Floats", softmax(logits.double().numpy(), axis=1))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture(scope="session")
def bert(make_encoder: Any) -> Path:
    folder: Path = make_encoder("bert")
    return folder


@pytest.fixture(scope="session")
def saved(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete classifier."""
    folder = tmp_path_factory.mktemp("classifiers") / "bert"
    save_model(to_classifier(load_transformer(bert)), folder)
    return folder


# Loading and saving


@pytest.mark.parametrize(
    ("architecture", "classes"),
    [*((name, 3) for name in ENCODERS), ("bert", 2), ("distilbert", 16), ("roberta", 16)],  # 16 is also the width
)
def test_saved_transformer_predicts_the_same_in_transformers(
    architecture: str, classes: int, make_encoder: Any
) -> None:
    names = [f"class {index}" for index in range(classes)]
    body = load_transformer(make_encoder(architecture), names)
    save_model(to_classifier(body, names), SAVED)
    expected = predict_with_transformers(SAVED, TEXTS)
    assert np.ptp(expected, axis=0).max() > 0.01
    features = body.encode(TEXTS, show_progress_bar=False)
    assert features.shape == (len(TEXTS), body.get_embedding_dimension())
    np.testing.assert_allclose(get_head(body).predict_proba(features), expected, atol=1e-6)
    reloaded = load(SAVED, device="cpu")
    assert reloaded.labels == names
    np.testing.assert_allclose(predict_proba(reloaded, TEXTS), expected, atol=1e-6)
    assert [str(label) for label in reloaded.predict(TEXTS)] == [names[index] for index in expected.argmax(axis=1)]
    network = transformers.AutoModelForSequenceClassification.from_pretrained(SAVED)
    assert count_parameters(reloaded) == network.num_parameters()
    assert_equal_weights(named_weights(load_transformer(SAVED, names, seed=1)), named_weights(body))
    assert "library_name: transformers" in (SAVED / "README.md").read_text()


def test_head_is_matched_by_class_names(bert: Path) -> None:
    """The order of the classes and of the keys in ``config.json``, where "10" sorts before "2", does not matter."""
    names = [f"class {index}" for index in range(12)]
    body = load_transformer(bert, names)
    save_model(to_classifier(body, names), SAVED)
    change_config(SAVED, id2label={key: f"class {key}" for key in sorted(map(str, range(12)))})
    features = body.encode(TEXTS, show_progress_bar=False)
    expected = get_head(body).predict_proba(features)
    for order in (np.arange(12), np.random.default_rng(0).permutation(12)):
        reloaded = load_transformer(SAVED, [names[index] for index in order])
        np.testing.assert_allclose(get_head(reloaded).predict_proba(features), expected[:, order], atol=1e-6)


@pytest.mark.parametrize("names", [("a", "b", "c", "d"), LABEL_NAMES[:2]], ids=["other", "fewer"])
def test_other_classes_get_a_new_head_on_the_same_network(names: Sequence[str], saved: Path) -> None:
    before, after = named_weights(load_transformer(saved)), named_weights(load_transformer(saved, names))
    head = after.pop("head.weight")
    assert head.shape == (len(names), 16)
    assert not torch.isclose(head, before["head.weight"][: len(names)]).any()
    assert not after.pop("head.bias").any()
    assert head.std().item() == pytest.approx(0.3, rel=0.3)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize(("architecture", "random"), [("bert", ()), ("distilbert", "pre_"), ("roberta", "classifier")])
def test_missing_weights_are_initialized_from_the_seed(architecture: str, random: str, make_encoder: Any) -> None:
    folder, state = make_encoder(architecture), torch.get_rng_state()
    first, repeated, other_seed = (named_weights(load_transformer(folder, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal_weights(first, repeated)
    different = {name for name, value in first.items() if not torch.equal(value, other_seed[name])}
    prefixes = ("head", random or "head")
    assert different == {name for name in first if name.endswith("weight") and name.startswith(prefixes)}


def test_half_precision_weights_are_loaded_as_fp32(bert: Path) -> None:
    folder = Path(shutil.copytree(bert, "half"))
    half = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, dtype="float16")
    dtypes = {value.dtype for value in named_weights(load_transformer(folder)).values()}
    assert dtypes - {torch.int64} == {torch.float32}


# Pairings of teachers and students

SMALL_RUN: dict[str, Any] = {**FAST, "shots": 4, "pool_size": 32, "batch_size": 16, "cache": False}


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Folder with only the config of a DistilBERT."""
    folder = tmp_path_factory.mktemp("configs") / "blank"
    encoder_config("distilbert", vocab_size=len(tokenizer), n_layers=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("teacher", "students"),
    [
        ("transformer:TEACHER", ["STUDENT", "transformer:STUDENT", "layers:2", "layers:2:distilbert", "static:8"]),
        ("TEACHER", ["transformer:STUDENT", "layers:0,2:distilbert@transformer:TEACHER", "blank:BLANK"]),
    ],
)
def test_every_teacher_student_pairing_is_trained_evaluated_and_saved(
    teacher: str, students: list[str], tiny_teacher: Path, tiny_student: Path, blank: Path, caplog: Any
) -> None:
    for placeholder, folder in (("TEACHER", tiny_teacher), ("STUDENT", tiny_student), ("BLANK", blank)):
        teacher, *students = (name.replace(placeholder, str(folder)) for name in (teacher, *students))
    evaluation_set = [(row["text"], row["label"]) for row in newswire("eval")[:40]]
    sources = ["bundled:newswire", "bundled:newswire", evaluation_set]
    result = distill(*sources, teacher=teacher, student=tuple(students), output_dir="run", **SMALL_RUN)
    assert result.evaluations["teacher"].quality.agreement is None
    for name, slug in zip(students, folder_names(students), strict=True):
        student, evaluation = result.students[name], result.evaluations[f"students/{slug}"]
        is_transformer = not name.startswith(("static", str(tiny_student)))
        assert family_of(student.model_body) == ("transformer" if is_transformer else "setfit")
        assert is_static(student.model_body) is name.startswith("static")
        assert evaluation.quality.agreement is not None
        np.testing.assert_allclose(predict_proba(student, NEWS), evaluation.probabilities, atol=1e-6)
        for path in ("teacher", f"baselines/{slug}", f"students/{slug}"):
            model, expected = load(f"run/{path}", device="cpu"), result.evaluations[path].probabilities
            np.testing.assert_allclose(predict_proba(model, NEWS), expected, atol=1e-6)
        if is_transformer:  # the softmax of its logits, regardless of the training temperature
            by_transformers = predict_with_transformers(Path(f"run/students/{slug}"), NEWS)
            np.testing.assert_allclose(by_transformers, expected, atol=1e-6)
        if slug in ("layers-2", "layers-2-distilbert"):
            pytest.importorskip("onnxruntime")
            assert export_bundle(model, f"bundle-{slug}", texts=TEXTS, format="onnx").parity["agreement"] == 1
            np.testing.assert_allclose(Classifier(f"bundle-{slug}").predict_proba(NEWS), expected, atol=1e-5)
    with caplog.at_level("INFO", "setfit_kd"):
        resumed = distill(resume="run")
    assert caplog.text.count(": loaded from") == len(json.loads(Path("run/run.json").read_text())["stages"])
    for name, student in resumed.students.items():
        assert equal_weights(weights(student), weights(result.students[name]))


# Layers of the teacher


@pytest.mark.parametrize(
    ("name", "keep", "classes", "activation"), [("layers:3,1", (3, 1), 2, "gelu"), ("layers:2", (0, 3), 4, "relu")]
)
def test_distilbert_has_weights_and_hidden_states_of_the_fine_tuned_bert(
    name: str, keep: Any, classes: int, activation: str, make_encoder: Any
) -> None:
    names = LABEL_NAMES[:classes]
    teacher = load_transformer(make_encoder("bert", hidden_act=activation, num_attention_heads=4), names)
    student = make_student(f"{name}:distilbert", teacher, names, change=True)
    config, bert, distilbert = network_of(student).config, named_weights(teacher), named_weights(student)
    assert (config.model_type, tuple(config.id2label.values())) == ("distilbert", tuple(names))
    for kind in ("weight", "bias"):
        assert torch.equal(distilbert[f"head.{kind}"], bert[f"head.{kind}"])
        assert torch.equal(distilbert[f"pre_classifier.{kind}"], bert[f"bert.pooler.dense.{kind}"])
    features = teacher.preprocess(TEXTS)
    ids, mask = features["input_ids"], features["attention_mask"]
    assert student.preprocess(TEXTS)["input_ids"].tolist() == ids.tolist()
    networks = [network_of(body).base_model for body in (cut_layers(teacher, keep), student)]
    with torch.inference_mode():
        hidden = [network(input_ids=ids, attention_mask=mask).last_hidden_state[mask == 1] for network in networks]
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=0)


# Blank transformers


def test_blank_student_is_untrained_and_matches_its_config(blank: Path, tokenizer: Any, bert: Path) -> None:
    teacher = load_transformer(bert)
    body = make_student(f"blank:{blank}", teacher)
    config = network_of(body).config
    assert (config.model_type, config.n_layers, config.dim, config.n_heads) == ("distilbert", 1, 16, 2)
    assert list(config.id2label.values()) == list(LABEL_NAMES)
    for name, value in named_weights(body).items():
        if name.endswith("bias") or "norm" in name.lower():
            assert (value == float(name.endswith("weight"))).all(), name
        else:
            assert value.std().item() == pytest.approx(0.3, rel=0.3), name
    assert body.tokenizer(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    repeated, other_seed = (named_weights(make_student(f"blank:{blank}", teacher, seed=seed)) for seed in (0, 1))
    assert_equal_weights(named_weights(body), repeated)
    assert not torch.isclose(repeated["head.weight"], other_seed["head.weight"]).any()


@pytest.mark.parametrize("family", ["setfit", "transformer"])
def test_blank_student_uses_its_own_tokenizer_or_the_teachers(
    family: Family, tokenizer: Any, bert: Path, tiny_teacher: Path
) -> None:
    teacher = load_transformer(bert) if family == "transformer" else load_body(tiny_teacher)
    own = transformers.AutoTokenizer.from_pretrained(bert)
    own.add_tokens(["thematch"])
    for name, expected in (("own", own), ("none", tokenizer)):
        encoder_config("bert", vocab_size=len(own)).save_pretrained(name)
        if name == "own":
            own.save_pretrained(name)
        body = make_student(f"blank:{name}", teacher)
        ids = body.preprocess(["thematch was lost"])["input_ids"][0].tolist()
        assert ids == expected("thematch was lost")["input_ids"]
    for name, owner in (("own", "its"), ("none", "the teacher's")):
        change_config(Path(name), vocab_size=9)
        with pytest.raises(ModelError, match=rf"at least \d+, the size of {owner} tokenizer, got 9"):
            make_student(f"blank:{name}", teacher)
    with pytest.raises(ModelError, match="no tokenizer in"):
        make_student("blank:none", static_body(load_body(tiny_teacher), [], dimension=8))


# Training students


@pytest.mark.parametrize("objective", ["soft-labels", "similarity"])
def test_transformer_student_learns_the_teachers_predictions(objective: str, make_encoder: Any) -> None:
    signals = pool_signals()
    body = load_transformer(make_encoder("bert", num_hidden_layers=1, initializer_range=0.1))
    settings = {**CPU_FP32, "objective": objective, "epochs": 20, "learning_rate": 1e-2, "batch_size": 11}
    student = train_student(signals, body, labeled=few_labels(), **settings)
    probabilities = predict_proba(student, signals.texts)
    assert (probabilities.argmax(axis=1) == signals.probabilities.argmax(axis=1)).mean() > 0.9
    save_model(student, SAVED)
    np.testing.assert_allclose(predict_with_transformers(SAVED, signals.texts), probabilities, atol=1e-6)


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
def set_scores(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], list[dict[str, Tensor]]]:
    """Function that sets the scores of the evaluations; it returns the body's weights at each."""

    def set_values(values: list[float]) -> list[dict[str, Tensor]]:
        states: list[dict[str, Tensor]] = []

        def measure(callback: Any, _: int) -> float:
            states.append({name: value.clone() for name, value in callback.body.state_dict().items()})
            return values[len(states) - 1]

        monkeypatch.setattr(ValidationCallback, "measure", measure)
        return states

    return set_values


def test_finetuning_a_loaded_body_learns_from_labels_in_place(make_encoder: Any) -> None:
    rows = [(text, LABEL_NAMES[label]) for text, label in zip(TRAINING.texts, TRAINING.labels, strict=True)]
    names = sorted(LABEL_NAMES)
    body = load_transformer(make_encoder("bert", num_hidden_layers=1, initializer_range=0.1), names)
    before = {name: value.clone() for name, value in named_weights(body).items()}
    model = finetune(rows, body, validation=rows[:9], **CPU_FP32, batch_size=8, epochs=5, learning_rate=1e-2)
    assert model.model_body is body
    assert model.labels == names
    assert not body.training
    changed = {name for name, value in named_weights(body).items() if not torch.equal(value, before[name])}
    assert {"head.weight", "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"} <= changed
    probabilities = predict_proba(model, VALIDATION.texts)
    predicted = [LABEL_NAMES.index(names[index]) for index in probabilities.argmax(axis=1)]
    assert np.mean(np.array(predicted) == VALIDATION.labels) > 0.9
    save_model(model, SAVED)
    np.testing.assert_allclose(predict_with_transformers(SAVED, VALIDATION.texts), probabilities, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "values", "best", "steps"),
    [
        ({}, [0.5, 0.4, 0.6, 0.6], 2, 7),
        ({"patience": 1}, [0.5, 0.4], 0, 4),
        ({"batch_size": 16, "eval_steps": None}, [0.4, 0.5], 1, 7),  # once per epoch
    ],
)
def test_first_best_checkpoint_is_kept_and_patience_stops_training(
    settings: Any, values: list[float], best: int, steps: int, tiny_student: Path, trained_steps: Any, set_scores: Any
) -> None:
    states = set_scores(values)
    model = run_finetuning(tiny_student, validation=VALIDATION, steps=7, **{"eval_steps": 2, **settings})
    assert (len(states), len(trained_steps)) == (len(values), steps)
    for index, state in enumerate(states):
        equal = [torch.equal(value, state[name]) for name, value in model.model_body.state_dict().items()]
        assert all(equal) is (index == best)
    np.testing.assert_array_equal(model.model_head.coef_, get_head(model.model_body).coef_)


METRICS = ("accuracy", "f1-macro", "f1-weighted", "f1-binary")


@pytest.mark.parametrize("metric", METRICS)
def test_best_checkpoint_is_chosen_by_the_metric(metric: str, tiny_student: Path) -> None:
    data, labeled = merge_to_two_classes(VALIDATION), merge_to_two_classes(TRAINING)
    settings: dict[str, Any] = {"steps": 8, "eval_steps": 1, "learning_rate": 3e-3, "schedule": "constant"}
    history: list[dict[str, float]] = []
    model = run_finetuning(tiny_student, labeled, validation=data, metric=metric, history=history, **settings)
    predicted = predict_proba(model, data.texts).argmax(axis=1)
    scores = {name: f1_score(data.labels, predicted, average=name[3:], zero_division=0) for name in METRICS[1:]}
    scores["accuracy"] = accuracy_score(data.labels, predicted)
    assert len(set(scores.values())) == len(scores)
    best = max(history, key=lambda row: row[metric])
    assert {name: best[name] for name in METRICS} == pytest.approx(scores)


@pytest.mark.parametrize(
    ("settings", "scores", "factors"),
    [
        ({}, [0.1], [0, 0.5, *np.arange(10, 0, -1) / 10]),  # warmup: a tenth of the steps, rounded up
        ({"warmup_steps": 4, "schedule": "constant"}, [0.1], [0, 0.25, 0.5, 0.75, *[1] * 8]),
        ({"warmup_steps": 0, "eval_steps": 3, "schedule": "plateau"}, [0.5] * 4, [*[1] * 6, *[0.5] * 3, *[0.25] * 3]),
        ({"warmup_steps": 0, "eval_steps": 3, "schedule": "plateau"}, [0.4, 0.3, 0.5, 0.1], [*[1] * 6, *[0.5] * 6]),
    ],
)
def test_learning_rate_follows_warmup_and_schedule(
    settings: Any, scores: list[float], factors: Any, tiny_student: Path, learning_rates: Any, set_scores: Any
) -> None:
    set_scores(scores)
    settings = {"eval_steps": 12, **settings}
    run_finetuning(tiny_student, validation=VALIDATION, steps=12, learning_rate=4e-3, **settings)
    assert learning_rates[0] == pytest.approx([4e-3 * factor for factor in factors])


def test_default_warmup_is_at_most_500_steps() -> None:
    arguments = SimpleNamespace()
    _set_schedule(arguments, FinetuneConfig.of(), 100_000)
    assert arguments.warmup_steps == 500


def test_finetuning_rejects_invalid_inputs(tiny_student: Path) -> None:
    with pytest.raises(DataError, match="have different classes"):
        run_finetuning(tiny_student, validation=merge_to_two_classes(VALIDATION))
    with pytest.raises(ModelError, match="no classification layer to fine-tune"):
        finetune(TRAINING, load_body(tiny_student), **CPU_FP32)


# All trainers

LONG_TEXTS = LabeledSet([f"{text} " + "goal " * 400 for text in TRAINING.texts[:8]], TRAINING.labels[:8], LABEL_NAMES)


def train_long(training: str, body: SentenceTransformer, **settings: Any) -> SetFitModel:
    """Train a body for a few steps on long texts."""
    settings = {**CPU_FP32, **settings}
    if training == "finetune":
        return finetune(LONG_TEXTS, body, batch_size=8, epochs=1, **settings)
    if training == "teacher":
        if "dropout" in settings:
            settings["teacher_dropout"] = settings.pop("dropout")
        return train_teacher(
            LONG_TEXTS, body, teacher_steps=2, teacher_batch_size=8, teacher_learning_rate=1e-4, **settings
        )
    probabilities = np.eye(4, dtype=np.float32)[LONG_TEXTS.labels]
    signals = TeacherSignals(LONG_TEXTS.texts, probabilities, LABEL_NAMES, np.eye(len(LONG_TEXTS)))
    return train_student(signals, body, batch_size=8, epochs=1, learning_rate=1e-4, **settings)


def with_long_tokenizer(encoder: Path) -> Path:
    """Copy an encoder with a tokenizer that does not limit the number of tokens."""
    folder: Path = shutil.copytree(encoder, Path("encoder"))
    transformers.AutoTokenizer.from_pretrained(folder, model_max_length=10_000).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ENCODERS)
def test_texts_are_truncated_to_the_position_embeddings(architecture: str, make_encoder: Any) -> None:
    body = load_transformer(with_long_tokenizer(make_encoder(architecture, pad_token_id=1)))
    n_tokens = body.tokenize(LONG_TEXTS.texts[:1])["input_ids"].shape[1]
    assert n_tokens == (78 if architecture in ("roberta", "mpnet") else 80)
    assert np.isfinite(body.encode(LONG_TEXTS.texts[:2])).all()


@pytest.mark.parametrize(("max_length", "expected"), [(None, 128), (999, 300)])
@pytest.mark.parametrize("training", ["finetune", "teacher", "student"])
def test_transformers_read_128_tokens_by_default(
    training: str, max_length: Any, expected: int, make_encoder: Any
) -> None:
    folder = with_long_tokenizer(make_encoder("bert", num_hidden_layers=1, max_position_embeddings=300))
    body, lengths = load_transformer(folder), set[int]()
    body.register_forward_pre_hook(lambda _, inputs: lengths.add(inputs[0]["input_ids"].shape[1]))
    save_model(train_long(training, body, max_length=max_length), SAVED)
    assert lengths == {expected}
    assert load(SAVED, device="cpu").model_body.max_seq_length == expected
    if training == "teacher":
        assert train_long(training, load_body(folder)).model_body.max_seq_length == 300


@pytest.mark.parametrize("training", ["finetune", "teacher", "student"])
def test_dropout_is_on_by_default(training: str, tiny_student: Path) -> None:
    body, modes = load_transformer(tiny_student), list[bool]()

    def record_mode(module: torch.nn.Module, *_: object) -> None:
        if torch.is_grad_enabled():
            modes.append(module.training)

    for module in body.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(record_mode)
    train_long(training, body)
    assert set(modes) == {True}
    modes.clear()
    model = train_long(training, body, dropout=False)
    assert set(modes) == {False}
    assert not any(module.training for module in model.model_body.modules())


@pytest.mark.parametrize(("settings", "steps"), [({}, 12), ({"patience": 9}, 8)])
def test_transformer_baseline_is_fine_tuned_for_as_many_steps_as_the_student(
    settings: dict[str, Any], steps: int, tiny_teacher: Path, tiny_student: Path, learning_rates: list[list[float]]
) -> None:
    rows = [(text, LABEL_NAMES[label]) for text, label in zip(*texts_and_labels(84), strict=True)]
    labeled, pool, evaluation = rows[:16], [text for text, _ in rows[16:64]], rows[64:]
    names = (f"transformer:{tiny_teacher}", f"transformer:{tiny_student}")
    training: dict[str, Any] = {**CPU_FP32, "batch_size": 12, "learning_rate": 2e-3, "weight_decay": 0.02}
    settings = {**training, **settings, "epochs": 2, "teacher_steps": 3, "output_dir": "run"}
    result = distill(labeled, pool, evaluation, teacher=names[0], student=names[1], **settings)
    assert [len(rates) for rates in learning_rates] == [3, steps, steps]
    assert learning_rates[1] == learning_rates[2]
    expected = finetune(labeled, tiny_student, steps=steps, **training)
    assert expected.labels == list(result.signals.label_names)
    # Only the last layer differs, which is scaled by a temperature.
    assert equal_weights(weights(load("run/baseline", device="cpu"))[:-2], weights(expected)[:-2])
    assert equal_weights(weights(load("run", device="cpu")), weights(result.student))
    assert not equal_weights(weights(result.student), weights(expected))


def test_steps_and_batch_size_of_a_transformer_teacher() -> None:
    labeled = LabeledSet(*texts_and_labels(1000), LABEL_NAMES)
    configs = (TeacherConfig.of(), TeacherConfig.of(teacher_batch_size=10), TeacherConfig.of(teacher_steps=7))
    for config, expected in zip(configs, ((3 * 63, 16), (300, 10), (7, 16)), strict=True):
        assert steps_and_batch_size(config, labeled, family="transformer", device=CPU) == expected
    assert steps_and_batch_size(configs[0], labeled.take(range(16)), family="transformer", device=CPU) == (150, 16)
    assert steps_and_batch_size(configs[0], labeled, family="transformer", device=CUDA) == (150, 32)


# Invalid models


def remove_weights(folder: Path, part: str) -> None:
    """Remove the weights that have ``part`` in their names."""
    remaining = {name: value for name, value in load_file(folder / "model.safetensors").items() if part not in name}
    save_file(remaining, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no encoder": (lambda folder: remove_weights(folder, "bert."), r"lacks \d+ weights of BertFor.*, including bert\."),
    "no classifier": (lambda folder: remove_weights(folder, "classifier"), "lacks"),
    "regression": (lambda folder: change_config(folder, id2label={"0": "LABEL_0"}), "has a single output"),
    "truncated": (lambda folder: truncate_file(folder / "model.safetensors"), "Cannot load"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "Cannot load"),
    "invalid JSON": (lambda folder: (folder / "config.json").write_text("{"), "Cannot read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_transformer_is_rejected_with_its_folder_in_the_message(damage: str, saved: Path) -> None:
    change, message = DAMAGES[damage]
    change(Path(shutil.copytree(saved, "damaged")))
    with pytest.raises(ModelError, match=message) as error_info:
        load("damaged", device="cpu")
    assert "damaged" in error_info.value.message
    assert error_info.value.hint


def test_encoder_may_only_lack_a_pooler(masked_lm: Path) -> None:
    assert load_body(masked_lm)
    folder = Path(shutil.copytree(masked_lm, "damaged"))
    remove_weights(folder, "layer.0.output")
    with pytest.raises(
        ModelError, match=r"damaged: The model lacks 4 weights of BertModel, including encoder\.layer\.0"
    ):
        load_body(folder)


@pytest.mark.parametrize(
    ("name", "error", "fragment"),
    [
        ("layers:9:distilbert", ModelError, "of a body with 4"),
        ("layers:x:distilbert", ConfigError, "number of layers, got 'layers:x:distilbert'"),
        ("layers:2:distilbert@SETFIT", ModelError, "Only layers of a BERT can be converted"),
        ("layers:2:distilbert@transformer:GELU", ModelError, "hidden_act=gelu_new"),
        ("transformer:", ModelError, "The model name is missing in 'transformer:'"),
        ("blank:UNREADABLE", ModelError, "Cannot load"),
    ],
)
def test_invalid_student_is_rejected(
    name: str, error: Any, fragment: str, make_encoder: Any, tiny_student: Path
) -> None:
    Path("UNREADABLE").mkdir()
    Path("UNREADABLE/config.json").write_text("{")
    for placeholder, path in (("SETFIT", tiny_student), ("GELU", make_encoder("bert", hidden_act="gelu_new"))):
        name = name.replace(placeholder, str(path))
    with pytest.raises(error, match=re.escape(fragment)) as error_info:
        make_student(name, load_transformer(make_encoder("bert")))
    assert error_info.value.hint
