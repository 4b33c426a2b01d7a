"""Several classifiers that answer as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from setfit_kd.evaluation.cost import Cost
from setfit_kd.evaluation.measure import Evaluation
from setfit_kd.evaluation.quality import measure_quality


def evaluate_together(evaluations: Sequence[Evaluation], shares: Sequence[float]) -> Evaluation:
    """What classifiers come to whose probabilities are averaged, from their evaluations on the same texts.

    Sizes add up, and so do the times: each text passes through every one.

    Args:
        evaluations: One a classifier, at least one.
        shares: Their weights.
    """
    first = evaluations[0]
    probabilities = np.average([of.probabilities for of in evaluations], axis=0, weights=np.asarray(shares))
    probabilities = np.asarray(probabilities, np.float32)
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
