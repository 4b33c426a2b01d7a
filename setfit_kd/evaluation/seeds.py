"""Mean and standard deviation of metrics over several random seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from setfit_kd.evaluation.measure import Evaluation


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (divided by n - 1) and values of a metric over several seeds."""

    mean: float
    std: float
    values: list[float]


@dataclass(frozen=True)
class SeedSummary:
    """Metrics of one model over several seeds.

    Attributes:
        figures: ``accuracy``, ``macro_f1``, ``ece``, ``brier`` and, for a student or baseline, ``agreement``.
        against: Differences of ``accuracy`` and ``macro_f1`` to the reference models, computed within each seed, by
            reference name (``teacher``, ``baseline``).
    """

    figures: dict[str, Spread]
    against: dict[str, dict[str, Spread]]


def summarize_seeds(
    by_seed: Sequence[Mapping[str, Evaluation]], references: Mapping[str, Mapping[str, str]]
) -> dict[str, SeedSummary]:
    """Summarize the evaluations of each model over several seeds, by model name.

    Args:
        by_seed: For each of at least two seeds, the evaluations by model name; each seed has the same models.
        references: For each student, the names of its reference models by role (``teacher``, ``baseline``).
    """
    seeds = [{name: _metrics(evaluation) for name, evaluation in evaluations.items()} for evaluations in by_seed]

    def spread(name: str, metric: str, reference: str | None = None) -> Spread:
        values = [seed[name][metric] - (seed[reference][metric] if reference else 0.0) for seed in seeds]
        return Spread(fmean(values), stdev(values), values)

    return {
        name: SeedSummary(
            {metric: spread(name, metric) for metric in metrics},
            {
                role: {metric: spread(name, metric, reference) for metric in ("accuracy", "macro_f1")}
                for role, reference in references.get(name, {}).items()
            },
        )
        for name, metrics in seeds[0].items()
    }


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    quality, calibration = evaluation.quality, evaluation.calibration
    metrics = {"accuracy": quality.accuracy, "macro_f1": quality.macro_f1, "agreement": quality.agreement}
    return {k: v for k, v in metrics.items() if v is not None} | {"ece": calibration.ece, "brier": calibration.brier}
