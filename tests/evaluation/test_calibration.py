"""Calibration, confidence thresholds, confidence intervals, and saved evaluations."""

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

from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError, OutputError
from setfit_kd.evaluation.calibration import Calibration, coverage_curve, measure_calibration, threshold_for
from setfit_kd.evaluation.cost import Cost
from setfit_kd.evaluation.intervals import Interval, bootstrap_calibration, bootstrap_proportion, bootstrap_quality
from setfit_kd.evaluation.measure import Evaluation
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.evaluation.texts import read_texts, write_texts

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Answers = list[tuple[int, bool]]
"""Confidence of each answer in percent, and whether it is correct."""

NAMES = ("Wirtschaft", "Sci/Tech", "体育")

few_examples = settings(max_examples=40, deadline=None, derandomize=True)
# Whole percentages, so that ties occur.
answer_lists = st.lists(st.tuples(st.integers(51, 100), st.booleans()), min_size=1, max_size=40)


def ints(*values: int) -> Ints:
    return np.array(values, np.int64)


def binary_predictions(answers: Answers) -> tuple[Floats, Ints]:
    """Return probabilities and gold classes for two classes; the first class is always predicted."""
    confidence = np.array([percent / 100 for percent, _ in answers], np.float32)
    return np.column_stack([confidence, 1 - confidence]), ints(*(int(not correct) for _, correct in answers))


def sample_predictions(n: int, n_classes: int, *, seed: int, power: float = 1) -> tuple[Floats, Ints]:
    """Sample probabilities and gold classes: calibrated for ``power`` 1, overconfident above it."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(n_classes, 0.7), n)
    gold = (rng.random((n, 1)) > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)
    scaled = probabilities**power
    return (scaled / scaled.sum(axis=1, keepdims=True)).astype(np.float32), gold.astype(np.int64)


def sample_classes(gold: Ints, accuracy: float, *, n_classes: int, rng: np.random.Generator) -> Ints:
    """Replace a fraction of 1 - ``accuracy`` of the classes with wrong ones."""
    wrong = (gold + rng.integers(1, n_classes, len(gold))) % n_classes
    return np.where(rng.random(len(gold)) < accuracy, gold, wrong)


def make_evaluation(probabilities: Floats, gold: Ints, reference: Ints | None = None) -> Evaluation:
    predicted = np.asarray(probabilities.argmax(axis=1), np.int64)
    quality = measure_quality(predicted, gold, NAMES[: probabilities.shape[1]], reference)
    cost = Cost(parameters=10, megabytes=0.1, texts_per_second=99.5, device="cpu")
    return Evaluation(quality, cost, probabilities, gold)


# Calibration


@pytest.mark.parametrize(
    ("rows", "gold", "ece", "brier"),
    [
        # The first two texts share a bin: 2 * |0.82 - 1/2| + |0.55 - 1|.
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
def test_calibration_matches_hand_computed_values(
    rows: list[list[float]], gold: list[int], ece: float, brier: float
) -> None:
    calibration = measure_calibration(np.array(rows), ints(*gold))
    assert calibration.ece == pytest.approx(ece)
    assert calibration.brier == pytest.approx(brier)


def naive_ece(probabilities: Floats, gold: Ints, n_bins: int) -> float:
    total = 0.0
    for index in range(n_bins):
        in_bin = [
            (float(max(row)), list(row).index(max(row)) == label)
            for row, label in zip(probabilities, gold, strict=True)
            if index / n_bins <= max(row) < (index + 1) / n_bins or (index == n_bins - 1 and max(row) >= 1)
        ]
        total += abs(sum(confidence for confidence, _ in in_bin) - sum(correct for _, correct in in_bin))
    return total / len(gold)


@few_examples
@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_calibration_error_matches_naive_loop(n: int, n_classes: int, n_bins: int, seed: int) -> None:
    probabilities, gold = sample_predictions(n, n_classes, seed=seed, power=2)
    calibration = measure_calibration(probabilities, gold, n_bins=n_bins)
    assert calibration.ece == pytest.approx(naive_ece(probabilities, gold, n_bins), abs=1e-6)
    assert 0 <= calibration.ece <= 1


@few_examples
@given(answer_lists)
def test_brier_score_of_two_classes_is_twice_that_of_scikit_learn(answers: Answers) -> None:
    from sklearn.metrics import brier_score_loss

    probabilities, gold = binary_predictions(answers)
    expected = 2 * brier_score_loss(gold == 0, probabilities[:, 0], pos_label=True)
    assert measure_calibration(probabilities, gold).brier == pytest.approx(expected, abs=1e-6)


@few_examples
@given(answer_lists, st.integers(1, 20))
def test_bins_contain_each_text_once_and_are_sorted(answers: Answers, n_bins: int) -> None:
    probabilities, gold = binary_predictions(answers)
    bins = measure_calibration(probabilities, gold, n_bins=n_bins).reliability
    assert 1 <= len(bins) <= n_bins
    assert all(b.texts > 0 for b in bins)
    assert sum(b.texts for b in bins) == len(gold)
    assert sum(b.texts * b.accuracy for b in bins) == pytest.approx(sum(correct for _, correct in answers))
    assert sum(b.texts * b.confidence for b in bins) == pytest.approx(float(probabilities[:, 0].sum(dtype=float)))
    confidences = [b.confidence for b in bins]
    assert confidences == sorted(set(confidences))


def test_bin_edge_belongs_to_next_bin_and_confidence_one_to_last_bin() -> None:
    confidence = np.array([0.5, 0.625, 0.75, 0.875, 1.0, 1.0])
    calibration = measure_calibration(np.column_stack([confidence, 1 - confidence]), np.zeros(6, np.int64), n_bins=4)
    assert [(b.texts, b.confidence) for b in calibration.reliability] == [(2, 0.5625), (4, 0.90625)]


def test_confidence_above_one_by_rounding_is_in_last_bin() -> None:
    calibration = measure_calibration(np.array([[np.nextafter(np.float32(1), np.float32(2)), 0]], np.float32), ints(0))
    assert [b.texts for b in calibration.reliability] == [1]
    assert calibration.ece == pytest.approx(0, abs=1e-6)


def simulated_calibration(power: float) -> Calibration:
    return measure_calibration(*sample_predictions(20_000, 4, seed=0, power=power))


def test_gold_classes_sampled_from_probabilities_are_calibrated() -> None:
    calibration = simulated_calibration(1)
    assert calibration.ece < 0.015
    assert max(abs(b.confidence - b.accuracy) for b in calibration.reliability if b.texts > 500) < 0.05
    probabilities, _ = sample_predictions(20_000, 4, seed=0)
    assert calibration.brier == pytest.approx(1 - float(np.square(probabilities).sum(axis=1).mean()), abs=0.01)


@pytest.mark.parametrize(("power", "overconfident"), [(4, True), (0.3, False)])
def test_overconfident_and_underconfident_probabilities_are_not_calibrated(power: float, overconfident: bool) -> None:
    calibration = simulated_calibration(power)
    assert calibration.ece > 0.1
    assert calibration.brier > simulated_calibration(1).brier + 0.02
    assert {b.confidence > b.accuracy for b in calibration.reliability if b.texts > 500} == {overconfident}


# Confidence thresholds


def test_coverage_curve_matches_hand_computed_values() -> None:
    probabilities = np.array([[0.75, 0.25], [0.125, 0.875], [0.25, 0.75], [0.5, 0.5]])
    expected = [[0.875, 1 / 4, 1], [0.75, 3 / 4, 2 / 3], [0.5, 1, 3 / 4]]
    np.testing.assert_allclose(coverage_curve(probabilities, ints(1, 1, 1, 0)), expected)


def assert_curve_matches_brute_force(probabilities: Floats, gold: Ints) -> None:
    curve = coverage_curve(probabilities, gold)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    assert set(curve[:, 0]) == set(confidence.astype(float))
    for threshold, coverage, accuracy in curve:
        answered = confidence >= threshold
        assert coverage == pytest.approx(answered.mean())
        assert accuracy == pytest.approx(is_correct[answered].mean())
    assert (np.diff(curve[:, 0]) < 0).all()
    assert (np.diff(curve[:, 1]) > 0).all()
    assert curve[-1, 1] == 1
    assert curve[-1, 2] == pytest.approx(is_correct.mean())


@few_examples
@given(answer_lists)
@example([(100, True)])
@example([(60, True), (60, False), (60, True)])
def test_coverage_curve_with_ties_matches_brute_force(answers: Answers) -> None:
    assert_curve_matches_brute_force(*binary_predictions(answers))


@few_examples
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_coverage_curve_with_more_classes_matches_brute_force(n: int, n_classes: int, seed: int) -> None:
    assert_curve_matches_brute_force(*sample_predictions(n, n_classes, seed=seed))


def wilson_interval(n_correct: int, n: int) -> tuple[float, float]:
    z, p = 1.959963984540054, n_correct / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return center - half_width, center + half_width


@few_examples
@given(answer_lists, st.one_of(st.floats(0, 1), st.sampled_from([0.5, 2 / 3, 0.75, 0.9, 0.95, 1.0])))
def test_threshold_has_largest_coverage_that_reaches_target(answers: Answers, target: float) -> None:
    probabilities, gold = binary_predictions(answers)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    masks = [confidence >= value for value in confidence]
    candidates = [mask for mask in masks if is_correct[mask].mean() >= target]
    point = threshold_for(target, probabilities, gold)
    if point is None:
        assert not candidates
        return
    # Like `predict`, compare single-precision probabilities with a Python float.
    answered = confidence >= float(point.threshold)
    assert point.coverage == pytest.approx(answered.mean())
    assert point.coverage == pytest.approx(max(mask.mean() for mask in candidates))
    assert point.accuracy == pytest.approx(is_correct[answered].mean())
    assert point.accuracy >= target
    assert point.low - 1e-12 <= point.accuracy <= point.high + 1e-12
    expected = wilson_interval(int(is_correct[answered].sum()), int(answered.sum()))
    assert (point.low, point.high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("target", "n"), [(0.9, 10), (0.95, 20), (0.99, 100), (0.7, 10), (2 / 3, 3), (1.0, 7)])
def test_target_equal_to_accuracy_is_reached(target: float, n: int) -> None:
    n_wrong = n - round(target * n)
    point = threshold_for(target, *binary_predictions([(90, True)] * (n - n_wrong) + [(90, False)] * n_wrong))
    assert point is not None
    assert (point.coverage, point.accuracy) == (1, target)


def test_lowest_threshold_is_below_confident_error() -> None:
    point = threshold_for(0.75, *binary_predictions([(99, False), (90, True), (80, True), (70, True), (60, False)]))
    assert point is not None
    assert 0.6 < point.threshold <= np.float32(0.7)
    assert (point.coverage, point.accuracy) == pytest.approx((0.8, 0.75))


@pytest.mark.parametrize("target", [0.51, 0.9, 1.0])
def test_no_threshold_if_most_confident_answers_are_wrong(target: float) -> None:
    assert threshold_for(target, *binary_predictions([(99, False), (90, True), (80, False), (70, True)])) is None


def test_threshold_from_many_texts_generalizes() -> None:
    point = threshold_for(0.8, *sample_predictions(10_000, 4, seed=1))
    assert point is not None
    probabilities, gold = sample_predictions(10_000, 4, seed=2)
    answered = probabilities.max(axis=1) >= point.threshold
    assert answered.mean() == pytest.approx(point.coverage, abs=0.02)
    assert (probabilities.argmax(axis=1) == gold)[answered].mean() == pytest.approx(0.8, abs=0.02)


# Intervals


def scikit_learn_scores(gold: Ints, predicted: Ints) -> tuple[float, float]:
    from sklearn.metrics import accuracy_score, f1_score

    macro_f1 = f1_score(gold, predicted, labels=np.unique(gold), average="macro", zero_division=0)
    return accuracy_score(gold, predicted), macro_f1


def values(intervals: dict[str, Interval]) -> tuple[float, float]:
    return intervals["accuracy"].value, intervals["macro_f1"].value


@few_examples
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40))
def test_bootstrapped_values_match_scikit_learn(rows: list[tuple[int, int, int]]) -> None:
    gold, predicted, other = np.array(rows, np.int64).T
    intervals, expected = bootstrap_quality(gold, predicted, n_classes=5), scikit_learn_scores(gold, predicted)
    assert values(intervals) == pytest.approx(expected)
    difference = np.subtract(expected, scikit_learn_scores(gold, other))
    assert values(bootstrap_quality(gold, predicted, n_classes=5, other=other)) == pytest.approx(difference, abs=1e-12)
    assert intervals["accuracy"].low <= intervals["accuracy"].value <= intervals["accuracy"].high
    assert all(0 <= interval.low <= interval.high <= 1 for interval in intervals.values())


def accuracy(gold: Ints, predicted: Ints) -> float:
    return float((gold == predicted).mean())


def macro_f1(gold: Ints, predicted: Ints) -> float:
    masks = [(gold == i, predicted == i) for i in set(gold.tolist())]
    return float(np.mean([2 * (g & p).sum() / (g.sum() + p.sum()) for g, p in masks]))


@pytest.mark.parametrize("metric", [accuracy, macro_f1])
@pytest.mark.parametrize("paired", [False, True], ids=["single", "difference"])
def test_quality_intervals_match_scipy(metric: Callable[[Ints, Ints], float], paired: bool) -> None:
    from scipy import stats

    rng = np.random.default_rng(3)
    gold = rng.choice(3, 300, p=[0.6, 0.3, 0.1])
    predicted, other = (sample_classes(gold, share, n_classes=3, rng=rng) for share in (0.85, 0.7))

    def statistic(gold: Ints, predicted: Ints, other: Ints) -> float:
        return metric(gold, predicted) - (metric(gold, other) if paired else 0)

    expected = stats.bootstrap(
        (gold, predicted, other),
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        random_state=np.random.default_rng(4),
    ).confidence_interval
    interval = bootstrap_quality(gold, predicted, n_classes=3, other=other if paired else None)[metric.__name__]
    assert interval.value == pytest.approx(statistic(gold, predicted, other))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert interval.low < interval.value < interval.high


@pytest.mark.parametrize("metric", ["ece", "brier"])
def test_calibration_intervals_match_scipy(metric: str) -> None:
    from scipy import stats

    rng = np.random.default_rng(6)
    probabilities = rng.dirichlet(np.ones(4), 250).astype(np.float32)
    gold = np.where(rng.random(250) < 0.6, probabilities.argmax(axis=1), rng.integers(0, 4, 250))

    def statistic(rows: Ints) -> float:
        return float(getattr(measure_calibration(probabilities[rows], gold[rows]), metric))

    expected = stats.bootstrap(
        (np.arange(250),),
        statistic,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        random_state=np.random.default_rng(7),
    ).confidence_interval
    interval = bootstrap_calibration(probabilities, gold)[metric]
    assert interval.value == pytest.approx(statistic(np.arange(250)))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_calibration_intervals_do_not_depend_on_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    probabilities, gold = rng.dirichlet(np.ones(3), 60), rng.integers(0, 3, 60)
    expected = bootstrap_calibration(probabilities, gold)
    monkeypatch.setattr("setfit_kd.evaluation.intervals._DRAWS_PER_BATCH", 7 * 60)
    assert bootstrap_calibration(probabilities, gold) == expected


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0, 0), (50, 0.40, 0.60), (100, 1, 1)])
def test_interval_of_proportion(count: int, low: float, high: float) -> None:
    interval = bootstrap_proportion(count, 100)
    assert interval.value == count / 100
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.021)


@pytest.mark.parametrize("paired", [False, True], ids=["single", "difference"])
def test_about_95_of_100_intervals_contain_true_accuracy(paired: bool) -> None:
    rng = np.random.default_rng(5)
    n_covering, true_value = 0, 0.1 if paired else 0.8
    for _ in range(100):
        gold = rng.integers(0, 2, 150)
        predicted, other = (sample_classes(gold, share, n_classes=2, rng=rng) for share in (0.8, 0.7))
        interval = bootstrap_quality(gold, predicted, n_classes=2, other=other if paired else None)["accuracy"]
        n_covering += interval.low <= true_value + 1e-9 and interval.high >= true_value - 1e-9
    assert 88 <= n_covering <= 99


def test_difference_to_itself_is_zero() -> None:
    rng = np.random.default_rng(6)
    gold = rng.integers(0, 7, 200)
    predicted = sample_classes(gold, 0.6, n_classes=7, rng=rng)
    intervals = bootstrap_quality(gold, predicted, n_classes=7, other=predicted.copy())
    assert intervals == {"accuracy": Interval(0, 0, 0), "macro_f1": Interval(0, 0, 0)}


def test_paired_interval_is_narrower_than_unpaired_interval() -> None:
    rng = np.random.default_rng(7)
    gold = rng.integers(0, 3, 300)
    predicted = sample_classes(gold, 0.75, n_classes=3, rng=rng)
    other = sample_classes(predicted, 0.96, n_classes=3, rng=rng)
    paired = bootstrap_quality(gold, predicted, n_classes=3, other=other)
    single = [bootstrap_quality(gold, classes, n_classes=3) for classes in (predicted, other)]
    for name, interval in paired.items():
        # Width of the interval if the two classifiers were evaluated on different texts.
        unpaired_width = sqrt(sum((intervals[name].high - intervals[name].low) ** 2 for intervals in single))
        assert 0 < interval.high - interval.low < 0.5 * unpaired_width


def test_interval_shrinks_with_more_texts() -> None:
    gold, predicted = ints(*[0] * 10, *[1] * 10), ints(*[0] * 8, *[1] * 12)
    widths = []
    for times in (1, 16):
        interval = bootstrap_quality(np.tile(gold, times), np.tile(predicted, times), n_classes=2)["accuracy"]
        widths.append(interval.high - interval.low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.25)


def test_intervals_depend_on_seed_and_not_on_text_order() -> None:
    rng = np.random.default_rng(8)
    gold = rng.integers(0, 4, 80)
    predicted = sample_classes(gold, 0.6, n_classes=4, rng=rng)
    intervals = bootstrap_quality(gold, predicted, n_classes=4)
    order = rng.permutation(80)
    np.random.seed(9)
    assert bootstrap_quality(gold[order], predicted[order], n_classes=4) == intervals
    other_seed = bootstrap_quality(gold, predicted, n_classes=4, seed=1)
    assert values(other_seed) == values(intervals)
    assert other_seed["macro_f1"] != intervals["macro_f1"]
    assert other_seed["macro_f1"].low == pytest.approx(intervals["macro_f1"].low, abs=0.03)


@pytest.mark.parametrize(("predicted", "value"), [(2, 1.0), (0, 0.0)])
def test_interval_of_single_text_has_zero_width(predicted: int, value: float) -> None:
    intervals = bootstrap_quality(ints(2), ints(predicted), n_classes=3)
    assert intervals == {"accuracy": Interval(value, value, value), "macro_f1": Interval(value, value, value)}
    assert bootstrap_quality(ints(2), ints(predicted), n_classes=3, other=ints(0))["accuracy"].high == value


def test_single_class_has_perfect_scores() -> None:
    intervals = bootstrap_quality(ints(*[0] * 30), ints(*[0] * 30), n_classes=1)
    assert intervals == {"accuracy": Interval(1, 1, 1), "macro_f1": Interval(1, 1, 1)}


def test_interval_of_macro_f1_excludes_classes_without_gold_texts() -> None:
    gold, predicted = ints(*[0] * 40, *[1] * 40), ints(*[0] * 30, *[2] * 10, *[1] * 40)
    macro_f1 = bootstrap_quality(gold, predicted, n_classes=4)["macro_f1"]
    assert macro_f1.value == pytest.approx((2 * 30 / 70 + 1) / 2)
    # If the two absent classes counted as 0, macro-F1 would be half as large.
    assert macro_f1.low > 0.8


def test_intervals_with_150_classes() -> None:
    rng = np.random.default_rng(10)
    gold = np.repeat(np.arange(150), 10)
    predicted = sample_classes(gold, 0.8, n_classes=150, rng=rng)
    intervals = bootstrap_quality(gold, predicted, n_classes=150)
    assert values(intervals) == pytest.approx(scikit_learn_scores(gold, predicted))
    for interval in intervals.values():
        assert interval.low < interval.value < interval.high
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * sqrt(0.8 * 0.2 / 1500), rel=0.3)


# Evaluations, and their files


def test_evaluation_intervals_and_differences() -> None:
    first, second = (make_evaluation(*sample_predictions(60, 3, seed=seed)) for seed in (11, 12))
    second = make_evaluation(second.probabilities, first.gold)
    predicted = np.asarray(first.probabilities.argmax(axis=1), np.int64)
    assert first.intervals == bootstrap_quality(first.gold, predicted, n_classes=3)
    assert first.calibration_intervals == bootstrap_calibration(first.probabilities, first.gold)
    assert values(first.intervals) == pytest.approx((first.quality.accuracy, first.quality.macro_f1))
    assert first.calibration == measure_calibration(first.probabilities, first.gold)
    difference = first.difference_to(second)
    assert difference == bootstrap_quality(first.gold, predicted, n_classes=3, other=second.predicted)
    assert difference["accuracy"].value == pytest.approx(first.quality.accuracy - second.quality.accuracy)
    assert values(second.difference_to(first)) == pytest.approx([-value for value in values(difference)])


@pytest.mark.parametrize("reference", [None, ints(*[0, 1, 2] * 10)])
def test_saved_evaluation_is_loaded_unchanged(tmp_path: Path, reference: Ints | None) -> None:
    saved = make_evaluation(*sample_predictions(30, 3, seed=13), reference)
    saved.save(tmp_path / "runs" / "evaluation")
    loaded = Evaluation.load(tmp_path / "runs" / "evaluation")
    assert (loaded.quality, loaded.cost) == (saved.quality, saved.cost)
    assert list(loaded.quality.classes) == list(NAMES)
    np.testing.assert_array_equal(loaded.probabilities, saved.probabilities)
    np.testing.assert_array_equal(loaded.gold, saved.gold)
    assert loaded.probabilities.dtype == np.float32
    assert loaded.gold.dtype == np.int64
    assert loaded.as_dict() == saved.as_dict()


def test_saving_does_not_overwrite_existing_evaluation(tmp_path: Path) -> None:
    first = make_evaluation(*sample_predictions(30, 3, seed=14))
    first.save(tmp_path / "evaluation")
    with pytest.raises(OutputError):
        make_evaluation(*sample_predictions(20, 2, seed=15)).save(tmp_path / "evaluation")
    assert Evaluation.load(tmp_path / "evaluation").quality == first.quality
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def rename_class(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace('"Sci/Tech"', '"体育"'), encoding="utf-8")


def drop_row(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def drop_column(path: Path) -> None:
    np.save(path, np.load(path)[:, :-1])


def convert_to_integers(path: Path) -> None:
    np.save(path, np.load(path).astype(np.int64))


FILES = ["measured.json", "probabilities.npy"]


def replace_gold(values: str) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'"gold": \[[^]]*\]', f'"gold": [{values}]', content), encoding="utf-8")

    return damage


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, Path.unlink) for name in FILES),
        *((name, truncate) for name in FILES),
        *((name, lambda path: path.write_bytes(path.read_bytes()[:50])) for name in FILES),
        *((name, lambda path: path.write_bytes(b"\xff" * 300)) for name in FILES),
        *((name, lambda path: path.write_bytes(b"")) for name in FILES),
        ("measured.json", lambda path: path.write_text("[]", encoding="utf-8")),
        ("measured.json", lambda path: path.write_text('{"quality": {}, "cost": {}}', encoding="utf-8")),
        ("measured.json", rename_class),
        ("probabilities.npy", drop_row),
        ("probabilities.npy", drop_column),
        ("probabilities.npy", convert_to_integers),
        *(("measured.json", replace_gold(values)) for values in ("", "0", "0, -1", "0, 3", "0, 1.5", "0, null", '"a"')),
        ("measured.json", lambda path: path.write_text('{"quality": "x", "cost": {}}', encoding="utf-8")),
    ],
)
def test_damaged_evaluation_is_rejected(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    make_evaluation(*sample_predictions(30, 3, seed=16)).save(tmp_path / "evaluation")
    damage(tmp_path / "evaluation" / name)
    with pytest.raises(DataError, match="Cannot read the evaluation"):
        Evaluation.load(tmp_path / "evaluation")


def test_missing_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        Evaluation.load(tmp_path / "missing")
    with pytest.raises(DataError):
        read_texts(tmp_path / "missing")


# The evaluation set


def assert_round_trip(data: LabeledSet, folder: Path) -> None:
    write_texts(data, folder)
    loaded = read_texts(folder)
    assert (loaded.texts, loaded.label_names, loaded.origin) == (data.texts, data.label_names, data.origin)
    assert loaded.labels.dtype == np.int64
    np.testing.assert_array_equal(loaded.labels, data.labels)
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
def test_hostile_texts_are_read_unchanged(data: LabeledSet, tmp_path: Path) -> None:
    assert_round_trip(data, tmp_path / "runs" / "texts")


@few_examples
@given(st.lists(st.tuples(st.text(max_size=20), st.integers(0, 2)), max_size=8), st.text())
def test_any_texts_are_read_unchanged(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], origin: str
) -> None:
    data = LabeledSet([text for text, _ in rows], ints(*(label for _, label in rows)), NAMES, origin)
    assert_round_trip(data, tmp_path_factory.mktemp("texts"))


def test_texts_are_overwritten(tmp_path: Path) -> None:
    for data in (LabeledSet(["a", "b"], ints(0, 1), NAMES), LabeledSet(["c"], ints(2), NAMES)):
        assert_round_trip(data, tmp_path)


HEADER, ROW = b'{"label_names": ["a", "b"], "origin": "here", "texts": 1}\n', b'{"text": "t", "label": 1}\n'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        ROW,
        HEADER[:-5],
        HEADER + ROW[:-4],
        HEADER + b"\n" + ROW,
        b"[]\n" + ROW,
        HEADER.replace(b', "origin": "here"', b"") + ROW,
        HEADER.replace(b', "b"', b"") + ROW,
        HEADER.replace(b'["a", "b"]', b'"ab"') + ROW,
        HEADER,
        HEADER + ROW + ROW,
        *(HEADER + ROW.replace(b"1", label) for label in (b"-1", b"0.5", b"[1]", b'"1"', b"true", b"1" + 30 * b"0")),
        HEADER + ROW.replace(b'"t"', b"null"),
        HEADER + ROW.replace(b"1", b"null"),
        HEADER + b'{"label": 1}\n',
        HEADER + b'{"text": "t"}\n',
        HEADER + b"3\n",
        HEADER + ROW.replace(b"t", b"\xff"),
    ],
)
def test_damaged_texts_are_rejected(content: bytes, tmp_path: Path) -> None:
    write_texts(LabeledSet(["t"], ints(1), NAMES), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(HEADER + ROW)
    assert read_texts(tmp_path).texts == ["t"]
    file.write_bytes(content)
    with pytest.raises(DataError, match="Cannot read"):
        read_texts(tmp_path)


def test_threshold_excludes_slightly_lower_confidence() -> None:
    probabilities = np.array([[0.9999992, 8e-7], [0.9999995, 5e-7]], np.float32)
    point = threshold_for(1.0, probabilities, ints(1, 0))
    assert point is not None
    assert type(point.threshold) is float
    assert (probabilities.max(axis=1) >= point.threshold).tolist() == [False, True]
    assert (point.coverage, point.accuracy) == (0.5, 1)


def test_unwritable_texts_raise_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_texts(LabeledSet(["t"], ints(1), NAMES), tmp_path / "file" / "texts")
