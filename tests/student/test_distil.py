"""Students: what each objective makes of the signals, what gold labels do, and what stays untouched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from synthetic import NAMES, QUICK, few_labels, pool_signals, same, texts_and_labels, weights

from setfit_kd import TeacherSignals, train_student, train_teacher
from setfit_kd.config import StudentConfig, parse_objectives
from setfit_kd.data import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.losses import (
    NO_GOLD,
    BatchLoss,
    EmbeddingLoss,
    SimilarityLoss,
    SoftLabelLoss,
    WeightedSumLoss,
)
from setfit_kd.memory import resolve_device
from setfit_kd.models import embed, fit_head, load_body, new_model, predict_proba
from setfit_kd.models.heads import DEFAULT_C
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


def given(body: SentenceTransformer, signals: TeacherSignals, **settings: Any) -> LossInputs:
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
def test_every_objective_trains_whatever_the_widths(
    student_body: SentenceTransformer, tmp_path: Path, objective: str, width: int
) -> None:
    signals = pool_signals()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0][:8, :width]
    signals = replace(signals, embeddings=(np.asarray(signals.embeddings) @ turn).astype(np.float32))
    trainer = student_trainer(tmp_path, student_body, signals, None, objective=objective, epochs=8, learning_rate=2e-3)
    trainer.train_embeddings(signals.texts)
    losses = training_module.step_losses(trainer)
    assert len(losses) == 8 * 2
    assert np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_weighted_sum_is_what_was_written(student_body: SentenceTransformer, objective: str) -> None:
    weights_of = parse_objectives(objective)
    made = create_loss(given(student_body, pool_signals(), objective=objective))
    kinds: dict[str, type[BatchLoss]] = {
        "similarity": SimilarityLoss,
        "embedding": EmbeddingLoss,
        "soft-labels": SoftLabelLoss,
    }
    if objective in kinds:
        assert isinstance(made, kinds[objective])
        return
    assert isinstance(made, WeightedSumLoss)
    assert made.weights == list(weights_of.values())
    assert all(isinstance(part, kinds[name]) for part, name in zip(made.parts, weights_of, strict=True))


@pytest.mark.parametrize("written", ["pairs=1", " pairs"])
def test_pairs_are_pairs_however_they_are_written(tiny_student: Path, written: str) -> None:
    one, other = (
        train_student(pool_signals(), tiny_student, **{**QUICK, "objective": name}) for name in ("pairs", written)
    )
    assert same(weights(one), weights(other))


@pytest.mark.parametrize(
    ("objective", "kind"), [("embedding", EmbeddingLoss), ("similarity,soft-labels=0.5", SoftLabelLoss)]
)
def test_what_an_objective_owns_is_trained_beside_the_body_and_dropped_after(
    student_body: SentenceTransformer, objective: str, kind: type[BatchLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[BatchLoss] = []
    start: list[dict[str, torch.Tensor]] = []
    names = set(student_body.state_dict())

    def record(given: LossInputs) -> BatchLoss:
        made.append(create_loss(given))
        start.append({name: value.clone() for name, value in made[0].named_parameters()})
        return made[0]

    monkeypatch.setattr(trainer_module, "create_loss", record)
    train_student(pool_signals(), student_body, **{**QUICK, "objective": objective})
    own = {name: value for name, value in made[0].named_parameters() if not name.startswith("model.")}
    own = {name: value for name, value in own.items() if ".model." not in name}
    assert any(isinstance(part, kind) for part in made[0].modules())
    assert own
    assert not any(torch.equal(value, start[0][name]) for name, value in own.items())
    assert set(student_body.state_dict()) == names


@pytest.mark.parametrize("objective", [*OBJECTIVES, "pairs"])
def test_signals_without_embeddings_will_do_for_soft_labels_alone(tiny_student: Path, objective: str) -> None:
    signals = without_embeddings(pool_signals())
    settings = {**QUICK, "objective": objective}
    if objective != "soft-labels":
        with pytest.raises(DataError, match="The signals of a rule hold no embeddings") as error:
            train_student(signals, "no/such/body", **settings)  # told before anything is loaded
        assert "--objective soft-labels" in (error.value.hint or "")
        return
    with_them, without = (train_student(s, tiny_student, **settings) for s in (pool_signals(), signals))
    assert same(weights(with_them), weights(without))


def test_soft_labels_teach_the_teachers_classes(tiny_student: Path) -> None:
    signals = without_embeddings(pool_signals())
    before = new_model(load_body(tiny_student), NAMES)
    before.model_head = fit_head(embed(before.model_body, signals.texts), signals.probabilities, C=DEFAULT_C)
    settings = {**QUICK, "objective": "soft-labels", "epochs": 6}
    after = train_student(signals, tiny_student, **settings)

    def divergence(model: Any) -> float:
        said = predict_proba(model, signals.texts)
        return float((signals.probabilities * np.log(signals.probabilities / said)).sum(axis=1).mean())

    assert divergence(after) < divergence(before) / 2


# The head that soft labels start from


@pytest.mark.parametrize("n", [40, 33])
@pytest.mark.parametrize("classes", [2, 3])
def test_soft_labels_start_from_a_fitted_head(
    student_body: SentenceTransformer, classes: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.student import loss as objective_module

    monkeypatch.setattr(objective_module, "START_TEXTS", 33)
    signals = pool_signals(n, classes)
    made: Any = create_loss(given(student_body, signals, objective="soft-labels", head_c=2.0))
    rows = embed(student_body, signals.texts)
    drawn = np.sort(np.random.default_rng([0, 5]).permutation(n)[:33])
    expected = fit_head(rows[drawn], signals.probabilities[drawn], C=2.0)
    with torch.no_grad():
        logits = made.head(torch.as_tensor(rows))
    assert logits.shape == (n, classes)
    np.testing.assert_allclose(logits.softmax(dim=1).numpy(), expected.predict_proba(rows), atol=1e-4)
    if classes > 2:
        np.testing.assert_allclose(logits.numpy(), expected.decision_function(rows), atol=1e-3)
    else:
        difference = (logits[:, 1] - logits[:, 0]).numpy()
        np.testing.assert_allclose(difference, expected.decision_function(rows), atol=1e-3)


def test_a_projection_starts_where_it_fits_best(student_body: SentenceTransformer) -> None:
    """The student has 16 dimensions, the teacher 8."""
    signals = pool_signals()
    started: Any = create_loss(given(student_body, signals, objective="embedding"))
    rows, labels = torch.as_tensor(embed(student_body, signals.texts)), torch.arange(len(signals))
    random = EmbeddingLoss(student_body, np.asarray(signals.embeddings), dimension=16)
    with torch.no_grad():
        assert started.loss([rows], labels) < 0.5 * random.loss([rows], labels)


def test_the_settings_reach_the_soft_labels(student_body: SentenceTransformer) -> None:
    gold = np.where(np.arange(33) < 5, 1, NO_GOLD)
    made: Any = create_loss(
        given(student_body, pool_signals(), objective="soft-labels", temperature=4, alpha=0.25, gold=gold)
    )
    assert (made.temperature, made.alpha) == (4, 0.25)
    np.testing.assert_array_equal(made.gold, gold)
    made = create_loss(given(student_body, pool_signals(), objective="soft-labels"))
    assert made.gold is None


# Gold labels


def test_gold_labels_are_found_by_their_texts() -> None:
    signals = pool_signals(12)
    texts = [f" {signals.texts[7].upper()}\u200b", "a text that is nowhere in the pool", signals.texts[0]]
    expected = np.full(12, NO_GOLD)
    expected[[7, 0]] = 2, 3
    np.testing.assert_array_equal(match_gold_labels(signals, texts, np.array([2, 1, 3])), expected)
    np.testing.assert_array_equal(match_gold_labels(signals, [], np.array([], int)), np.full(12, NO_GOLD))


def turned(labeled: LabeledSet) -> LabeledSet:
    """The same texts with the labels of their neighbours."""
    return LabeledSet(labeled.texts, (labeled.labels + 1) % len(NAMES), NAMES)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, True), (0.5, False), (0.0, False)])
def test_with_gold_throughout_and_alpha_1_the_teacher_has_no_say(
    student_body: SentenceTransformer, tmp_path: Path, alpha: float, expected: bool
) -> None:
    signals, labeled = pool_signals(), few_labels(33)
    other = replace(signals, probabilities=np.roll(signals.probabilities, 1, axis=1))
    losses = []
    for s in (signals, other):
        trainer = student_trainer(tmp_path, student_body, s, labeled, objective="soft-labels", alpha=alpha)
        _, loss = trainer.get_dataset(s.texts, None, trainer.args)
        objective: Any = loss
        objective.start_from(np.zeros((4, 16)), np.arange(4.0))
        rows = torch.arange(33)
        losses.append(objective.loss([torch.as_tensor(embed(student_body, s.texts))], rows).item())
    assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) is expected
    if expected:
        entropies = -torch.log_softmax(torch.arange(4.0), dim=0)[torch.as_tensor(labeled.labels)]
        assert losses[0] == pytest.approx(entropies.mean().item(), rel=1e-5)


def test_gold_labels_change_the_body_by_their_share(tiny_student: Path) -> None:
    signals, labeled = pool_signals(), turned(few_labels())
    trained = [
        weights(
            train_student(signals, tiny_student, labeled=gold, **{**QUICK, "objective": "soft-labels", "alpha": alpha})
        )
        for gold, alpha in ((labeled, 0.0), (labeled, 0.9), (None, 0.9))
    ]
    assert same(trained[0], trained[2])
    assert not same(trained[0], trained[1])


@pytest.mark.parametrize("objective", ["similarity", "embedding"])
def test_gold_labels_leave_the_geometry_alone(tiny_student: Path, objective: str) -> None:
    settings = {**QUICK, "objective": objective}
    one, other = (
        train_student(pool_signals(), tiny_student, labeled=gold, **settings) for gold in (None, few_labels())
    )
    assert same(weights(one), weights(other))
    assert np.abs(one.model_head.coef_ - other.model_head.coef_).max() > 1e-3


# The head


def head_examples(
    trainer: StudentTrainer, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], npt.NDArray[Any], npt.NDArray[Any]]:
    """The texts, labels and weights that the head is fitted on."""
    embedded: list[list[str]] = []
    fitted: list[Any] = []

    def record_texts(body: Any, texts: list[str], **settings: Any) -> Any:
        embedded.append(list(texts))
        return embed(body, texts, **settings)

    def record_fit(rows: Any, probabilities: Any, mass: Any = None, **settings: Any) -> Any:
        fitted.append((probabilities, mass))
        return fit_head(rows, probabilities, mass, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "embed", record_texts)
        patch.setattr(trainer_module, "fit_head", record_fit)
        trainer.train_classifier(trainer.signals.texts)
    [texts], [(probabilities, mass)] = embedded, fitted
    assert len(texts) == len(probabilities) == len(mass)
    return texts, np.asarray(probabilities), np.asarray(mass)


def outsiders() -> LabeledSet:
    return LabeledSet(["a text of the labels alone", "and one more"], np.array([2, 0]), NAMES)


@pytest.mark.parametrize("gold_weight", [3.0, 0.5])
@pytest.mark.parametrize(
    ("labeled", "within"),
    [(few_labels(), 16), (turned(few_labels()), 16), (outsiders(), 0)],
    ids=["in", "turned", "out"],
)
def test_labeled_texts_count_once_with_their_gold_label_and_weight(
    student_body: SentenceTransformer,
    tmp_path: Path,
    labeled: LabeledSet,
    within: int,
    gold_weight: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signals = pool_signals()
    trainer = student_trainer(tmp_path, student_body, signals, labeled, gold_weight=gold_weight)
    texts, probabilities, mass = head_examples(trainer, monkeypatch)
    assert len(set(texts)) == len(texts) == 33 - within + len(labeled)
    assert set(texts) == {*signals.texts, *labeled.texts}
    gold = dict(zip(labeled.texts, labeled.labels.tolist(), strict=True))
    for text, said, weight in zip(texts, probabilities, mass, strict=True):
        assert weight == (gold_weight if text in gold else 1)
        expected = np.eye(4)[gold[text]] if text in gold else signals.probabilities[signals.texts.index(text)]
        np.testing.assert_array_equal(said, expected)


@pytest.mark.parametrize("labeled", [None, turned(few_labels()), outsiders()], ids=["none", "in", "out"])
def test_a_gold_weight_of_0_leaves_the_soft_labels_alone(
    student_body: SentenceTransformer, tmp_path: Path, labeled: LabeledSet | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = pool_signals()
    trainer = student_trainer(tmp_path, student_body, signals, labeled, gold_weight=0)
    texts, probabilities, mass = head_examples(trainer, monkeypatch)
    assert texts == signals.texts
    np.testing.assert_array_equal(probabilities, signals.probabilities)
    assert set(mass) == {1}


@pytest.mark.parametrize(("gold_weight", "gold"), [(3.0, 16), (0.0, 0)])
def test_the_head_takes_a_part_of_a_large_pool_and_all_labeled_texts(
    student_body: SentenceTransformer, tmp_path: Path, gold_weight: float, gold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "HEAD_TEXTS", 20)
    signals, labeled = pool_signals(90), few_labels()
    drawn = []
    for seed in (1, 1, 2):
        trainer = student_trainer(tmp_path, student_body, signals, labeled, gold_weight=gold_weight, seed=seed)
        texts, probabilities, mass = head_examples(trainer, monkeypatch)
        assert len(set(texts)) == len(texts) == 20 + gold
        if gold:
            assert set(labeled.texts) <= set(texts)
        assert (mass == 3).sum() == gold
        rows = [signals.texts.index(text) for text in texts[:20]]
        np.testing.assert_array_equal(probabilities[:20], signals.probabilities[rows])
        assert max(rows) > 60  # not the beginning of the pool
        drawn.append(rows)
    assert drawn[0] == drawn[1] != drawn[2]


# The body


@pytest.mark.parametrize(("objective", "micro_batch_size"), [("similarity", None), ("soft-labels", 4), ("pairs", None)])
def test_frozen_word_embeddings_stay_and_the_rest_moves(
    student_body: SentenceTransformer, objective: str, micro_batch_size: int | None
) -> None:
    before = {name: value.clone() for name, value in student_body.named_parameters()}
    settings = {**QUICK, "objective": objective, "micro_batch_size": micro_batch_size, "freeze_embeddings": True}
    train_student(pool_signals(), student_body, **settings)
    moved = {name: not torch.equal(value, before[name]) for name, value in student_body.named_parameters()}
    [words] = [name for name in moved if "word_embeddings" in name]
    assert not moved.pop(words)
    assert all(changed for name, changed in moved.items() if "attention.self.value.weight" in name)
    assert any("position_embeddings" in name and changed for name, changed in moved.items())
    assert all(parameter.requires_grad for parameter in student_body.parameters())
    train_student(pool_signals(), student_body, **QUICK)
    assert not torch.equal(dict(student_body.named_parameters())[words], before[words])


def test_word_embeddings_are_as_free_as_before_after_a_training_that_failed(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the first step")

    monkeypatch.setattr(SimilarityLoss, "loss", fail)
    first = next(student_body.parameters())
    for free in (True, False):
        first.requires_grad_(free)
        with pytest.raises(RuntimeError, match="in the first step"):
            train_student(pool_signals(), student_body, **{**QUICK, "freeze_embeddings": True})
        assert first.requires_grad is free


def test_a_body_without_word_embeddings_has_none_to_freeze() -> None:
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
    assert not same(before, weights(model))
    assert predict_proba(model, ["match goal"]).shape == (1, 4)


@pytest.mark.parametrize("objective", ["similarity,soft-labels=0.5", "pairs"])
def test_micro_batches_train_the_same_student(tiny_student: Path, objective: str) -> None:
    settings = {**QUICK, "objective": objective, "learning_rate": 1e-3}
    whole, by_parts = (
        train_student(pool_signals(), tiny_student, **settings, micro_batch_size=size) for size in (None, 4)
    )
    assert not same(weights(whole), list(load_body(tiny_student).state_dict().values()))
    for one, other in zip(weights(whole), weights(by_parts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    here, there = (predict_proba(model, pool_signals().texts) for model in (whole, by_parts))
    np.testing.assert_allclose(here, there, atol=1e-3)


@pytest.mark.parametrize("objective", ["in-batch", "pairs"])
def test_micro_batches_train_the_same_teacher(tiny_student: Path, objective: str) -> None:
    settings: dict[str, Any] = {"device": "cpu", "precision": "fp32", "teacher_steps": 3, "teacher_batch_size": 16}
    settings |= {"teacher_objective": objective, "num_iterations": 1}
    whole, by_parts = (
        train_teacher(few_labels(), tiny_student, **settings, teacher_learning_rate=1e-3, micro_batch_size=size)
        for size in (None, 4)
    )
    assert not same(weights(whole), list(load_body(tiny_student).state_dict().values()))
    for one, other in zip(weights(whole), weights(by_parts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_micro_batches_are_what_passes_through_the_body(
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
