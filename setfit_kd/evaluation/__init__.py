"""Quality and cost of classifiers, and how far both can be believed."""

from setfit_kd.evaluation.calibration import (
    Calibration,
    OperatingPoint,
    coverage_curve,
    measure_calibration,
    threshold_for,
)
from setfit_kd.evaluation.intervals import Interval, bootstrap, bootstrap_calibration, bootstrap_share
from setfit_kd.evaluation.measure import Evaluation, evaluate, evaluate_ensemble
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.evaluation.seeds import OverSeeds, Spread, over_seeds
from setfit_kd.evaluation.texts import read_texts, write_texts

__all__ = [
    "Calibration",
    "Evaluation",
    "Interval",
    "OperatingPoint",
    "OverSeeds",
    "Spread",
    "bootstrap",
    "bootstrap_calibration",
    "bootstrap_share",
    "coverage_curve",
    "evaluate",
    "evaluate_ensemble",
    "measure_calibration",
    "measure_quality",
    "over_seeds",
    "read_texts",
    "threshold_for",
    "write_texts",
]
