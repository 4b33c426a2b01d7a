"""How much of a figure is the luck of a draw: the same models made with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from setfit_kd.evaluation.measure import Evaluation


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds: its mean, its standard deviation (of a sample: over n - 1), and each seed's own."""

    mean: float
    std: float
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least two values."""
        return cls(fmean(values), stdev(values), [float(value) for value in values])


@dataclass(frozen=True)
class OverSeeds:
    """What one model comes to over several seeds.

    Attributes:
        figures: ``accuracy``, ``macro_f1``, ``ece`` and ``brier``; for a student or baseline ``agreement``, too.
        against: By the name of what it is compared with, ``accuracy`` and ``macro_f1`` less the other's of that seed.
    """

    figures: dict[str, Spread]
    against: dict[str, dict[str, Spread]]


def over_seeds(
    by_seed: Sequence[Mapping[str, Evaluation]], compared_with: Mapping[str, Mapping[str, str]]
) -> dict[str, OverSeeds]:
    """Each model of a run that was made with several seeds.

    Args:
        by_seed: For each seed, the evaluations by the model's name; at least two seeds, with the same models.
        compared_with: For a student's name, what it is compared with: the model's name by what to call it.
    """
    measured = [{name: _figures(of) for name, of in evaluations.items()} for evaluations in by_seed]
    found = {}
    for name in measured[0]:
        figures = {figure: Spread.of([seed[name][figure] for seed in measured]) for figure in measured[0][name]}
        against = {
            called: {
                figure: Spread.of([seed[name][figure] - seed[other][figure] for seed in measured])
                for figure in ("accuracy", "macro_f1")
            }
            for called, other in compared_with.get(name, {}).items()
        }
        found[name] = OverSeeds(figures, against)
    return found


def _figures(of: Evaluation) -> dict[str, float]:
    quality, calibration = of.quality, of.calibration
    figures = {
        "accuracy": quality.accuracy,
        "macro_f1": quality.macro_f1,
        "agreement": quality.agreement,
        "ece": calibration.ece,
        "brier": calibration.brier,
    }
    return {name: value for name, value in figures.items() if value is not None}
