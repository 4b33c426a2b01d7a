"""Several classifiers that answer as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from setfit_kd.evaluation.cost import Cost
from setfit_kd.evaluation.measure import Evaluation
from setfit_kd.evaluation.quality import measure_quality
from setfit_kd.temperature import at_temperature


def evaluate_together(
    evaluations: Sequence[Evaluation],
    shares: Sequence[float],
    temperatures: Sequence[float],
    average_temperature: float,
) -> Evaluation:
    """What classifiers come to whose probabilities are averaged, from their evaluations on the same texts.

    As in `TeacherSignals.average`, what is averaged are the probabilities before each one's temperature. Sizes add up,
    and so do the times: each text passes through every one.

    Args:
        evaluations: One a classifier, at least one, each at its temperature.
        shares: Their weights.
        temperatures: The temperature of each.
        average_temperature: That of the average.
    """
    first = evaluations[0]
    sharp = [at_temperature(e.probabilities, 1 / t) for e, t in zip(evaluations, temperatures, strict=True)]
    averaged = np.average(sharp, axis=0, weights=np.asarray(shares))
    probabilities = np.asarray(at_temperature(averaged, average_temperature), np.float32)
    predicted = np.asarray(probabilities.argmax(axis=1), np.int64)
    cost = Cost(
        parameters=sum(of.cost.parameters for of in evaluations),
        megabytes=round(sum(of.cost.megabytes for of in evaluations), 1),
        texts_per_second=round(1 / sum(1 / max(of.cost.texts_per_second, 0.1) for of in evaluations), 1),
        device=first.cost.device,
    )
    return Evaluation(
        measure_quality(predicted, first.gold, list(first.quality.classes)), cost, probabilities, first.gold
    )
