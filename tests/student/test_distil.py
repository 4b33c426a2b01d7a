"""Distillation: objectives, initial weights of the losses, gold labels, the head and frozen embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from synthetic import LABEL_NAMES, QUICK, equal_weights, few_labels, pool_signals, weights

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
from setfit_kd.models.encode import embed
from setfit_kd.models.heads import balanced_weights, fit_head
from setfit_kd.models.io import new_model
from setfit_kd.student import trainer as trainer_module
from setfit_kd.student.loss import LossInputs, create_loss, match_labeled_texts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd.student.trainer import StudentTrainer

LOSSES: dict[str, type[BatchLoss]] = {
    "similarity": SimilarityLoss,
    "embedding": EmbeddingLoss,
    "soft-labels": SoftLabelLoss,
}


def student_trainer(
    folder: Path, body: SentenceTransformer, signals: TeacherSignals, labeled: LabeledSet | None, **settings: Any
) -> StudentTrainer:
    config = StudentConfig.of(**{**QUICK, **settings})
    model = new_model(body, signals.label_names)
    return trainer_module.StudentTrainer(model, signals, labeled, config, resolve_device("cpu"), str(folder))


def make_loss(body: SentenceTransformer, signals: TeacherSignals, gold: Any = None, **settings: Any) -> Any:
    config = StudentConfig.of(**{**QUICK, **settings}).with_family_defaults("setfit")
    gold = np.full(len(signals), NO_GOLD) if gold is None else gold
    return create_loss(LossInputs(body, signals, np.arange(len(signals)), gold, few_labels(), config))


# Objectives


@pytest.mark.parametrize(
    ("objective", "width"),
    [("similarity", 8), ("embedding", 8), ("embedding", 16), ("embedding=0.5,similarity,soft-labels", 24)],
)
def test_objectives_train_with_teachers_of_any_width(
    student_body: SentenceTransformer, objective: str, width: int
) -> None:
    signals = pool_signals()
    projection = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0][:8, :width]
    signals = replace(signals, embeddings=(np.asarray(signals.embeddings) @ projection).astype(np.float32))
    settings = {**QUICK, "objective": objective, "epochs": 8, "learning_rate": 2e-3}
    losses = train_student(signals, student_body, **settings).loss_curve_
    assert len(losses) == 8 * 2
    assert np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])


def test_loss_matches_objective(student_body: SentenceTransformer) -> None:
    for name, loss_class in LOSSES.items():
        assert isinstance(make_loss(student_body, pool_signals(), objective=name), loss_class)
    for objective, expected in (("similarity=2", [2]), ("embedding=0.5,similarity,soft-labels", [0.5, 1, 1])):
        loss = make_loss(student_body, pool_signals(), objective=objective)
        assert isinstance(loss, WeightedSumLoss)
        assert loss.weights == expected
        assert [type(part) for part in loss.parts] == [LOSSES[name] for name in parse_objectives(objective)]


@pytest.mark.parametrize("objective", ["embedding", "similarity,soft-labels=0.5"])
def test_weights_of_loss_are_trained_and_then_dropped(
    student_body: SentenceTransformer, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[BatchLoss] = []
    initial: dict[str, torch.Tensor] = {}
    names = set(student_body.state_dict())

    def record(inputs: LossInputs) -> BatchLoss:
        losses.append(create_loss(inputs))
        initial.update({name: value.clone() for name, value in losses[0].named_parameters()})
        return losses[0]

    monkeypatch.setattr(trainer_module, "create_loss", record)
    train_student(pool_signals(), student_body, **{**QUICK, "objective": objective})
    own = {name: value for name, value in losses[0].named_parameters() if ".model." not in f".{name}"}
    assert own
    assert not any(torch.equal(value, initial[name]) for name, value in own.items())
    assert set(student_body.state_dict()) == names


def test_only_soft_labels_work_without_embeddings(tiny_student: Path) -> None:
    signals = replace(pool_signals(), embeddings=None, origin="a rule")
    for objective in ("similarity", "embedding=0.5,soft-labels", "pairs"):
        with pytest.raises(DataError, match="The signals of a rule have no embeddings") as error:
            train_student(signals, "no/such/body", **{**QUICK, "objective": objective})  # before the body is loaded
        assert "--objective soft-labels" in (error.value.hint or "")
    settings = {**QUICK, "objective": "soft-labels"}
    trained = (train_student(s, tiny_student, **settings) for s in (pool_signals(), signals))
    assert equal_weights(*map(weights, trained))


def test_spellings_of_pairs_are_equal() -> None:
    assert [StudentConfig.of(objective=name).objective for name in ("pairs=1", " pairs")] == ["pairs"] * 2


# Initial weights of the losses


@pytest.mark.parametrize(("n", "classes"), [(40, 2), (33, 3)])
def test_soft_label_loss_starts_from_fitted_head(
    student_body: SentenceTransformer, classes: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.student.loss.MAX_INIT_TEXTS", 33)
    signals = pool_signals(n, classes)
    loss = make_loss(student_body, signals, objective="soft-labels", head_c=2.0)
    rows = embed(student_body, signals.texts)
    sample = np.sort(np.random.default_rng([0, 5]).permutation(n)[:33])
    expected = fit_head(rows[sample], signals.probabilities[sample], C=2.0)
    with torch.no_grad():
        logits = loss.head(torch.as_tensor(rows))
    assert logits.shape == (n, classes)
    np.testing.assert_allclose(logits.softmax(dim=1).numpy(), expected.predict_proba(rows), atol=1e-4)
    decision = logits if classes > 2 else logits[:, 1] - logits[:, 0]
    np.testing.assert_allclose(decision.numpy(), expected.decision_function(rows), atol=1e-3)


def test_projection_starts_from_least_squares_fit(student_body: SentenceTransformer) -> None:
    """The student has 16 dimensions, the teacher 8."""
    signals = pool_signals()
    fitted = make_loss(student_body, signals, objective="embedding")
    rows, labels = torch.as_tensor(embed(student_body, signals.texts)), torch.arange(len(signals))
    random = EmbeddingLoss(student_body, np.asarray(signals.embeddings), dimension=16)
    with torch.no_grad():
        assert fitted.compute_loss([rows], labels) < 0.5 * random.compute_loss([rows], labels)


def test_settings_are_passed_to_soft_label_loss(student_body: SentenceTransformer) -> None:
    gold = np.where(np.arange(33) < 5, 1, NO_GOLD)
    loss = make_loss(student_body, pool_signals(), gold, objective="soft-labels", temperature=4, alpha=0.25)
    assert (loss.temperature, loss.alpha) == (4, 0.25)
    np.testing.assert_array_equal(loss.gold, gold)
    assert make_loss(student_body, pool_signals(), objective="soft-labels").gold is None


# Gold labels


def test_gold_labels_are_matched_by_normalized_text() -> None:
    signals = pool_signals(12)
    texts = [f" {signals.texts[7].upper()}\u200b", "a text that is not in the pool", signals.texts[0]]
    expected = np.full(12, NO_GOLD)
    expected[[7, 0]] = 0, 2
    labeled = LabeledSet(texts, np.array([2, 1, 3]), LABEL_NAMES)
    np.testing.assert_array_equal(match_labeled_texts(signals, labeled), expected)


def test_other_classes_than_the_teacher_are_refused(tiny_student: Path) -> None:
    labeled = replace(few_labels(), label_names=LABEL_NAMES[::-1])
    with pytest.raises(DataError, match=r"The classes must be the teacher's \(sports, .*\), got computing, "):
        train_student(pool_signals(), tiny_student, labeled=labeled, **QUICK)


def shift_labels(labeled: LabeledSet) -> LabeledSet:
    """Replace each label by the next class."""
    return replace(labeled, labels=(labeled.labels + 1) % len(LABEL_NAMES))


@pytest.mark.parametrize(
    ("objective", "alpha", "is_equal"),
    [("soft-labels", 0.9, False), ("soft-labels", 0.0, True), ("similarity", 0.9, True)],
)
def test_gold_labels_change_the_body_only_with_soft_labels_and_alpha(
    tiny_student: Path, objective: str, alpha: float, is_equal: bool
) -> None:
    settings = {**QUICK, "objective": objective, "alpha": alpha}
    without_gold, with_gold = (
        train_student(pool_signals(), tiny_student, labeled=gold, **settings)
        for gold in (None, shift_labels(few_labels()))
    )
    assert equal_weights(weights(without_gold), weights(with_gold)) is is_equal
    assert np.abs(without_gold.model_head.coef_ - with_gold.model_head.coef_).max() > 1e-3


IN_POOL = shift_labels(few_labels())
LABELED = LabeledSet([*IN_POOL.texts, "a labeled text only"], np.append(IN_POOL.labels, 2), LABEL_NAMES)


@pytest.mark.parametrize(("labeled", "gold_weight"), [(None, 3.0), (LABELED, 0.5), (LABELED, 0)])
def test_labeled_texts_are_used_once_with_gold_label_and_weight(
    student_body: SentenceTransformer, tmp_path: Path, labeled: LabeledSet | None, gold_weight: float
) -> None:
    signals = pool_signals()
    trainer = student_trainer(tmp_path, student_body, signals, labeled, gold_weight=gold_weight)
    texts, probabilities, text_weights = trainer._head_examples()
    gold = {}
    if labeled is not None and gold_weight:
        gold = dict(zip(labeled.texts, labeled.labels.tolist(), strict=True))
    assert sorted(texts) == sorted({*signals.texts, *gold})
    for text, label, weight in zip(texts, probabilities, text_weights, strict=True):
        assert weight == (gold_weight if text in gold else 1)
        expected = np.eye(4)[gold[text]] if text in gold else signals.probabilities[signals.texts.index(text)]
        np.testing.assert_array_equal(label, expected)


@pytest.mark.parametrize(("balance", "labeled"), [(0.5, LABELED), (0, LABELED), (0.5, None)])
def test_rare_classes_are_weighted_by_the_number_of_labels(
    student_body: SentenceTransformer, balance: float, labeled: LabeledSet | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Mock(side_effect=fit_head)
    monkeypatch.setattr(trainer_module, "fit_head", fit)
    train_student(pool_signals(), student_body, labeled=labeled, **QUICK, balance=balance)
    expected = None if labeled is None else balanced_weights(labeled.counts, balance)
    assert (expected is not None) is (balance > 0 and labeled is not None)
    np.testing.assert_array_equal(fit.call_args.kwargs.get("class_weights"), expected)


def test_head_uses_sample_of_large_pool_and_all_labeled_texts(
    student_body: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "MAX_HEAD_TEXTS", 20)
    signals, labeled = pool_signals(90), few_labels()
    samples = []
    for seed in (1, 1, 2):
        texts, *_ = student_trainer(tmp_path, student_body, signals, labeled, seed=seed)._head_examples()
        assert len(set(texts)) == len(texts) == 20 + len(labeled)
        assert texts[20:] == labeled.texts
        samples.append([signals.texts.index(text) for text in texts[:20]])
    assert max(samples[0]) > 60  # not only the beginning of the pool
    assert samples[0] == samples[1] != samples[2]


# Body


@pytest.mark.parametrize("objective", ["similarity", "pairs"])
def test_frozen_word_embeddings_do_not_change(student_body: SentenceTransformer, objective: str) -> None:
    before = {name: value.clone() for name, value in student_body.named_parameters()}
    settings = {**QUICK, "objective": objective, "freeze_embeddings": True}
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
    monkeypatch.setattr(SimilarityLoss, "compute_loss", Mock(side_effect=RuntimeError("failed in the first step")))
    first = next(student_body.parameters())
    for requires_grad in (True, False):
        first.requires_grad_(requires_grad)
        with pytest.raises(RuntimeError, match="failed in the first step"):
            train_student(pool_signals(), student_body, **{**QUICK, "freeze_embeddings": True})
        assert first.requires_grad is requires_grad


def test_micro_batch_size_limits_forward_passes(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = BatchLoss._encode

    def record(self: BatchLoss, features: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(features["input_ids"]))
        return encode(self, features)

    monkeypatch.setattr(BatchLoss, "_encode", record)
    for objective in ("similarity", "pairs"):
        train_student(pool_signals(), tiny_student, **{**QUICK, "objective": objective, "micro_batch_size": 5})
    settings: dict[str, Any] = {"device": "cpu", "precision": "fp32", "teacher_steps": 1, "teacher_batch_size": 16}
    for objective in ("in-batch", "pairs"):
        train_teacher(few_labels(), tiny_student, teacher_objective=objective, micro_batch_size=5, **settings)
    assert max(sizes) == 5
