"""Quality and cost of classifiers."""

from setfit_kd.evaluation.measure import Evaluation, evaluate
from setfit_kd.evaluation.quality import ClassQuality, Quality, measure_quality

__all__ = ["ClassQuality", "Evaluation", "Quality", "evaluate", "measure_quality"]
