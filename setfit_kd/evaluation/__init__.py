"""Evaluation of classifiers: quality, calibration, confidence intervals, size and speed."""

from setfit_kd.evaluation.calibration import (
    Calibration,
    OperatingPoint,
    coverage_curve,
    measure_calibration,
    threshold_for,
)
from setfit_kd.evaluation.intervals import Interval, bootstrap_calibration, bootstrap_proportion, bootstrap_quality
from setfit_kd.evaluation.measure import Evaluation, evaluate, evaluate_ensemble
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.evaluation.seeds import SeedSummary, Spread, summarize_seeds
from setfit_kd.evaluation.texts import read_texts, write_texts

__all__ = [
    "Calibration",
    "Evaluation",
    "Interval",
    "OperatingPoint",
    "SeedSummary",
    "Spread",
    "bootstrap_calibration",
    "bootstrap_proportion",
    "bootstrap_quality",
    "coverage_curve",
    "evaluate",
    "evaluate_ensemble",
    "measure_calibration",
    "measure_quality",
    "read_texts",
    "summarize_seeds",
    "threshold_for",
    "write_texts",
]
