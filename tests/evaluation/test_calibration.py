"""Calibration, thresholds and intervals by hand, by brute force and by simulation, and evaluations kept on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from setfit_kd.data import LabeledSet
from setfit_kd.errors import DataError, OutputError
from setfit_kd.evaluation import (
    Calibration,
    Evaluation,
    Interval,
    bootstrap,
    bootstrap_calibration,
    bootstrap_share,
    coverage_curve,
    measure_calibration,
    measure_quality,
    read_texts,
    threshold_for,
    write_texts,
)
from setfit_kd.evaluation.cost import Cost

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Answers = list[tuple[int, bool]]

NAMES = ("Wirtschaft", "Sci/Tech", "体育")

few = settings(max_examples=40, deadline=None, derandomize=True)
# Percent of confidence in one of two classes, and whether it is the right one: coarse, so that there are ties.
answers = st.lists(st.tuples(st.integers(51, 100), st.booleans()), min_size=1, max_size=40)


def ints(*values: int) -> Ints:
    return np.array(values, np.int64)


def binary(answered: Answers) -> tuple[Floats, Ints]:
    """Probabilities and gold of two classes, in which the first is always predicted."""
    confidence = np.array([percent / 100 for percent, _ in answered], np.float32)
    return np.column_stack([confidence, 1 - confidence]), ints(*(int(not right) for _, right in answered))


def drawn(n: int, n_classes: int, *, seed: int, sharpened: float = 1) -> tuple[Floats, Ints]:
    """Probabilities, and gold drawn by them: calibrated, unless they are then sharpened."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(n_classes, 0.7), n)
    gold = (rng.random((n, 1)) > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)
    powers = probabilities**sharpened
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32), gold.astype(np.int64)


def guesses(of: Ints, accuracy: float, *, n_classes: int, rng: np.random.Generator) -> Ints:
    """The classes ``of`` texts, but of a share of 1 - ``accuracy`` another class."""
    other = (of + rng.integers(1, n_classes, len(of))) % n_classes
    return np.where(rng.random(len(of)) < accuracy, of, other)


def evaluation(probabilities: Floats, gold: Ints, reference: Ints | None = None) -> Evaluation:
    predicted = np.asarray(probabilities.argmax(axis=1), np.int64)
    quality = measure_quality(predicted, gold, NAMES[: probabilities.shape[1]], reference)
    cost = Cost(parameters=10, megabytes=0.1, texts_per_second=99.5, device="cpu")
    return Evaluation(quality, cost, probabilities, gold)


# Calibration


@pytest.mark.parametrize(
    ("rows", "gold", "ece", "brier"),
    [
        # The first two share a bin: twice |0.82 - 1/2|, once |0.55 - 1|.
        (
            [[0.81, 0.19], [0.83, 0.17], [0.45, 0.55]],
            [0, 1, 1],
            (2 * 0.32 + 0.45) / 3,
            2 * (0.0361 + 0.6889 + 0.2025) / 3,
        ),
        ([[0.5, 0.3, 0.2]], [1], 0.5, 0.25 + 0.49 + 0.04),
        ([[1, 0], [0, 1]], [0, 1], 0, 0),
        ([[1, 0], [0, 1]], [1, 0], 1, 2),
        ([[0.25] * 4] * 4, [0, 1, 2, 3], 0, 0.75),
        ([[1.0]], [0], 0, 0),
    ],
)
def test_calibration_by_hand(rows: list[list[float]], gold: list[int], ece: float, brier: float) -> None:
    found = measure_calibration(np.array(rows), ints(*gold))
    assert found.ece == pytest.approx(ece)
    assert found.brier == pytest.approx(brier)


def naive_ece(probabilities: Floats, gold: Ints, bins: int) -> float:
    total = 0.0
    for number in range(bins):
        inside = [
            (float(max(row)), list(row).index(max(row)) == label)
            for row, label in zip(probabilities, gold, strict=True)
            if number / bins <= max(row) < (number + 1) / bins or (number == bins - 1 and max(row) >= 1)
        ]
        total += abs(sum(confidence for confidence, _ in inside) - sum(right for _, right in inside))
    return total / len(gold)


@few
@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_the_calibration_error_is_what_a_naive_loop_says(n: int, n_classes: int, bins: int, seed: int) -> None:
    probabilities, gold = drawn(n, n_classes, seed=seed, sharpened=2)
    found = measure_calibration(probabilities, gold, bins=bins)
    assert found.ece == pytest.approx(naive_ece(probabilities, gold, bins), abs=1e-6)
    assert 0 <= found.ece <= 1


@few
@given(answers)
def test_the_brier_score_of_two_classes_is_twice_scikit_learns(answered: Answers) -> None:
    from sklearn.metrics import brier_score_loss

    probabilities, gold = binary(answered)
    expected = 2 * brier_score_loss(gold == 0, probabilities[:, 0], pos_label=True)
    assert measure_calibration(probabilities, gold).brier == pytest.approx(expected, abs=1e-6)


@few
@given(answers, st.integers(1, 20))
def test_the_bins_hold_every_text_once_and_rise(answered: Answers, bins: int) -> None:
    probabilities, gold = binary(answered)
    found = measure_calibration(probabilities, gold, bins=bins).reliability
    assert 1 <= len(found) <= bins
    assert all(of.texts > 0 for of in found)
    assert sum(of.texts for of in found) == len(gold)
    assert sum(of.texts * of.accuracy for of in found) == pytest.approx(sum(right for _, right in answered))
    assert sum(of.texts * of.confidence for of in found) == pytest.approx(float(probabilities[:, 0].sum(dtype=float)))
    confidences = [of.confidence for of in found]
    assert confidences == sorted(set(confidences))


def test_an_edge_opens_the_next_bin_and_certainty_closes_the_last() -> None:
    confidence = np.array([0.5, 0.625, 0.75, 0.875, 1.0, 1.0])
    found = measure_calibration(np.column_stack([confidence, 1 - confidence]), np.zeros(6, np.int64), bins=4)
    assert [(of.texts, of.confidence) for of in found.reliability] == [(2, 0.5625), (4, 0.90625)]


def test_a_confidence_rounded_above_one_is_in_the_last_bin() -> None:
    found = measure_calibration(np.array([[np.nextafter(np.float32(1), np.float32(2)), 0]], np.float32), ints(0))
    assert [of.texts for of in found.reliability] == [1]
    assert found.ece == pytest.approx(0, abs=1e-6)


def simulated(sharpened: float) -> Calibration:
    return measure_calibration(*drawn(20_000, 4, seed=0, sharpened=sharpened))


def test_probabilities_that_the_gold_is_drawn_by_are_calibrated() -> None:
    found = simulated(1)
    assert found.ece < 0.015
    assert max(abs(of.confidence - of.accuracy) for of in found.reliability if of.texts > 500) < 0.05
    probabilities, _ = drawn(20_000, 4, seed=0)
    assert found.brier == pytest.approx(1 - float(np.square(probabilities).sum(axis=1).mean()), abs=0.01)


@pytest.mark.parametrize(("sharpened", "too_sure"), [(4, True), (0.3, False)])
def test_probabilities_too_sure_or_too_modest_are_not(sharpened: float, too_sure: bool) -> None:
    found = simulated(sharpened)
    assert found.ece > 0.1
    assert found.brier > simulated(1).brier + 0.02
    off = [of.confidence > of.accuracy for of in found.reliability if of.texts > 500]
    assert set(off) == {too_sure}


# Answering only when sure


def test_an_abstaining_curve_by_hand() -> None:
    probabilities = np.array([[0.75, 0.25], [0.125, 0.875], [0.25, 0.75], [0.5, 0.5]])
    expected = [[0.875, 1 / 4, 1], [0.75, 3 / 4, 2 / 3], [0.5, 1, 3 / 4]]
    np.testing.assert_allclose(coverage_curve(probabilities, ints(1, 1, 1, 0)), expected)


def assert_curve_is_brute_force(probabilities: Floats, gold: Ints) -> None:
    curve = coverage_curve(probabilities, gold)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    assert set(curve[:, 0]) == set(confidence.astype(float))
    for threshold, coverage, accuracy in curve:
        chosen = confidence >= threshold
        assert coverage == pytest.approx(chosen.mean())
        assert accuracy == pytest.approx(right[chosen].mean())
    assert (np.diff(curve[:, 0]) < 0).all()
    assert (np.diff(curve[:, 1]) > 0).all()
    assert curve[-1, 1] == 1
    assert curve[-1, 2] == pytest.approx(right.mean())


@few
@given(answers)
@example([(100, True)])
@example([(60, True), (60, False), (60, True)])
def test_the_curve_is_what_each_threshold_gives_ties_together(answered: Answers) -> None:
    assert_curve_is_brute_force(*binary(answered))


@few
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_curve_is_what_each_threshold_gives_over_more_classes(n: int, n_classes: int, seed: int) -> None:
    assert_curve_is_brute_force(*drawn(n, n_classes, seed=seed))


def wilson(right: int, n: int) -> tuple[float, float]:
    z, share = 1.959963984540054, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


@few
@given(answers, st.one_of(st.floats(0, 1), st.sampled_from([0.5, 2 / 3, 0.75, 0.9, 0.95, 1.0])))
def test_a_threshold_gives_the_largest_coverage_that_reaches_the_target(answered: Answers, target: float) -> None:
    probabilities, gold = binary(answered)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    possible = [chosen for chosen in (confidence >= value for value in confidence) if right[chosen].mean() >= target]
    found = threshold_for(target, probabilities, gold)
    if found is None:
        assert not possible
        return
    # As `predict` compares, a single precision probability with a Python number.
    chosen = confidence >= float(found.threshold)
    assert found.coverage == pytest.approx(chosen.mean())
    assert found.coverage == pytest.approx(max(chosen.mean() for chosen in possible))
    assert found.accuracy == pytest.approx(right[chosen].mean())
    assert found.accuracy >= target
    assert found.low - 1e-12 <= found.accuracy <= found.high + 1e-12
    assert (found.low, found.high) == pytest.approx(wilson(int(right[chosen].sum()), int(chosen.sum())), abs=1e-9)


@pytest.mark.parametrize(("target", "n"), [(0.9, 10), (0.95, 20), (0.99, 100), (0.7, 10), (2 / 3, 3), (1.0, 7)])
def test_a_target_that_is_reached_exactly_is_reached(target: float, n: int) -> None:
    wrong = n - round(target * n)
    found = threshold_for(target, *binary([(90, True)] * (n - wrong) + [(90, False)] * wrong))
    assert found is not None
    assert (found.coverage, found.accuracy) == (1, target)


def test_the_lowest_threshold_is_found_beyond_a_wrong_answer() -> None:
    found = threshold_for(0.75, *binary([(99, False), (90, True), (80, True), (70, True), (60, False)]))
    assert found is not None
    assert 0.6 < found.threshold <= np.float32(0.7)
    assert (found.coverage, found.accuracy) == pytest.approx((0.8, 0.75))


@pytest.mark.parametrize("target", [0.51, 0.9, 1.0])
def test_there_is_no_threshold_where_the_surest_are_wrong(target: float) -> None:
    assert threshold_for(target, *binary([(99, False), (90, True), (80, False), (70, True)])) is None


def test_a_threshold_of_many_texts_holds_on_other_texts() -> None:
    found = threshold_for(0.8, *drawn(10_000, 4, seed=1))
    assert found is not None
    probabilities, gold = drawn(10_000, 4, seed=2)
    chosen = probabilities.max(axis=1) >= found.threshold
    assert chosen.mean() == pytest.approx(found.coverage, abs=0.02)
    assert (probabilities.argmax(axis=1) == gold)[chosen].mean() == pytest.approx(0.8, abs=0.02)


# Intervals


def as_scikit_learn_says(gold: Ints, predicted: Ints) -> tuple[float, float]:
    from sklearn.metrics import accuracy_score, f1_score

    macro_f1 = f1_score(gold, predicted, labels=np.unique(gold), average="macro", zero_division=0)
    return accuracy_score(gold, predicted), macro_f1


def values(found: dict[str, Interval]) -> tuple[float, float]:
    return found["accuracy"].value, found["macro_f1"].value


@few
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40))
def test_the_figures_are_what_scikit_learn_says(rows: list[tuple[int, int, int]]) -> None:
    gold, predicted, other = np.array(rows, np.int64).T
    found, expected = bootstrap(gold, predicted, n_classes=5), as_scikit_learn_says(gold, predicted)
    assert values(found) == pytest.approx(expected)
    difference = np.subtract(expected, as_scikit_learn_says(gold, other))
    assert values(bootstrap(gold, predicted, n_classes=5, other=other)) == pytest.approx(difference, abs=1e-12)
    assert found["accuracy"].low <= found["accuracy"].value <= found["accuracy"].high
    assert all(0 <= of.low <= of.high <= 1 for of in found.values())


def accuracy(gold: Ints, predicted: Ints) -> float:
    return float((gold == predicted).mean())


def macro_f1(gold: Ints, predicted: Ints) -> float:
    counted = [((gold == i) & (predicted == i), (gold == i), (predicted == i)) for i in set(gold.tolist())]
    return float(np.mean([2 * both.sum() / (of.sum() + said.sum()) for both, of, said in counted]))


@pytest.mark.parametrize("figure", [accuracy, macro_f1])
@pytest.mark.parametrize("paired", [False, True], ids=["alone", "difference"])
def test_intervals_are_those_of_scipy(figure: Callable[[Ints, Ints], float], paired: bool) -> None:
    from scipy import stats

    rng = np.random.default_rng(3)
    gold = rng.choice(3, 300, p=[0.6, 0.3, 0.1])
    predicted, other = (guesses(gold, share, n_classes=3, rng=rng) for share in (0.85, 0.7))

    def statistic(gold: Ints, predicted: Ints, other: Ints) -> float:
        return figure(gold, predicted) - (figure(gold, other) if paired else 0)

    expected = stats.bootstrap(
        (gold, predicted, other),
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        random_state=np.random.default_rng(4),
    ).confidence_interval
    found = bootstrap(gold, predicted, n_classes=3, other=other if paired else None)[figure.__name__]
    assert found.value == pytest.approx(statistic(gold, predicted, other))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("figure", ["ece", "brier"])
def test_intervals_of_calibration_are_those_of_scipy(figure: str) -> None:
    from scipy import stats

    rng = np.random.default_rng(6)
    said = rng.dirichlet(np.ones(4), 250).astype(np.float32)
    gold = np.where(rng.random(250) < 0.6, said.argmax(axis=1), rng.integers(0, 4, 250))

    def statistic(rows: Ints) -> float:
        return float(getattr(measure_calibration(said[rows], gold[rows]), figure))

    expected = stats.bootstrap(
        (np.arange(250),),
        statistic,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        random_state=np.random.default_rng(7),
    ).confidence_interval
    found = bootstrap_calibration(said, gold)[figure]
    assert found.value == pytest.approx(statistic(np.arange(250)))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_intervals_of_calibration_come_in_parts_where_there_are_many_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    said, gold = rng.dirichlet(np.ones(3), 60), rng.integers(0, 3, 60)
    whole = bootstrap_calibration(said, gold)
    monkeypatch.setattr("setfit_kd.evaluation.intervals._DRAWS_PER_BATCH", 7 * 60)
    assert bootstrap_calibration(said, gold) == whole


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0, 0), (50, 0.40, 0.60), (100, 1, 1)])
def test_the_interval_of_a_share(count: int, low: float, high: float) -> None:
    found = bootstrap_share(count, 100)
    assert found.value == count / 100
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.021)


@pytest.mark.parametrize("paired", [False, True], ids=["alone", "difference"])
def test_about_95_of_100_intervals_hold_the_true_accuracy(paired: bool) -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(100):
        gold = rng.integers(0, 2, 150)
        predicted, other = (guesses(gold, share, n_classes=2, rng=rng) for share in (0.8, 0.7))
        found = bootstrap(gold, predicted, n_classes=2, other=other if paired else None)["accuracy"]
        held += found.low <= (0.1 if paired else 0.8) + 1e-9 and found.high >= (0.1 if paired else 0.8) - 1e-9
    assert 88 <= held <= 99


def test_a_classifier_does_not_differ_from_itself() -> None:
    rng = np.random.default_rng(6)
    gold = rng.integers(0, 7, 200)
    predicted = guesses(gold, 0.6, n_classes=7, rng=rng)
    found = bootstrap(gold, predicted, n_classes=7, other=predicted.copy())
    assert found == {"accuracy": Interval(0, 0, 0), "macro_f1": Interval(0, 0, 0)}


def test_classifiers_that_err_alike_are_told_apart_by_fewer_texts() -> None:
    rng = np.random.default_rng(7)
    gold = rng.integers(0, 3, 300)
    predicted = guesses(gold, 0.75, n_classes=3, rng=rng)
    other = guesses(predicted, 0.96, n_classes=3, rng=rng)
    together = bootstrap(gold, predicted, n_classes=3, other=other)
    alone = [bootstrap(gold, of, n_classes=3) for of in (predicted, other)]
    for name, found in together.items():
        # What the difference of two classifiers would have, had each met texts of its own.
        unpaired = sqrt(sum((of[name].high - of[name].low) ** 2 for of in alone))
        assert 0 < found.high - found.low < 0.5 * unpaired


def test_an_interval_shrinks_as_texts_are_added() -> None:
    gold, predicted = ints(*[0] * 10, *[1] * 10), ints(*[0] * 8, *[1] * 12)
    widths = []
    for times in (1, 16):
        found = bootstrap(np.tile(gold, times), np.tile(predicted, times), n_classes=2)["accuracy"]
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.25)


def test_intervals_come_from_the_seed_alone_and_not_from_the_order_of_the_texts() -> None:
    rng = np.random.default_rng(8)
    gold = rng.integers(0, 4, 80)
    predicted = guesses(gold, 0.6, n_classes=4, rng=rng)
    found = bootstrap(gold, predicted, n_classes=4)
    order = rng.permutation(80)
    np.random.seed(9)
    assert bootstrap(gold[order], predicted[order], n_classes=4) == found
    another = bootstrap(gold, predicted, n_classes=4, seed=1)
    assert values(another) == values(found)
    assert another["macro_f1"] != found["macro_f1"]
    assert another["macro_f1"].low == pytest.approx(found["macro_f1"].low, abs=0.03)


@pytest.mark.parametrize(("predicted", "value"), [(2, 1.0), (0, 0.0)])
def test_of_one_text_there_is_no_telling(predicted: int, value: float) -> None:
    found = bootstrap(ints(2), ints(predicted), n_classes=3)
    assert found == {"accuracy": Interval(value, value, value), "macro_f1": Interval(value, value, value)}
    assert bootstrap(ints(2), ints(predicted), n_classes=3, other=ints(0))["accuracy"].high == value


def test_of_one_class_every_prediction_is_right() -> None:
    found = bootstrap(ints(*[0] * 30), ints(*[0] * 30), n_classes=1)
    assert found == {"accuracy": Interval(1, 1, 1), "macro_f1": Interval(1, 1, 1)}


def test_a_class_without_gold_texts_is_no_part_of_the_mean() -> None:
    gold, predicted = ints(*[0] * 40, *[1] * 40), ints(*[0] * 30, *[2] * 10, *[1] * 40)
    found = bootstrap(gold, predicted, n_classes=4)
    assert found["macro_f1"].value == pytest.approx((2 * 30 / 70 + 1) / 2)
    # Counted as zeros, the two absent classes would halve it.
    assert found["macro_f1"].low > 0.8


def test_150_classes_are_not_too_many() -> None:
    rng = np.random.default_rng(10)
    gold = np.repeat(np.arange(150), 10)
    predicted = guesses(gold, 0.8, n_classes=150, rng=rng)
    found = bootstrap(gold, predicted, n_classes=150)
    assert values(found) == pytest.approx(as_scikit_learn_says(gold, predicted))
    for of in found.values():
        assert of.low < of.value < of.high
        assert of.high - of.low == pytest.approx(2 * 1.96 * sqrt(0.8 * 0.2 / 1500), rel=0.3)


# Of an evaluation, and kept on disk


def test_an_evaluation_measures_its_most_probable_classes() -> None:
    of, other = (evaluation(*drawn(60, 3, seed=seed)) for seed in (11, 12))
    other = evaluation(other.probabilities, of.gold)
    predicted = np.asarray(of.probabilities.argmax(axis=1), np.int64)
    assert of.intervals == bootstrap(of.gold, predicted, n_classes=3)
    assert of.calibration_intervals == bootstrap_calibration(of.probabilities, of.gold)
    assert values(of.intervals) == pytest.approx((of.quality.accuracy, of.quality.macro_f1))
    assert of.calibration == measure_calibration(of.probabilities, of.gold)
    assert of.against(other) == bootstrap(of.gold, predicted, n_classes=3, other=other.predicted)
    assert of.against(other)["accuracy"].value == pytest.approx(of.quality.accuracy - other.quality.accuracy)
    assert values(other.against(of)) == pytest.approx([-value for value in values(of.against(other))])


@pytest.mark.parametrize("reference", [None, ints(*[0, 1, 2] * 10)])
def test_an_evaluation_is_read_as_it_was_saved(tmp_path: Path, reference: Ints | None) -> None:
    before = evaluation(*drawn(30, 3, seed=13), reference)
    before.save(tmp_path / "deep" / "kept")
    after = Evaluation.load(tmp_path / "deep" / "kept")
    assert (after.quality, after.cost) == (before.quality, before.cost)
    assert list(after.quality.classes) == list(NAMES)
    np.testing.assert_array_equal(after.probabilities, before.probabilities)
    np.testing.assert_array_equal(after.gold, before.gold)
    assert after.probabilities.dtype == np.float32
    assert after.gold.dtype == np.int64
    assert after.as_dict() == before.as_dict()


def test_an_evaluation_is_not_saved_over_another(tmp_path: Path) -> None:
    first = evaluation(*drawn(30, 3, seed=14))
    first.save(tmp_path / "kept")
    with pytest.raises(OutputError):
        evaluation(*drawn(20, 2, seed=15)).save(tmp_path / "kept")
    assert Evaluation.load(tmp_path / "kept").quality == first.quality
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def without_a_class(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace('"Sci/Tech"', '"体育"'), encoding="utf-8")


def without_a_text(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def without_a_column(path: Path) -> None:
    np.save(path, np.load(path)[:, :-1])


def of_whole_numbers(path: Path) -> None:
    np.save(path, np.load(path).astype(np.int64))


FILES = ["measured.json", "probabilities.npy"]


def with_gold(numbers: str) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'"gold": \[[^]]*\]', f'"gold": [{numbers}]', content), encoding="utf-8")

    return damage


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, Path.unlink) for name in FILES),
        *((name, cut) for name in FILES),
        *((name, lambda path: path.write_bytes(path.read_bytes()[:50])) for name in FILES),
        *((name, lambda path: path.write_bytes(b"\xff" * 300)) for name in FILES),
        *((name, lambda path: path.write_bytes(b"")) for name in FILES),
        ("measured.json", lambda path: path.write_text("[]", encoding="utf-8")),
        ("measured.json", lambda path: path.write_text('{"quality": {}, "cost": {}}', encoding="utf-8")),
        ("measured.json", without_a_class),
        ("probabilities.npy", without_a_text),
        ("probabilities.npy", without_a_column),
        ("probabilities.npy", of_whole_numbers),
        *(("measured.json", with_gold(wrong)) for wrong in ("", "0", "0, -1", "0, 3", "0, 1.5", "0, null", '"a"')),
        ("measured.json", lambda path: path.write_text('{"quality": "x", "cost": {}}', encoding="utf-8")),
    ],
)
def test_a_damaged_evaluation_is_refused(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    evaluation(*drawn(30, 3, seed=16)).save(tmp_path / "kept")
    damage(tmp_path / "kept" / name)
    with pytest.raises(DataError, match="holds no whole evaluation"):
        Evaluation.load(tmp_path / "kept")


def test_where_nothing_was_saved_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        Evaluation.load(tmp_path / "nothing")
    with pytest.raises(DataError):
        read_texts(tmp_path / "nothing")


# The texts


def assert_texts_come_back(data: LabeledSet, folder: Path) -> None:
    write_texts(data, folder)
    found = read_texts(folder)
    assert (found.texts, found.label_names, found.origin) == (data.texts, data.label_names, data.origin)
    assert found.labels.dtype == np.int64
    np.testing.assert_array_equal(found.labels, data.labels)
    assert len(list(folder.iterdir())) == 1


HOSTILE = [
    *(
        "",
        " ",
        "two\nlines\r\nand\ra half\n",
        "\u2028\u2029\x85\x0b\x0c\x1c",
        "\x00\x01\x7f",
        '"quoted" \\n \'it\' {"text": 1}',
    ),
    *("👩‍👩‍👧 🇪🇺", "مرحبا \u202eabc\u202c", "e\u0301 \ufeff\ufffe\uffff", "\U0010ffff", "x" * 100_000),
]


@pytest.mark.parametrize(
    "data",
    [
        LabeledSet(HOSTILE, np.arange(len(HOSTILE)) % 3, NAMES, "a file,\nand a “line”"),
        LabeledSet(["a"], ints(len(HOSTILE) - 1), tuple(HOSTILE)),
        LabeledSet([], ints(), NAMES),
        LabeledSet([], ints(), ()),
    ],
    ids=["hostile texts", "hostile names", "no texts", "no classes"],
)
def test_texts_are_read_as_they_were_written(data: LabeledSet, tmp_path: Path) -> None:
    assert_texts_come_back(data, tmp_path / "deep" / "texts")


@few
@given(st.lists(st.tuples(st.text(max_size=20), st.integers(0, 2)), max_size=8), st.text())
def test_any_texts_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], origin: str
) -> None:
    data = LabeledSet([text for text, _ in rows], ints(*(label for _, label in rows)), NAMES, origin)
    assert_texts_come_back(data, tmp_path_factory.mktemp("texts"))


def test_texts_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    for data in (LabeledSet(["a", "b"], ints(0, 1), NAMES), LabeledSet(["c"], ints(2), NAMES)):
        assert_texts_come_back(data, tmp_path)


ABOUT, ROW = b'{"label_names": ["a", "b"], "origin": "here", "texts": 1}\n', b'{"text": "t", "label": 1}\n'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        ROW,
        ABOUT[:-5],
        ABOUT + ROW[:-4],
        ABOUT + b"\n" + ROW,
        b"[]\n" + ROW,
        ABOUT.replace(b', "origin": "here"', b"") + ROW,
        ABOUT.replace(b', "b"', b"") + ROW,
        ABOUT.replace(b'["a", "b"]', b'"ab"') + ROW,
        ABOUT,
        ABOUT + ROW + ROW,
        *(ABOUT + ROW.replace(b"1", wrong) for wrong in (b"-1", b"0.5", b"[1]", b'"1"', b"true", b"1" + 30 * b"0")),
        ABOUT + ROW.replace(b'"t"', b"null"),
        ABOUT + ROW.replace(b"1", b"null"),
        ABOUT + b'{"label": 1}\n',
        ABOUT + b'{"text": "t"}\n',
        ABOUT + b"3\n",
        ABOUT + ROW.replace(b"t", b"\xff"),
    ],
)
def test_damaged_texts_are_refused(content: bytes, tmp_path: Path) -> None:
    write_texts(LabeledSet(["t"], ints(1), NAMES), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(ABOUT + ROW)
    assert read_texts(tmp_path).texts == ["t"]
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path)


def test_a_threshold_leaves_out_what_it_did_not_count() -> None:
    said = np.array([[0.9999992, 8e-7], [0.9999995, 5e-7]], np.float32)
    found = threshold_for(1.0, said, ints(1, 0))
    assert found is not None
    assert type(found.threshold) is float
    assert (said.max(axis=1) >= found.threshold).tolist() == [False, True]
    assert (found.coverage, found.accuracy) == (0.5, 1)


def test_texts_that_cannot_be_written_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_texts(LabeledSet(["t"], ints(1), NAMES), tmp_path / "file" / "texts")
