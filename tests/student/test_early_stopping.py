"""Early stopping: held-out texts, evaluation steps, patience and best weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import LABEL_NAMES, QUICK, equal_weights, few_labels, pool_signals, raise_at_step, weights

from setfit_kd import train_student
from setfit_kd.config.stages import StudentConfig
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed
from setfit_kd.models.heads import fit_head, get_head
from setfit_kd.models.io import new_model
from setfit_kd.models.transformer import load_transformer
from setfit_kd.student import agreement as agreement_module
from setfit_kd.student.agreement import AgreementCallback, soft_agreement
from setfit_kd.student.distil import MAX_HELD_OUT, MIN_HELD_OUT, hold_out
from setfit_kd.student.trainer import StudentTrainer
from setfit_kd.tasks.classification import MULTI_LABEL

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

POOL = 64

few = settings(max_examples=50)


@few
@given(st.integers(2, 20_000), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_hold_out_splits_the_pool_and_holds_out_avoided_rows_last(n: int, share: float, seed: int) -> None:
    avoid = np.random.default_rng(seed).random(n) < share
    config = StudentConfig.of(seed=seed, patience=1)
    training, held_out = hold_out(n, config, avoid=avoid)
    np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), np.arange(n))
    for rows, repeated in zip((training, held_out), hold_out(n, config, avoid=avoid), strict=True):
        assert len(rows)
        assert (np.diff(rows) > 0).all()
        np.testing.assert_array_equal(rows, repeated)
    assert len(held_out) == len(hold_out(n, config)[1])
    assert avoid[held_out].sum() == max(0, len(held_out) - (~avoid).sum())


@few
@given(st.integers(1, 3000), st.integers(1, 4))
def test_evaluations_are_evenly_spaced_and_end_each_epoch(steps_per_epoch: int, epochs: int) -> None:
    evaluations: list[int] = []
    arguments, state = SimpleNamespace(num_train_epochs=epochs), SimpleNamespace(max_steps=epochs * steps_per_epoch)
    for step in range(1, epochs * steps_per_epoch + 1):
        if AgreementCallback.is_due(SimpleNamespace(), step, arguments, state):  # type: ignore[arg-type]
            evaluations.append(step)
    assert set(range(steps_per_epoch, epochs * steps_per_epoch + 1, steps_per_epoch)) <= set(evaluations)
    gaps = np.diff([0, *evaluations])
    assert gaps.max() - gaps.min() <= 1
    assert gaps.max() <= 750
    assert gaps.min() >= min(steps_per_epoch, 333)


@pytest.mark.parametrize(
    ("n", "patience", "count"),
    [(2, 1, 1), (3, 1, 1), (20, 1, 10), (100, 1, MIN_HELD_OUT), (159, None, 0), (160, None, MIN_HELD_OUT)]
    + [(1000, patience, 100) for patience in (None, 1)]
    + [(10**6, None, MAX_HELD_OUT)],
)
def test_a_tenth_within_limits_is_held_out_but_of_small_pools_only_to_stop_early(
    n: int, patience: int | None, count: int
) -> None:
    assert [len(rows) for rows in hold_out(n, StudentConfig.of(patience=patience))] == [n - count, count]


def test_held_out_rows_depend_on_seed() -> None:
    held_out = [set(hold_out(1000, StudentConfig.of(seed=seed))[1].tolist()) for seed in range(4)]
    assert len(set.union(*held_out)) > 300


@few
@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_soft_agreement_is_one_minus_the_total_variation(seed: int, classes: int) -> None:
    left, right = np.random.default_rng(seed).dirichlet(np.ones(classes), size=(2, 7))
    expected = 1 - np.abs(left - right).sum(axis=1).mean() / 2
    assert soft_agreement(left, right) == pytest.approx(expected)
    assert soft_agreement(left, right, MULTI_LABEL) == pytest.approx(1 - np.abs(left - right).mean())


class FakeAgreement:
    """Replacement for `soft_agreement` that returns fixed values and records the body's weights."""

    def __init__(self, body: SentenceTransformer, agreements: list[float]) -> None:
        self.body = body
        self.agreements = agreements
        self.weights: list[list[torch.Tensor]] = []

    def __call__(self, teacher: Any, student: Any, _: Any) -> float:
        assert teacher.shape == student.shape == (MIN_HELD_OUT, len(LABEL_NAMES))
        self.weights.append([value.clone() for value in self.body.state_dict().values()])
        return self.agreements[len(self.weights) - 1]


@pytest.mark.parametrize(
    ("patience", "agreements", "n_evaluations", "best"),
    [
        pytest.param(1, [0.0, 0.0, 0.9], 2, 0, id="patience runs out"),
        pytest.param(2, [0.1, 0.5, 0.3, 0.6, 0.5, 0.6], 6, 3, id="improvement within patience, equal does not count"),
        pytest.param(3, [0.1, 0.2, 0.3, 0.4], 4, 3, id="improvement to the end"),
        pytest.param(9, [0.3, 0.2, 0.1], 3, 0, id="patience longer than training"),
    ],
)
def test_training_stops_and_restores_best_weights(
    student_body: SentenceTransformer,
    monkeypatch: pytest.MonkeyPatch,
    patience: int,
    agreements: list[float],
    n_evaluations: int,
    best: int,
) -> None:
    fake_agreement = FakeAgreement(student_body, agreements)
    monkeypatch.setattr(agreement_module, "soft_agreement", fake_agreement)
    signals = pool_signals(POOL)
    model = train_student(
        signals, student_body, **{**QUICK, "patience": patience, "epochs": len(agreements), "batch_size": 24}
    )
    assert len(fake_agreement.weights) == n_evaluations
    assert not any(equal_weights(*pair) for pair in pairwise(fake_agreement.weights))
    assert equal_weights(weights(model), fake_agreement.weights[best])
    # The head is fitted on the restored weights and the training texts, and scaled by a temperature.
    training, _ = hold_out(POOL, StudentConfig.of(patience=patience))
    rows = embed(student_body, [signals.texts[row] for row in training])
    expected = fit_head(rows, signals.probabilities[training], C=3.0)
    actual_coef, expected_coef = (head.coef_ / np.linalg.norm(head.coef_) for head in (model.model_head, expected))
    np.testing.assert_allclose(actual_coef, expected_coef, atol=1e-4)
    assert not student_body.training


@pytest.mark.parametrize("family", ["setfit", "transformer"])
def test_agreement_is_measured_by_the_students_own_head(
    family: str, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transformer that is trained on soft labels predicts by its last layer, other students by a fitted head."""
    body = load_transformer(tiny_student, LABEL_NAMES) if family == "transformer" else load_body(tiny_student)
    signals = pool_signals(POOL)
    training, held_out = hold_out(POOL, StudentConfig.of(seed=3, patience=1))
    measured: list[Any] = []

    def compare(teacher: Any, student: Any, _: Any) -> float:
        rows = embed(body, signals.texts)
        fitted = fit_head(rows[training], signals.probabilities[training], C=2.0)
        head = get_head(body) if family == "transformer" else fitted
        np.testing.assert_array_equal(teacher, signals.probabilities[held_out])
        np.testing.assert_allclose(student, head.predict_proba(rows[held_out]), atol=1e-4)
        if family == "transformer":
            assert np.abs(head.predict_proba(rows) - fitted.predict_proba(rows)).max() > 0.01
        measured.append(student)
        return 0.5

    monkeypatch.setattr(agreement_module, "soft_agreement", compare)
    objective = "soft-labels" if family == "transformer" else "similarity"
    train_student(signals, body, **{**QUICK, "objective": objective, "patience": 1, "seed": 3, "head_c": 2.0})
    assert len(measured) == 1


def test_head_is_fitted_on_a_sample_of_all_training_rows(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement_module, "MAX_HELD_OUT", 12)
    recorder = Mock(side_effect=embed)
    monkeypatch.setattr(agreement_module, "embed", recorder)
    signals = pool_signals(POOL)
    train_student(signals, student_body, **{**QUICK, "patience": 1})
    training, held_out = hold_out(POOL, StudentConfig.of(patience=1))
    seen = recorder.call_args.args[1]
    sample = [signals.texts.index(text) for text in seen[:12]]
    assert set(sample) <= set(training.tolist())
    assert max(sample) > training[36]
    assert seen[12:] == [signals.texts[row] for row in held_out]


@pytest.mark.parametrize("interrupted_step", [2, None])
def test_resumed_training_stops_at_the_same_step(
    interrupted_step: int | None, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is interrupted after it has stopped, while the head is fitted."""
    agreements = {1: 0.1, 2: 0.5, 3: 0.4, 4: 0.3, 5: 0.9, 6: 0.9}
    monkeypatch.setattr(AgreementCallback, "measure", lambda _, step: agreements[step])
    settings = {**QUICK, "patience": 2, "epochs": 6, "batch_size": 48}
    expected = train_student(pool_signals(POOL), tiny_student, **settings)
    with_checkpoints = {**settings, "checkpoints": tmp_path, "checkpoint_seconds": 1e-9}
    with monkeypatch.context() as patch:
        if interrupted_step is None:
            patch.setattr("setfit_kd.student.trainer.fit_head", Mock(side_effect=KeyboardInterrupt))
        else:
            raise_at_step(patch, interrupted_step, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train_student(pool_signals(POOL), tiny_student, **with_checkpoints)
    resumed = train_student(pool_signals(POOL), tiny_student, **with_checkpoints)
    assert len(resumed.loss_curve_) == 4
    assert resumed.loss_curve_ == expected.loss_curve_
    assert equal_weights(weights(resumed), weights(expected))


def test_evaluation_does_not_change_training(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, any random number drawn in an evaluation would change the training."""
    agreements = iter(np.linspace(0, 1, 99))
    monkeypatch.setattr(agreement_module, "soft_agreement", lambda *_: next(agreements))
    runs = []
    for evaluation_steps in (1, 500):
        monkeypatch.setattr(agreement_module, "EVALUATION_STEPS", evaluation_steps)
        settings = {**QUICK, "patience": 9, "epochs": 2, "dropout": True}
        runs.append(weights(train_student(pool_signals(POOL), tiny_student, **settings)))
    assert equal_weights(*runs)


@pytest.mark.parametrize(("objective", "patience"), [("similarity", None), ("similarity", 2), ("pairs", 2)])
def test_held_out_texts_are_not_in_training_data(
    student_body: SentenceTransformer, tmp_path: Path, objective: str, patience: int | None
) -> None:
    signals = pool_signals(POOL)
    config = StudentConfig.of(**{**QUICK, "objective": objective, "patience": patience, "num_iterations": 20})
    trainer = StudentTrainer(
        new_model(student_body, LABEL_NAMES), signals, few_labels(), config, resolve_device("cpu"), str(tmp_path)
    )
    dataset, _ = trainer.get_dataset(signals.texts, None, trainer.args)
    training = hold_out(POOL, config, avoid=np.arange(POOL) < 16)[0]
    assert len(dataset.columns) == (2 if objective == "pairs" else 1)
    assert all(set(column.tolist()) == set(training.tolist()) for column in dataset.columns)
    if objective != "pairs":
        assert dataset.labels.tolist() == training.tolist()
    batch = dataset.__getitems__([3, 0])
    expected = [student_body.preprocess([signals.texts[column[row]] for row in (3, 0)]) for column in dataset.columns]
    assert [row["input_ids"].tolist() for row in batch["features"]] == [row["input_ids"].tolist() for row in expected]
