"""Early stopping: what is held out, when training ends, and which weights stay."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import NAMES, QUICK, few_labels, pool_signals, same, weights

from setfit_kd import train_student
from setfit_kd.config import StudentConfig
from setfit_kd.memory import resolve_device
from setfit_kd.models import embed, fit_head, new_model
from setfit_kd.models.heads import DEFAULT_C
from setfit_kd.student import agreement as early
from setfit_kd.student import steps
from setfit_kd.student.agreement import AgreementCallback, hold_out, soft_agreement
from setfit_kd.student.steps import MAX_HELD_OUT, MIN_HELD_OUT

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

POOL = 64
OBJECTIVES = ["similarity", "embedding", "soft-labels", "similarity,soft-labels=0.5", "pairs"]

few = settings(max_examples=50, deadline=None, derandomize=True)


@few
@given(st.integers(2, 20_000), st.integers(0, 2**32 - 1))
def test_what_is_held_out_and_what_is_not_make_the_pool(n: int, seed: int) -> None:
    training, held_out = hold_out(n, seed=seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), np.arange(n))
    for rows in (training, held_out):
        assert len(rows)
        assert (np.diff(rows) > 0).all()
    again = hold_out(n, seed=seed)
    np.testing.assert_array_equal(training, again[0])
    np.testing.assert_array_equal(held_out, again[1])


@few
@given(st.integers(2, 300), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_texts_with_a_gold_label_are_held_out_last(n: int, share: float, seed: int) -> None:
    spared = np.random.default_rng(seed).random(n) < share
    training, held_out = hold_out(n, seed=seed, spared=spared)
    assert len(held_out) == len(hold_out(n, seed=seed)[1])
    assert spared[held_out].sum() == max(0, len(held_out) - (~spared).sum())
    np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), np.arange(n))


@few
@given(st.integers(1, 3000), st.integers(1, 4))
def test_looks_are_evenly_spaced_and_end_every_pass(steps_in_pass: int, passes: int) -> None:
    looks: list[int] = []
    arguments, state = SimpleNamespace(num_train_epochs=passes), SimpleNamespace(max_steps=passes * steps_in_pass)
    for step in range(1, passes * steps_in_pass + 1):
        if AgreementCallback.is_due(SimpleNamespace(), step, arguments, state):  # type: ignore[arg-type]
            looks.append(step)
    assert set(range(steps_in_pass, passes * steps_in_pass + 1, steps_in_pass)) <= set(looks)
    gaps = np.diff([0, *looks])
    assert gaps.max() - gaps.min() <= 1
    assert gaps.max() <= 750
    assert gaps.min() >= min(steps_in_pass, 333)


@pytest.mark.parametrize(
    ("n", "count"),
    [(2, 1), (3, 1), (20, 10), (32, 16), (100, MIN_HELD_OUT), (1000, 100), (5000, MAX_HELD_OUT), (10**6, 500)],
)
def test_a_tenth_is_held_out_within_limits(n: int, count: int) -> None:
    assert [len(rows) for rows in hold_out(n, seed=0)] == [n - count, count]


def test_another_seed_holds_out_others() -> None:
    held_out = [set(hold_out(1000, seed=seed)[1].tolist()) for seed in range(4)]
    assert len(set.union(*held_out)) > 300
    assert max(held_out[0]) > 800  # not the beginning of the pool


def test_soft_agreement_is_the_mean_shared_probability() -> None:
    teacher = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], np.float32)
    student = np.array([[0.2, 0.3, 0.5], [0.25, 0.5, 0.25]], np.float32)
    assert soft_agreement(teacher, student) == pytest.approx((0.7 + 0.25) / 2)
    assert soft_agreement(teacher, teacher) == pytest.approx(1)
    assert soft_agreement(teacher[1:], np.array([[0.0, 0.5, 0.5]])) == 0


@few
@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_soft_agreement_is_one_minus_the_total_variation(seed: int, classes: int) -> None:
    one, other = np.random.default_rng(seed).dirichlet(np.ones(classes), size=(2, 7))
    expected = 1 - np.abs(one - other).sum(axis=1).mean() / 2
    assert soft_agreement(one, other) == pytest.approx(expected)
    assert soft_agreement(other, one) == pytest.approx(expected)


# In training


class Script:
    """Agreements told beforehand in the place of those measured, with the body's weights at each look."""

    def __init__(self, body: SentenceTransformer, agreements: list[float]) -> None:
        self.body = body
        self.agreements = agreements
        self.looks: list[list[torch.Tensor]] = []

    def __call__(self, teacher: Any, student: Any) -> float:
        assert teacher.shape == student.shape == (MIN_HELD_OUT, len(NAMES))
        self.looks.append([value.clone() for value in self.body.state_dict().values()])
        return self.agreements[len(self.looks) - 1]


@pytest.mark.parametrize(
    ("patience", "agreements", "looks", "best"),
    [
        pytest.param(1, [0.5, 0.4, 0.9, 0.9], 2, 0, id="the first is the best"),
        pytest.param(2, [0.1, 0.5, 0.3, 0.4, 0.9], 4, 1, id="patience runs out"),
        pytest.param(2, [0.1, 0.5, 0.3, 0.6, 0.5, 0.6], 6, 3, id="better in time, as good is no better"),
        pytest.param(3, [0.1, 0.2, 0.3, 0.4], 4, 3, id="better to the end"),
        pytest.param(9, [0.3, 0.2, 0.1], 3, 0, id="the end comes first"),
        pytest.param(1, [0.0, 0.0], 2, 0, id="no agreement at all"),
    ],
)
def test_training_stops_and_goes_back_to_the_best_look(
    student_body: SentenceTransformer,
    monkeypatch: pytest.MonkeyPatch,
    patience: int,
    agreements: list[float],
    looks: int,
    best: int,
) -> None:
    script = Script(student_body, agreements)
    monkeypatch.setattr(early, "soft_agreement", script)
    signals = pool_signals(POOL)
    model = train_student(
        signals, student_body, **{**QUICK, "patience": patience, "epochs": len(agreements), "batch_size": 24}
    )
    assert len(script.looks) == looks
    assert all(not same(script.looks[i], script.looks[i + 1]) for i in range(looks - 1))
    assert same(weights(model), script.looks[best])
    # The head is fitted on the weights that stay, and on the whole pool; at what temperature is another matter.
    expected = fit_head(embed(student_body, signals.texts), signals.probabilities, C=DEFAULT_C)
    found, wanted = (head.coef_ / np.linalg.norm(head.coef_) for head in (model.model_head, expected))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert not student_body.training


def test_looks_come_within_a_long_pass_too(student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(student_body, [0.1, 0.2, 0.3, 0.4])
    monkeypatch.setattr(early, "soft_agreement", script)
    monkeypatch.setattr(steps, "EVALUATION_STEPS", 2)
    train_student(pool_signals(POOL), student_body, **{**QUICK, "patience": 9, "batch_size": 8})
    assert len(script.looks) == 3  # after steps 2, 4 and 6 of 6


def test_what_a_look_measures(student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    signals = pool_signals(POOL)
    training, held_out = hold_out(POOL, seed=3)
    measured: list[tuple[Any, Any]] = []

    def compare(teacher: Any, student: Any) -> float:
        rows = embed(student_body, signals.texts)
        head = fit_head(rows[training], signals.probabilities[training], C=2.0)
        np.testing.assert_array_equal(teacher, signals.probabilities[held_out])
        np.testing.assert_allclose(student, head.predict_proba(rows[held_out]), atol=1e-4)
        measured.append((teacher, student))
        return 0.5

    monkeypatch.setattr(early, "soft_agreement", compare)
    train_student(signals, student_body, **{**QUICK, "patience": 1, "seed": 3, "head_c": 2.0})
    assert len(measured) == 1


def test_a_look_samples_the_whole_of_what_is_trained_on(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "MAX_HELD_OUT", 12)
    seen: list[str] = []

    def embed_and_record(body: SentenceTransformer, texts: list[str], **settings: Any) -> Any:
        seen[:] = texts
        return embed(body, texts, **settings)

    monkeypatch.setattr(early, "embed", embed_and_record)
    signals = pool_signals(POOL)
    train_student(signals, student_body, **{**QUICK, "patience": 1})
    training, held_out = hold_out(POOL, seed=0)
    sample = [signals.texts.index(text) for text in seen[:12]]
    assert set(sample) <= set(training.tolist())
    assert max(sample) > training[36]
    assert seen[12:] == [signals.texts[row] for row in held_out]


def test_a_look_disturbs_no_training(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout on, every draw of it depends on all that was drawn before."""
    rising = iter(np.linspace(0, 1, 99))
    monkeypatch.setattr(early, "soft_agreement", lambda *_: next(rising))
    trained = []
    for look_steps in (1, 500):
        monkeypatch.setattr(steps, "EVALUATION_STEPS", look_steps)
        settings = {**QUICK, "patience": 9, "epochs": 2, "dropout": True}
        trained.append(weights(train_student(pool_signals(POOL), tiny_student, **settings)))
    assert same(*trained)


@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_held_out_is_never_trained_on(
    student_body: SentenceTransformer, tmp_path: Path, objective: str, patience: int | None
) -> None:
    from setfit_kd.student.trainer import StudentTrainer

    signals = pool_signals(POOL)
    config = StudentConfig.of(**{**QUICK, "objective": objective, "patience": patience, "num_iterations": 20})
    trainer = StudentTrainer(
        new_model(student_body, NAMES), signals, few_labels(), config, resolve_device("cpu"), str(tmp_path)
    )
    dataset, _ = trainer.get_dataset(signals.texts, None, trainer.args)
    training = hold_out(POOL, seed=0, spared=np.arange(POOL) < 16)[0] if patience else np.arange(POOL)
    allowed = [signals.texts[row] for row in training]
    columns = [name for name in dataset.column_names if name.startswith("sentence")]
    assert {text for name in columns for text in dataset[name]} == set(allowed)
    assert all(set(dataset[name]) == set(allowed) for name in columns)
    if objective != "pairs":
        assert dataset["sentence"] == allowed
        assert dataset["label"] == training.tolist()


@pytest.mark.parametrize("patience", [None, 1])
def test_batches_hold_the_training_rows_and_no_others(
    student_body: SentenceTransformer, patience: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.losses import SimilarityLoss

    seen: list[int] = []
    loss = SimilarityLoss.loss

    def record(self: Any, rows: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        seen.extend(labels.tolist())
        return loss(self, rows, labels)

    monkeypatch.setattr(SimilarityLoss, "loss", record)
    train_student(pool_signals(POOL), student_body, **{**QUICK, "patience": patience})
    training = hold_out(POOL, seed=0)[0].tolist() if patience else list(range(POOL))
    assert sorted(seen) == training


@pytest.mark.parametrize("objective", ["soft-labels", "similarity,soft-labels=0.5", "pairs"])
def test_every_objective_can_be_stopped_early(
    student_body: SentenceTransformer, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(student_body, [0.5, 0.4])
    monkeypatch.setattr(early, "soft_agreement", script)
    settings = {**QUICK, "objective": objective, "patience": 1, "epochs": 9}
    model = train_student(pool_signals(POOL), student_body, labeled=few_labels(), **settings)
    assert len(script.looks) == 2
    assert same(weights(model), script.looks[0])
