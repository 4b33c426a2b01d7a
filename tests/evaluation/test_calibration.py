"""Calibration, confidence thresholds, confidence intervals, and saved evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checks import corrupt_file, truncate_file
from hypothesis import example, given, settings
from hypothesis import strategies as st

from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.evaluation.measure import Cost, Evaluation, read_texts, write_texts
from setfit_kd.evaluation.metrics import (
    N_BINS,
    Interval,
    bootstrap_mean,
    bootstrap_quality,
    coverage_curve,
    measure_calibration,
    measure_quality,
)
from setfit_kd.tasks.classification import Labels, task_of
from setfit_kd.utils.arrays import Floats as AnyFloats

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Answers = list[tuple[int, bool]]
"""Confidence of each answer in percent, and whether it is correct."""

NAMES = ("Wirtschaft", "Sci/Tech", "体育")

few_examples = settings(max_examples=40)
# Whole percentages, so that ties occur.
answer_lists = st.lists(st.tuples(st.integers(51, 100), st.booleans()), min_size=1, max_size=40)


def ints(*values: int) -> Ints:
    return np.array(values, np.int64)


def binary_predictions(answers: Answers) -> tuple[Floats, Ints]:
    """Return probabilities and gold classes for two classes; the first class is always predicted."""
    confidence = np.array([percent / 100 for percent, _ in answers], np.float32)
    return np.column_stack([confidence, 1 - confidence]), ints(*(not correct for _, correct in answers))


def sample_predictions(n: int, n_classes: int, *, seed: int, power: float = 1) -> tuple[Floats, Ints]:
    """Sample probabilities and gold classes: calibrated for ``power`` 1, overconfident above it."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(n_classes, 0.7), n)
    gold = (rng.random((n, 1)) > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)
    scaled = probabilities**power
    return (scaled / scaled.sum(axis=1, keepdims=True)).astype(np.float32), gold.astype(np.int64)


def sample_multi_label(n: int, *, seed: int, power: float = 1) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Sample independent probabilities and gold labels for three labels: calibrated for ``power`` 1."""
    rng = np.random.default_rng(seed)
    probabilities = rng.random((n, 3))
    return (probabilities**power).astype(np.float32), rng.random((n, 3)) < probabilities


def make_evaluation(
    probabilities: Floats, gold: Labels, reference: Labels | None = None, thresholds: AnyFloats | None = None
) -> Evaluation:
    predicted, names = task_of(gold).decide(probabilities, thresholds), NAMES[: probabilities.shape[1]]
    quality = measure_quality(predicted, gold, names, reference, probabilities=probabilities)
    cost = Cost(parameters=10, megabytes=0.1, texts_per_second=99.5, device="cpu")
    return Evaluation(quality, cost, probabilities, gold, thresholds)


@pytest.mark.parametrize(
    ("rows", "gold", "ece", "brier"),
    [
        # The first two texts share a bin: 2 * |0.82 - 1/2| + |0.55 - 1|.
        ([[0.81, 0.19], [0.83, 0.17], [0.45, 0.55]], [0, 1, 1], (2 * 0.32 + 0.45) / 3, 2 * 0.9275 / 3),
        ([[0.5, 0.3, 0.2]], [1], 0.5, 0.25 + 0.49 + 0.04),
        ([[1.0]], [0], 0, 0),
    ],
)
def test_calibration_matches_hand_computed_values(
    rows: list[list[float]], gold: list[int], ece: float, brier: float
) -> None:
    calibration = measure_calibration(np.array(rows), ints(*gold))
    assert calibration.ece == pytest.approx(ece)
    assert calibration.brier == pytest.approx(brier)


@few_examples
@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_calibration_error_and_bins_match_naive_loop(n: int, n_classes: int, seed: int) -> None:
    probabilities, gold = sample_predictions(n, n_classes, seed=seed, power=2)
    confidence, is_correct = probabilities.max(axis=1).astype(float), probabilities.argmax(axis=1) == gold
    calibration, total = measure_calibration(probabilities, gold), 0.0
    numbers = np.minimum(np.floor(confidence * N_BINS), N_BINS - 1)
    for number, b in zip(sorted(set(numbers)), calibration.reliability, strict=True):
        in_bin = numbers == number
        assert b.texts == in_bin.sum()
        assert (b.confidence, b.accuracy) == pytest.approx((confidence[in_bin].mean(), is_correct[in_bin].mean()))
        total += abs(confidence[in_bin].sum() - is_correct[in_bin].sum())
    assert calibration.ece == pytest.approx(total / n, abs=1e-6)


def test_multi_label_calibration_is_that_of_pairs_as_binary_predictions() -> None:
    probabilities, gold = sample_multi_label(200, seed=1, power=2)
    calibration, pairs = measure_calibration(probabilities, gold), probabilities.astype(float).ravel()
    numbers, total = np.minimum(np.floor(pairs * N_BINS), N_BINS - 1), 0.0
    for number, b in zip(sorted(set(numbers)), calibration.reliability, strict=True):
        in_bin = numbers == number
        assert b.texts == in_bin.sum()
        total += abs(pairs[in_bin].sum() - gold.ravel()[in_bin].sum())
    assert calibration.ece == pytest.approx(total / 600)
    assert calibration.brier == pytest.approx(np.square(pairs - gold.ravel()).mean())


def test_bin_edge_belongs_to_next_bin_and_confidence_one_to_last_bin() -> None:
    rounded_up = np.nextafter(np.float32(1), np.float32(2))
    confidence = np.array([9 / 15, 9.5 / 15, 0.8, 14 / 15, 1.0, rounded_up])
    calibration = measure_calibration(np.column_stack([confidence, 1 - confidence]), np.zeros(6, np.int64))
    assert [b.texts for b in calibration.reliability] == [2, 1, 3]


@few_examples
@given(answer_lists)
@example([(100, True)])
@example([(60, True), (60, False), (60, True)])
def test_coverage_curve_with_ties_matches_brute_force(answers: Answers) -> None:
    probabilities, gold = binary_predictions(answers)
    curve = coverage_curve(probabilities, gold)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    assert curve[:, 0].tolist() == sorted(set(confidence.astype(float)), reverse=True)
    for threshold, coverage, accuracy in curve:
        answered = confidence >= threshold
        assert (coverage, accuracy) == pytest.approx((answered.mean(), is_correct[answered].mean()))


@few_examples
@given(answer_lists, st.one_of(st.floats(0, 1), st.sampled_from([0.5, 2 / 3, 0.75, 0.9, 0.95, 1.0])))
@example([(90, True)] * 99 + [(90, False)], 0.99)
@example([(90, True)] * 7 + [(90, False)] * 3, 0.7)
def test_threshold_has_largest_coverage_that_reaches_target(answers: Answers, target: float) -> None:
    from scipy import stats

    probabilities, gold = binary_predictions(answers)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    masks = [confidence >= value for value in confidence]
    candidates = [mask for mask in masks if is_correct[mask].mean() >= target]
    point = make_evaluation(probabilities, gold).operating_point(target)
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
    test = stats.binomtest(int(is_correct[answered].sum()), int(answered.sum()))
    assert (point.low, point.high) == pytest.approx(tuple(test.proportion_ci(method="wilson")), abs=1e-9)


def test_threshold_excludes_slightly_lower_confidence() -> None:
    probabilities = np.array([[0.9999992, 8e-7], [0.9999995, 5e-7]], np.float32)
    point = make_evaluation(probabilities, ints(1, 0)).operating_point(1.0)
    assert point is not None
    assert type(point.threshold) is float
    assert (probabilities.max(axis=1) >= point.threshold).tolist() == [False, True]
    assert (point.coverage, point.accuracy) == (0.5, 1)


def measure(metric: str, predicted: npt.NDArray[Any], gold: Labels) -> float:
    """Measure a metric of classes, or of probabilities for the metrics of calibration."""
    if metric in ("ece", "brier"):
        return float(getattr(measure_calibration(predicted, gold), metric))
    predicted = predicted if predicted.dtype.kind in "bi" else task_of(gold).decide(predicted, None)
    if metric == "accuracy":
        return float((gold == predicted).reshape(len(gold), -1).all(axis=1).mean())
    pairs = [(gold[:, i], predicted[:, i]) for i in range(3)] if gold.ndim == 2 else []
    pairs = pairs or [(gold == i, predicted == i) for i in set(gold.tolist())]
    counts = np.array([(2 * (g & p).sum(), g.sum() + p.sum()) for g, p in pairs])
    counts = counts.sum(axis=0, keepdims=True) if metric == "micro_f1" else counts
    return float((counts[:, 0] / counts[:, 1]).mean())


@few_examples
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40))
def test_values_are_those_of_the_metrics(rows: list[tuple[int, int, int]]) -> None:
    gold, predicted, other = np.array(rows, np.int64).T
    intervals = bootstrap_quality(gold, predicted, n_classes=5)
    differences = bootstrap_quality(gold, predicted, n_classes=5, other=other)
    for metric in ("accuracy", "macro_f1"):
        expected, subtracted = (measure(metric, classes, gold) for classes in (predicted, other))
        assert intervals[metric].value == pytest.approx(expected)
        assert differences[metric].value == pytest.approx(expected - subtracted, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "is_multi"),
    [
        *((metric, False) for metric in ("accuracy", "macro_f1", "ece", "brier", "macro_f1 difference")),
        *((metric, True) for metric in ("accuracy", "macro_f1", "micro_f1", "ece", "brier", "micro_f1 difference")),
    ],
)
def test_intervals_match_scipy(metric: str, is_multi: bool) -> None:
    from scipy import stats

    metric, _, paired = metric.partition(" ")
    (probabilities, gold), (others, _) = (
        sample_multi_label(250, seed=seed, power=power)
        if is_multi
        else sample_predictions(250, 3, seed=seed, power=power)
        for seed, power in ((6, 2), (7, 1))
    )
    other = np.where(np.arange(250)[:, None] % 3 == 0, others, probabilities)

    def statistic(rows: Ints) -> float:
        reference = measure(metric, other[rows], gold[rows]) if paired else 0
        return measure(metric, probabilities[rows], gold[rows]) - reference

    rng = np.random.default_rng(4)
    options: dict[str, Any] = {"n_resamples": 2000, "method": "percentile", "random_state": rng}
    expected = stats.bootstrap((np.arange(250),), statistic, vectorized=False, **options).confidence_interval
    evaluation = make_evaluation(probabilities, gold)
    differences = evaluation.difference_to(make_evaluation(other, gold))
    interval = (differences if paired else {**evaluation.intervals, **evaluation.calibration_intervals})[metric]
    assert interval.value == pytest.approx(statistic(np.arange(250)))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.01)


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0, 0), (50, 0.40, 0.60), (100, 1, 1)])
def test_interval_of_proportion(count: int, low: float, high: float) -> None:
    interval = bootstrap_mean(np.arange(100) < count)
    assert interval.value == count / 100
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.021)


def test_intervals_do_not_depend_on_text_order_or_global_seed() -> None:
    probabilities, gold = sample_predictions(80, 4, seed=8)
    predicted, order = probabilities.argmax(axis=1), np.random.default_rng(0).permutation(80)
    intervals = bootstrap_quality(gold, predicted, n_classes=4)
    np.random.seed(9)
    assert bootstrap_quality(gold[order], predicted[order], n_classes=4) == intervals


def test_interval_of_single_text_and_of_no_difference_has_zero_width() -> None:
    for predicted, value in ((2, 1.0), (0, 0.0)):
        intervals = bootstrap_quality(ints(2), ints(predicted), n_classes=3)
        assert intervals == dict.fromkeys(("accuracy", "macro_f1"), Interval(value, value, value))
        difference = bootstrap_quality(ints(2, 1), ints(predicted, 1), n_classes=3, other=ints(predicted, 1))
        assert difference == dict.fromkeys(("accuracy", "macro_f1"), Interval(0, 0, 0))


# Evaluations, and their files


@pytest.mark.parametrize(
    "saved",
    [
        make_evaluation(*sample_predictions(30, 3, seed=13)),
        make_evaluation(*sample_predictions(30, 3, seed=13), ints(*[0, 1, 2] * 10)),
        make_evaluation(*sample_multi_label(30, seed=13)),
        make_evaluation(*sample_multi_label(30, seed=13), thresholds=np.array([0.1, 0.52, 0.9])),
    ],
    ids=["teacher", "student", "multi-label", "thresholds"],
)
def test_saved_evaluation_is_loaded_unchanged(tmp_path: Path, saved: Evaluation) -> None:
    saved.save(tmp_path / "runs" / "evaluation")
    loaded = Evaluation.load(tmp_path / "runs" / "evaluation")
    assert (loaded.quality, loaded.cost) == (saved.quality, saved.cost)
    np.testing.assert_array_equal(loaded.probabilities, saved.probabilities, strict=True)
    np.testing.assert_array_equal(loaded.gold, saved.gold, strict=True)
    np.testing.assert_array_equal(loaded.predicted, saved.predicted, strict=True)
    assert loaded.as_dict() == saved.as_dict()


def test_saved_single_label_evaluation_has_no_multi_label_fields(tmp_path: Path) -> None:
    make_evaluation(*sample_predictions(30, 3, seed=13)).save(tmp_path / "evaluation")
    measured = json.loads((tmp_path / "evaluation" / "measured.json").read_text("utf-8"))
    assert set(measured["quality"]) == {"accuracy", "macro_f1", "classes", "confusion", "agreement"}
    assert set(measured["quality"]["classes"][NAMES[0]]) == {"precision", "recall", "f1", "support"}


def edit(pattern: str, replacement: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(re.sub(pattern, replacement, path.read_text("utf-8")), "utf-8")


def edit_array(function: Callable[[Floats], npt.NDArray[Any]]) -> Callable[[Path], object]:
    return lambda path: np.save(path, function(np.load(path)))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("measured.json", "probabilities.npy") for damage in (Path.unlink, truncate_file)),
        ("measured.json", corrupt_file),
        ("measured.json", edit(".*", "[]")),
        ("measured.json", edit(".*", '{"quality": {}, "cost": {}}')),
        ("measured.json", edit(".*", '{"quality": "x", "cost": {}}')),
        ("measured.json", edit('"Sci/Tech"', '"体育"')),
        ("probabilities.npy", edit_array(lambda array: array[:-1])),
        ("probabilities.npy", edit_array(lambda array: array[:, :-1])),
        ("probabilities.npy", edit_array(lambda array: array * np.float32("nan"))),
        ("probabilities.npy", edit_array(lambda array: array.astype(np.int64))),
        ("measured.json", edit(r'"gold": \[[^]]*\]', '"gold": [0]')),
    ],
)
def test_damaged_evaluation_is_rejected(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    make_evaluation(*sample_predictions(30, 3, seed=16)).save(tmp_path / "evaluation")
    damage(tmp_path / "evaluation" / name)
    with pytest.raises(DataError, match="Cannot read the evaluation"):
        Evaluation.load(tmp_path / "evaluation")


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ('"thresholds": [^]]*', '"thresholds": [0.5'),
        ('"thresholds": [^]]*', '"thresholds": ["a", 1, 1'),
        ('"task": "multi-label"', '"task": "ranking"'),
        (r'"gold": \[[^]]*\]', '"gold": [[3]'),
        (r'"gold": \[[^]]*\]', '"gold": [3'),
    ],
)
def test_damaged_multi_label_evaluation_is_rejected(tmp_path: Path, pattern: str, replacement: str) -> None:
    make_evaluation(*sample_multi_label(30, seed=16), thresholds=np.full(3, 0.4)).save(tmp_path / "evaluation")
    edit(pattern, replacement)(tmp_path / "evaluation" / "measured.json")
    with pytest.raises(DataError, match="Cannot read the evaluation"):
        Evaluation.load(tmp_path / "evaluation")


# The evaluation set

HOSTILE = ["", " ", "two\nlines\r\nand\ra half\n", "\u2028\u2029\x85\x0b\x0c\x1c", "\x00\x01\x7f", '"quoted" {"a": 1}']
HOSTILE += ["مرحبا \u202eabc\u202c", "e\u0301 \ufeff\ufffe\uffff", "\U0010ffff", "x" * 100_000]


@pytest.mark.parametrize(
    "data",
    [
        LabeledSet(HOSTILE, np.arange(len(HOSTILE)) % 3, NAMES, "a file,\nand a “line”"),
        LabeledSet(["a"], ints(len(HOSTILE) - 1), tuple(HOSTILE)),
        LabeledSet([], ints(), ()),
        LabeledSet(["a", "b", "c"], np.array([[True, False, True], [False] * 3, [True] * 3]), NAMES),
        LabeledSet([], np.zeros((0, 3), bool), NAMES),
    ],
    ids=["hostile texts", "hostile names", "empty", "multi-label", "empty multi-label"],
)
def test_any_texts_are_overwritten_and_read_unchanged(data: LabeledSet, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "texts"
    write_texts(LabeledSet(["a", "b"], ints(0, 1), NAMES), folder)
    write_texts(data, folder)
    loaded = read_texts(folder)
    assert (loaded.texts, loaded.label_names, loaded.origin) == (data.texts, data.label_names, data.origin)
    np.testing.assert_array_equal(loaded.labels, data.labels, strict=True)
    assert len(list(folder.iterdir())) == 1


HEADER = b'{"label_names": ["a", "b"], "origin": "here", "texts": 1, "task": "single-label"}\n'
ROW = b'{"text": "t", "label": 1}\n'
BAD_HEADERS = {b', "origin": "here"': b"", b', "b"': b"", b'["a", "b"]': b'"ab"', HEADER: b"[]\n"}
BAD_ROWS = [b"", b"3\n", ROW[:-4], ROW.replace(b"t", b"\xff"), b'{"text": null, "label": 1}\n']
BAD_ROWS += [ROW.replace(b"1", label) for label in (b"-1", b"0.5", b"true")]


@pytest.mark.parametrize(
    "content",
    [b"", *(HEADER.replace(*change) + ROW for change in BAD_HEADERS.items()), *(HEADER + row for row in BAD_ROWS)],
)
def test_damaged_texts_are_rejected(content: bytes, tmp_path: Path) -> None:
    write_texts(LabeledSet(["t"], ints(1), NAMES), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(HEADER + ROW)
    assert read_texts(tmp_path).texts == ["t"]
    file.write_bytes(content)
    with pytest.raises(DataError, match="Cannot read"):
        read_texts(tmp_path)
