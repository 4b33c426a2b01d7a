"""Temperature scaling, which calibrates probabilities without changing the predicted class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.evaluation.metrics import measure_calibration
from setfit_kd.models.bodies import load_body
from setfit_kd.models.heads import (
    at_temperature,
    fit_head,
    fit_temperature,
    head_at_temperature,
    head_logits,
    held_out_logits,
)
from setfit_kd.models.io import new_model
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.teacher.scoring import refine_and_score

Rows = npt.NDArray[np.floating]


def blobs(n: int, n_classes: int, *, spread: float, seed: int = 0) -> tuple[Rows, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, n_classes, n)
    return np.eye(n_classes, 8)[gold] + spread * rng.normal(size=(n, 8)), gold


@given(st.floats(0.06, 15), st.integers(2, 5), st.integers(0, 2**16))
def test_fit_temperature_recovers_the_temperature(temperature: float, n_classes: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(40, n_classes)) * 3
    assert fit_temperature(logits, softmax(logits / temperature, axis=1)) == pytest.approx(temperature, rel=0.02)
    assert fit_temperature(logits[:0], logits[:0]) == 1


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_temperatures_multiply_and_1_is_the_identity(first: float, second: float) -> None:
    probabilities = softmax(np.random.default_rng(0).normal(size=(20, 3)), axis=1)
    np.testing.assert_allclose(at_temperature(probabilities, 1), probabilities, atol=1e-12)
    twice = at_temperature(at_temperature(probabilities, first), second)
    np.testing.assert_allclose(twice, at_temperature(probabilities, first * second), atol=1e-6)
    assert at_temperature(np.array([[1.0, 0.0]]), 2.0)[0] == pytest.approx([1, 0], abs=1e-9)


@pytest.mark.parametrize(("n_classes", "temperature"), [(2, 0.5), (4, 3.0)])
def test_head_at_temperature_scales_logits_and_keeps_predictions(n_classes: int, temperature: float) -> None:
    embeddings, gold = blobs(60, n_classes, spread=0.4)
    head = fit_head(embeddings, np.eye(n_classes)[gold])
    scaled, logits = head_at_temperature(head, temperature), head_logits(head, embeddings)
    expected = softmax(logits / temperature, axis=1)
    np.testing.assert_allclose(scaled.predict_proba(embeddings), expected, atol=1e-9)
    np.testing.assert_array_equal(scaled.predict(embeddings), head.predict(embeddings))


def test_held_out_logits_come_from_heads_fitted_on_other_texts() -> None:
    rng = np.random.default_rng(0)
    embeddings, noise = rng.normal(size=(40, 30)), np.eye(2)[rng.integers(0, 2, 40)]
    rows, held_out = held_out_logits(embeddings, noise, np.ones(40), C=1000.0, seed=0)
    np.testing.assert_array_equal(rows, np.arange(40))
    fitted = fit_head(embeddings, noise, C=1000.0).predict_proba(embeddings).argmax(axis=1)
    assert (fitted == noise.argmax(axis=1)).mean() == 1  # memorized
    assert (held_out.argmax(axis=1) == noise.argmax(axis=1)).mean() < 0.8  # noise cannot be predicted
    for n in (1, 2, 4):
        few, logits = held_out_logits(embeddings[:n], noise[:n], np.ones(n), seed=0)
        assert few.shape == (n,)
        assert np.isfinite(logits).all()


def sharp_signals(temperature: float, seed: int, n: int = 2000) -> TeacherSignals:
    """Overconfident signals of three classes that are calibrated at the temperature; any two seeds mostly agree."""
    common = 1.5 * np.random.default_rng(99).normal(size=(n, 3))
    calibrated = softmax(common + 0.5 * np.random.default_rng(seed).normal(size=(n, 3)), axis=1)
    sharp = at_temperature(calibrated, 1 / temperature).astype(np.float32)
    return TeacherSignals([f"text {row}" for row in range(n)], sharp, ("x", "y", "z"), temperature=temperature)


@pytest.mark.parametrize(
    ("temperatures", "weights"), [((4.0, 4.0), None), ((6.0, 2.0), [1.0, 3.0]), ((2.0, 1.0), None)]
)
def test_averaged_signals_have_the_confidence_of_their_teachers(
    temperatures: tuple[float, float], weights: list[float] | None
) -> None:
    signals = [sharp_signals(temperature, seed) for seed, temperature in enumerate(temperatures)]
    mean = TeacherSignals.average(signals, weights)
    calibrated = [at_temperature(teacher.probabilities, teacher.temperature) for teacher in signals]
    expected = np.average(calibrated, axis=0, weights=weights)
    result = at_temperature(mean.probabilities, mean.temperature)
    naive = at_temperature(mean.probabilities, float(np.average(temperatures, weights=weights)))
    error, naive_error = (abs(p.max(axis=1).mean() - expected.max(axis=1).mean()) for p in (result, naive))
    assert error < 0.02
    assert error < 0.7 * naive_error


def test_signals_averaged_with_themselves_keep_their_temperature(tmp_path: Path) -> None:
    for temperature in (0.5, 8.0):
        signals = sharp_signals(temperature, 0, n=200)
        signals.save(tmp_path / str(temperature))
        loaded = TeacherSignals.load(tmp_path / str(temperature))
        assert TeacherSignals.average([signals, loaded]).temperature == pytest.approx(temperature, rel=0.01)
    assert TeacherSignals.average([sharp_signals(1.0, seed, n=50) for seed in (0, 1)]).temperature == 1


def test_refined_teacher_is_calibrated(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-training makes the head overconfident; the temperature of the refined teacher corrects that."""
    texts = [f"text {number}" for number in range(432)]
    points, gold = blobs(len(texts), 3, spread=0.9)
    by_text = dict(zip(texts, points.astype(np.float32), strict=True))
    monkeypatch.setattr("setfit_kd.teacher.scoring.embed", lambda _, texts, **__: np.array([by_text[t] for t in texts]))
    labeled = LabeledSet(texts[:32], gold[:32], ("a", "b", "c"))
    teacher = new_model(load_body(tiny_teacher), labeled.label_names)
    teacher.model_head = fit_head(points[:32], np.eye(3)[gold[:32]], C=1.0)
    refined, signals = refine_and_score(teacher, labeled, texts[32:], cache=False, exact=True, head_c=1.0)
    held_out, held_out_gold = blobs(2000, 3, spread=0.9, seed=85)
    sharp = head_at_temperature(refined.model_head, 1 / signals.temperature)
    before, after, overconfident = (
        measure_calibration(head.predict_proba(held_out), held_out_gold).ece
        for head in (teacher.model_head, refined.model_head, sharp)
    )
    assert signals.temperature > 1.5
    assert after < min(overconfident, before + 0.05)
