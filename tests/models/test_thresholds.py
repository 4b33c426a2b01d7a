"""Thresholds of multi-label models."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from setfit_kd.models.thresholds import fit_thresholds


def best_f1(probabilities: npt.NDArray[np.floating], targets: npt.NDArray[np.int64]) -> list[float]:
    """Return the best F1 of each label over all thresholds."""
    columns = zip(probabilities.T, targets.T, strict=True)
    return [max(f1_score(gold, p >= cut, zero_division=0) for cut in np.unique(p)) for p, gold in columns]


@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 4))
def test_thresholds_have_the_best_f1_even_with_equal_probabilities(seed: int, n: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, targets = rng.integers(1, 9, size=(n, classes)) / 10, rng.integers(2, size=(n, classes))
    thresholds = fit_thresholds(probabilities, "f1", targets=targets, label_names=list("abcd")[:classes])
    assert not (probabilities == thresholds)[:, targets.any(axis=0)].any()
    assert (thresholds[~targets.any(axis=0)] == 0.5).all()
    predicted = probabilities >= thresholds
    achieved = [f1_score(targets[:, j], predicted[:, j], zero_division=0) for j in range(classes)]
    np.testing.assert_allclose(achieved, best_f1(probabilities, targets))


def test_wanted_precision_and_recall(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random((500, 3)) ** [1, 3, 3] * [1, 1, 0.4]
    targets = rng.random((500, 3)) < probabilities
    names = ["frequent", "rare", "uncertain"]
    high_recall = probabilities >= fit_thresholds(probabilities, "recall=0.9", targets=targets, label_names=names)
    recalls = recall_score(targets, high_recall, average=None)
    assert ((recalls >= 0.9) & (recalls < 0.95)).all()
    with caplog.at_level(logging.WARNING):
        thresholds = fit_thresholds(probabilities, "precision=0.8", targets=targets, label_names=names)
    precisions = precision_score(targets, probabilities >= thresholds, average=None)
    assert ((precisions[:2] >= 0.8) & (precisions[:2] < 0.85)).all()
    assert "uncertain" in caplog.text
    assert "rare" not in caplog.text
    # Calibrated probabilities tell nearly the same without labels.
    expected = fit_thresholds(probabilities, "precision=0.8", label_names=names)
    np.testing.assert_allclose(expected[:2], thresholds[:2], atol=0.15)


def test_expected_thresholds_are_between_those_for_f1_and_a_common_one_for_the_expected_number_of_labels() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.beta(0.4, 2, (2_000, 1)) * [0.9, 0.4, 0.1]
    cuts = np.linspace(0.01, 0.99, 99)

    def expected_f1(cut: float) -> npt.NDArray[np.floating]:
        predicted = probabilities >= cut
        totals = predicted.sum(axis=0) + probabilities.sum(axis=0)
        return np.asarray(2 * (probabilities * predicted).sum(axis=0) / totals)

    best = cuts[np.array([expected_f1(cut) for cut in cuts]).argmax(axis=0)]
    common = min(cuts, key=lambda cut: abs((probabilities >= cut).sum() - probabilities.sum()))
    expected = 1 / (1 + np.sqrt((1 / best - 1) * (1 / common - 1)))
    thresholds = fit_thresholds(probabilities, "f1", label_names=["a", "b", "c"])
    np.testing.assert_allclose(thresholds, expected, atol=0.02)
    assert (common - best)[1:].min() > 0.1


def test_number_is_the_threshold_of_all_labels_and_without_texts_it_is_one_half() -> None:
    for n in (0, 2):
        assert fit_thresholds(np.ones((n, 2)), "0.3", label_names=["a", "b"]).tolist() == [0.3, 0.3]
    assert fit_thresholds(np.ones((0, 2)), "f1", label_names=["a", "b"]).tolist() == [0.5, 0.5]
