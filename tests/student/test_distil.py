"""Distillation: objectives, initial weights of the losses, gold labels, the head and frozen embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from synthetic import LABEL_NAMES, QUICK, equal_weights, few_labels, pool_signals, texts_and_labels, weights

from setfit_kd import TeacherSignals, train_student, train_teacher
from setfit_kd.config.stages import StudentConfig
from setfit_kd.config.values import parse_objectives
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.losses.base import BatchLoss
from setfit_kd.losses.embedding import EmbeddingLoss
from setfit_kd.losses.similarity import SimilarityLoss
from setfit_kd.losses.soft_labels import NO_GOLD, SoftLabelLoss
from setfit_kd.losses.weighted_sum import WeightedSumLoss
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed, predict_proba
from setfit_kd.models.heads import DEFAULT_C, fit_head
from setfit_kd.models.io import new_model
from setfit_kd.student import trainer as trainer_module
from setfit_kd.student.loss import LossInputs, create_loss, match_gold_labels
from setfit_kd.training import loop as training_module

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd.student.trainer import StudentTrainer

CPU = resolve_device("cpu")
OBJECTIVES = [
    "similarity",
    "embedding",
    "soft-labels",
    "similarity=2",
    "similarity,soft-labels=0.5",
    "embedding=0.5,similarity,soft-labels",
]


def student_trainer(
    folder: Path, body: SentenceTransformer, signals: TeacherSignals, labeled: LabeledSet | None, **settings: Any
) -> StudentTrainer:
    config = StudentConfig.of(**{**QUICK, **settings})
    model = new_model(body, signals.label_names)
    return trainer_module.StudentTrainer(model, signals, labeled, config, CPU, str(folder))


def loss_inputs(body: SentenceTransformer, signals: TeacherSignals, **settings: Any) -> LossInputs:
    gold = settings.pop("gold", np.full(len(signals), NO_GOLD))
    return LossInputs(
        body,
        signals,
        np.arange(len(signals)),
        gold,
        StudentConfig.of(**{**QUICK, **settings}).with_family_defaults("setfit"),
    )


def without_embeddings(signals: TeacherSignals) -> TeacherSignals:
    return replace(signals, embeddings=None, origin="a rule")


# Objectives


@pytest.mark.parametrize(
    ("objective", "width"),
    [
        ("similarity", 8),
        ("similarity=2", 24),
        ("embedding", 8),
        ("embedding", 16),
        ("embedding", 24),
        ("soft-labels", 24),
        ("similarity,soft-labels=0.5", 24),
        ("embedding=0.5,similarity,soft-labels", 8),
    ],
)
def test_objectives_train_with_teachers_of_any_width(
    student_body: SentenceTransformer, tmp_path: Path, objective: str, width: int
) -> None:
    signals = pool_signals()
    projection = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0][:8, :width]
    signals = replace(signals, embeddings=(np.asarray(signals.embeddings) @ projection).astype(np.float32))
    trainer = student_trainer(tmp_path, student_body, signals, None, objective=objective, epochs=8, learning_rate=2e-3)
    trainer.train_embeddings(signals.texts)
    losses = training_module.step_losses(trainer)
    assert len(losses) == 8 * 2
    assert np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_matches_objective(student_body: SentenceTransformer, objective: str) -> None:
    expected_weights = parse_objectives(objective)
    loss = create_loss(loss_inputs(student_body, pool_signals(), objective=objective))
    classes: dict[str, type[BatchLoss]] = {
        "similarity": SimilarityLoss,
        "embedding": EmbeddingLoss,
        "soft-labels": SoftLabelLoss,
    }
    if objective in classes:
        assert isinstance(loss, classes[objective])
        return
    assert isinstance(loss, WeightedSumLoss)
    assert loss.weights == list(expected_weights.values())
    assert all(isinstance(part, classes[name]) for part, name in zip(loss.parts, expected_weights, strict=True))


@pytest.mark.parametrize("spelling", ["pairs=1", " pairs"])
def test_spellings_of_pairs_are_equal(tiny_student: Path, spelling: str) -> None:
    expected, student = (
        train_student(pool_signals(), tiny_student, **{**QUICK, "objective": name}) for name in ("pairs", spelling)
    )
    assert equal_weights(weights(expected), weights(student))


@pytest.mark.parametrize(
    ("objective", "loss_class"), [("embedding", EmbeddingLoss), ("similarity,soft-labels=0.5", SoftLabelLoss)]
)
def test_weights_of_loss_are_trained_and_then_dropped(
    student_body: SentenceTransformer, objective: str, loss_class: type[BatchLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[BatchLoss] = []
    initial: list[dict[str, torch.Tensor]] = []
    names = set(student_body.state_dict())

    def record(inputs: LossInputs) -> BatchLoss:
        losses.append(create_loss(inputs))
        initial.append({name: value.clone() for name, value in losses[0].named_parameters()})
        return losses[0]

    monkeypatch.setattr(trainer_module, "create_loss", record)
    train_student(pool_signals(), student_body, **{**QUICK, "objective": objective})
    own = {name: value for name, value in losses[0].named_parameters() if not name.startswith("model.")}
    own = {name: value for name, value in own.items() if ".model." not in name}
    assert any(isinstance(part, loss_class) for part in losses[0].modules())
    assert own
    assert not any(torch.equal(value, initial[0][name]) for name, value in own.items())
    assert set(student_body.state_dict()) == names


@pytest.mark.parametrize("objective", [*OBJECTIVES, "pairs"])
def test_only_soft_labels_work_without_embeddings(tiny_student: Path, objective: str) -> None:
    signals = without_embeddings(pool_signals())
    settings = {**QUICK, "objective": objective}
    if objective != "soft-labels":
        with pytest.raises(DataError, match="The signals of a rule have no embeddings") as error:
            train_student(signals, "no/such/body", **settings)  # raised before the body is loaded
        assert "--objective soft-labels" in (error.value.hint or "")
        return
    with_embeddings, without = (train_student(s, tiny_student, **settings) for s in (pool_signals(), signals))
    assert equal_weights(weights(with_embeddings), weights(without))


def test_soft_labels_objective_reduces_divergence_from_teacher(tiny_student: Path) -> None:
    signals = without_embeddings(pool_signals())
    before = new_model(load_body(tiny_student), LABEL_NAMES)
    before.model_head = fit_head(embed(before.model_body, signals.texts), signals.probabilities, C=DEFAULT_C)
    settings = {**QUICK, "objective": "soft-labels", "epochs": 6}
    after = train_student(signals, tiny_student, **settings)

    def divergence(model: Any) -> float:
        predicted = predict_proba(model, signals.texts)
        return float((signals.probabilities * np.log(signals.probabilities / predicted)).sum(axis=1).mean())

    assert divergence(after) < divergence(before) / 2


# Initial weights of the losses


@pytest.mark.parametrize("n", [40, 33])
@pytest.mark.parametrize("classes", [2, 3])
def test_soft_label_loss_starts_from_fitted_head(
    student_body: SentenceTransformer, classes: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.student import loss as loss_module

    monkeypatch.setattr(loss_module, "MAX_INIT_TEXTS", 33)
    signals = pool_signals(n, classes)
    loss: Any = create_loss(loss_inputs(student_body, signals, objective="soft-labels", head_c=2.0))
    rows = embed(student_body, signals.texts)
    sample = np.sort(np.random.default_rng([0, 5]).permutation(n)[:33])
    expected = fit_head(rows[sample], signals.probabilities[sample], C=2.0)
    with torch.no_grad():
        logits = loss.head(torch.as_tensor(rows))
    assert logits.shape == (n, classes)
    np.testing.assert_allclose(logits.softmax(dim=1).numpy(), expected.predict_proba(rows), atol=1e-4)
    if classes > 2:
        np.testing.assert_allclose(logits.numpy(), expected.decision_function(rows), atol=1e-3)
    else:
        difference = (logits[:, 1] - logits[:, 0]).numpy()
        np.testing.assert_allclose(difference, expected.decision_function(rows), atol=1e-3)


def test_projection_starts_from_least_squares_fit(student_body: SentenceTransformer) -> None:
    """The student has 16 dimensions, the teacher 8."""
    signals = pool_signals()
    fitted: Any = create_loss(loss_inputs(student_body, signals, objective="embedding"))
    rows, labels = torch.as_tensor(embed(student_body, signals.texts)), torch.arange(len(signals))
    random = EmbeddingLoss(student_body, np.asarray(signals.embeddings), dimension=16)
    with torch.no_grad():
        assert fitted.compute_loss([rows], labels) < 0.5 * random.compute_loss([rows], labels)


def test_settings_are_passed_to_soft_label_loss(student_body: SentenceTransformer) -> None:
    gold = np.where(np.arange(33) < 5, 1, NO_GOLD)
    loss: Any = create_loss(
        loss_inputs(student_body, pool_signals(), objective="soft-labels", temperature=4, alpha=0.25, gold=gold)
    )
    assert (loss.temperature, loss.alpha) == (4, 0.25)
    np.testing.assert_array_equal(loss.gold, gold)
    loss = create_loss(loss_inputs(student_body, pool_signals(), objective="soft-labels"))
    assert loss.gold is None


# Gold labels


def test_gold_labels_are_matched_by_normalized_text() -> None:
    signals = pool_signals(12)
    texts = [f" {signals.texts[7].upper()}\u200b", "a text that is not in the pool", signals.texts[0]]
    expected = np.full(12, NO_GOLD)
    expected[[7, 0]] = 2, 3
    np.testing.assert_array_equal(match_gold_labels(signals, texts, np.array([2, 1, 3])), expected)
    np.testing.assert_array_equal(match_gold_labels(signals, [], np.array([], int)), np.full(12, NO_GOLD))


def shift_labels(labeled: LabeledSet) -> LabeledSet:
    """Replace each label by the next class."""
    return LabeledSet(labeled.texts, (labeled.labels + 1) % len(LABEL_NAMES), LABEL_NAMES)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, True), (0.5, False), (0.0, False)])
def test_alpha_1_ignores_the_teacher_on_texts_with_gold_labels(
    student_body: SentenceTransformer, tmp_path: Path, alpha: float, expected: bool
) -> None:
    signals, labeled = pool_signals(), few_labels(33)
    other_signals = replace(signals, probabilities=np.roll(signals.probabilities, 1, axis=1))
    losses = []
    for s in (signals, other_signals):
        trainer = student_trainer(tmp_path, student_body, s, labeled, objective="soft-labels", alpha=alpha)
        _, module = trainer.get_dataset(s.texts, None, trainer.args)
        loss: Any = module
        loss.init_head(np.zeros((4, 16)), np.arange(4.0))
        rows = torch.arange(33)
        losses.append(loss.compute_loss([torch.as_tensor(embed(student_body, s.texts))], rows).item())
    assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) is expected
    if expected:
        entropies = -torch.log_softmax(torch.arange(4.0), dim=0)[torch.as_tensor(labeled.labels)]
        assert losses[0] == pytest.approx(entropies.mean().item(), rel=1e-5)


def test_gold_labels_change_the_body_unless_alpha_is_0(tiny_student: Path) -> None:
    signals, labeled = pool_signals(), shift_labels(few_labels())
    runs = [
        weights(
            train_student(signals, tiny_student, labeled=gold, **{**QUICK, "objective": "soft-labels", "alpha": alpha})
        )
        for gold, alpha in ((labeled, 0.0), (labeled, 0.9), (None, 0.9))
    ]
    assert equal_weights(runs[0], runs[2])
    assert not equal_weights(runs[0], runs[1])


@pytest.mark.parametrize("objective", ["similarity", "embedding"])
def test_gold_labels_do_not_change_body_with_embedding_losses(tiny_student: Path, objective: str) -> None:
    settings = {**QUICK, "objective": objective}
    without_gold, with_gold = (
        train_student(pool_signals(), tiny_student, labeled=gold, **settings) for gold in (None, few_labels())
    )
    assert equal_weights(weights(without_gold), weights(with_gold))
    assert np.abs(without_gold.model_head.coef_ - with_gold.model_head.coef_).max() > 1e-3


# Head


def head_examples(
    trainer: StudentTrainer, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the texts, labels and weights that the head is fitted on."""
    embedded: list[list[str]] = []
    fitted: list[Any] = []

    def record_texts(body: Any, texts: list[str], **settings: Any) -> Any:
        embedded.append(list(texts))
        return embed(body, texts, **settings)

    def record_fit(rows: Any, probabilities: Any, weights: Any = None, **settings: Any) -> Any:
        fitted.append((probabilities, weights))
        return fit_head(rows, probabilities, weights, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "embed", record_texts)
        patch.setattr(trainer_module, "fit_head", record_fit)
        trainer.train_classifier(trainer.signals.texts)
    [texts], [(probabilities, text_weights)] = embedded, fitted
    assert len(texts) == len(probabilities) == len(text_weights)
    return texts, np.asarray(probabilities), np.asarray(text_weights)


def labels_outside_pool() -> LabeledSet:
    return LabeledSet(["a labeled text only", "and one more"], np.array([2, 0]), LABEL_NAMES)


@pytest.mark.parametrize("gold_weight", [3.0, 0.5])
@pytest.mark.parametrize(
    ("labeled", "n_in_pool"),
    [(few_labels(), 16), (shift_labels(few_labels()), 16), (labels_outside_pool(), 0)],
    ids=["in pool", "shifted", "outside pool"],
)
def test_labeled_texts_are_used_once_with_gold_label_and_weight(
    student_body: SentenceTransformer,
    tmp_path: Path,
    labeled: LabeledSet,
    n_in_pool: int,
    gold_weight: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signals = pool_signals()
    trainer = student_trainer(tmp_path, student_body, signals, labeled, gold_weight=gold_weight)
    texts, probabilities, text_weights = head_examples(trainer, monkeypatch)
    assert len(set(texts)) == len(texts) == 33 - n_in_pool + len(labeled)
    assert set(texts) == {*signals.texts, *labeled.texts}
    gold = dict(zip(labeled.texts, labeled.labels.tolist(), strict=True))
    for text, label, weight in zip(texts, probabilities, text_weights, strict=True):
        assert weight == (gold_weight if text in gold else 1)
        expected = np.eye(4)[gold[text]] if text in gold else signals.probabilities[signals.texts.index(text)]
        np.testing.assert_array_equal(label, expected)


@pytest.mark.parametrize(
    "labeled", [None, shift_labels(few_labels()), labels_outside_pool()], ids=["none", "in pool", "outside pool"]
)
def test_gold_weight_0_uses_soft_labels_only(
    student_body: SentenceTransformer, tmp_path: Path, labeled: LabeledSet | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = pool_signals()
    trainer = student_trainer(tmp_path, student_body, signals, labeled, gold_weight=0)
    texts, probabilities, text_weights = head_examples(trainer, monkeypatch)
    assert texts == signals.texts
    np.testing.assert_array_equal(probabilities, signals.probabilities)
    assert set(text_weights) == {1}


@pytest.mark.parametrize(("gold_weight", "n_gold"), [(3.0, 16), (0.0, 0)])
def test_head_uses_sample_of_large_pool_and_all_labeled_texts(
    student_body: SentenceTransformer, tmp_path: Path, gold_weight: float, n_gold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "MAX_HEAD_TEXTS", 20)
    signals, labeled = pool_signals(90), few_labels()
    samples = []
    for seed in (1, 1, 2):
        trainer = student_trainer(tmp_path, student_body, signals, labeled, gold_weight=gold_weight, seed=seed)
        texts, probabilities, text_weights = head_examples(trainer, monkeypatch)
        assert len(set(texts)) == len(texts) == 20 + n_gold
        if n_gold:
            assert set(labeled.texts) <= set(texts)
        assert (text_weights == 3).sum() == n_gold
        rows = [signals.texts.index(text) for text in texts[:20]]
        np.testing.assert_array_equal(probabilities[:20], signals.probabilities[rows])
        assert max(rows) > 60  # not only the beginning of the pool
        samples.append(rows)
    assert samples[0] == samples[1] != samples[2]


# Body


@pytest.mark.parametrize(("objective", "micro_batch_size"), [("similarity", None), ("soft-labels", 4), ("pairs", None)])
def test_frozen_word_embeddings_do_not_change(
    student_body: SentenceTransformer, objective: str, micro_batch_size: int | None
) -> None:
    before = {name: value.clone() for name, value in student_body.named_parameters()}
    settings = {**QUICK, "objective": objective, "micro_batch_size": micro_batch_size, "freeze_embeddings": True}
    train_student(pool_signals(), student_body, **settings)
    changed = {name: not torch.equal(value, before[name]) for name, value in student_body.named_parameters()}
    [words] = [name for name in changed if "word_embeddings" in name]
    assert not changed.pop(words)
    assert all(value for name, value in changed.items() if "attention.self.value.weight" in name)
    assert any("position_embeddings" in name and value for name, value in changed.items())
    assert all(parameter.requires_grad for parameter in student_body.parameters())
    train_student(pool_signals(), student_body, **QUICK)
    assert not torch.equal(dict(student_body.named_parameters())[words], before[words])


def test_failed_training_restores_requires_grad_of_word_embeddings(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("failed in the first step")

    monkeypatch.setattr(SimilarityLoss, "compute_loss", fail)
    first = next(student_body.parameters())
    for requires_grad in (True, False):
        first.requires_grad_(requires_grad)
        with pytest.raises(RuntimeError, match="failed in the first step"):
            train_student(pool_signals(), student_body, **{**QUICK, "freeze_embeddings": True})
        assert first.requires_grad is requires_grad


def test_freeze_embeddings_is_ignored_without_transformer() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for text in texts_and_labels(33)[0] for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{word: i for i, word in enumerate(words, 1)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    static = StaticEmbedding(tokenizer, embedding_dim=6)
    body = SentenceTransformer(modules=[static, Dense(6, 6)], device="cpu")
    before = [value.clone() for value in body.state_dict().values()]
    model = train_student(pool_signals(), body, **{**QUICK, "freeze_embeddings": True})
    assert not equal_weights(before, weights(model))
    assert predict_proba(model, ["match goal"]).shape == (1, 4)


@pytest.mark.parametrize("objective", ["similarity,soft-labels=0.5", "pairs"])
def test_micro_batches_do_not_change_student(tiny_student: Path, objective: str) -> None:
    settings = {**QUICK, "objective": objective, "learning_rate": 1e-3}
    full_batch, micro_batch = (
        train_student(pool_signals(), tiny_student, **settings, micro_batch_size=size) for size in (None, 4)
    )
    assert not equal_weights(weights(full_batch), list(load_body(tiny_student).state_dict().values()))
    for expected, actual in zip(weights(full_batch), weights(micro_batch), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    texts = pool_signals().texts
    np.testing.assert_allclose(predict_proba(micro_batch, texts), predict_proba(full_batch, texts), atol=1e-3)


@pytest.mark.parametrize("objective", ["in-batch", "pairs"])
def test_micro_batches_do_not_change_teacher(tiny_student: Path, objective: str) -> None:
    settings: dict[str, Any] = {"device": "cpu", "precision": "fp32", "teacher_steps": 3, "teacher_batch_size": 16}
    settings |= {"teacher_objective": objective, "num_iterations": 1}
    full_batch, micro_batch = (
        train_teacher(few_labels(), tiny_student, **settings, teacher_learning_rate=1e-3, micro_batch_size=size)
        for size in (None, 4)
    )
    assert not equal_weights(weights(full_batch), list(load_body(tiny_student).state_dict().values()))
    for expected, actual in zip(weights(full_batch), weights(micro_batch), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_micro_batch_size_limits_forward_passes(
    student_body: SentenceTransformer, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = BatchLoss._encode

    def record(self: BatchLoss, features: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(features["input_ids"]))
        return encode(self, features)

    monkeypatch.setattr(BatchLoss, "_encode", record)
    if stage == "student":
        train_student(pool_signals(), student_body, **QUICK, micro_batch_size=5)
    else:
        train_teacher(few_labels(), student_body, device="cpu", precision="fp32", teacher_steps=1, micro_batch_size=5)
    assert max(sizes) == 5
