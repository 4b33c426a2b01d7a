"""Thresholds of a multi-label model, above which a text gets a label."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from setfit_kd.config.values import parse_threshold_objective
from setfit_kd.models.heads import head_task, set_thresholds
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL
from setfit_kd.utils.arrays import Floats

logger = logging.getLogger(__name__)


def with_thresholds(head: Any, probabilities: Floats, objective: str, **options: Any) -> Any:
    """Return a head with thresholds from `fit_thresholds`; a single-label head is unchanged."""
    if head_task(head) is SINGLE_LABEL:
        return head
    return set_thresholds(head, fit_thresholds(probabilities, objective, **options))


def fit_thresholds(
    probabilities: Floats, objective: str, *, targets: npt.NDArray[Any] | None = None, label_names: Sequence[str] = ()
) -> Floats:
    """Choose the threshold of each label with the best F1, or the best one with a wanted precision or recall.

    Without labels, the metrics are those expected from the probabilities of typical texts, which must therefore be
    calibrated (Lipton et al., 2014, "Optimal Thresholding of Classifiers to Maximize F1 Measure"). Since the frequency
    of a rare label is hardly known, thresholds for F1 are then moved half of the way, as logits, to the threshold, the
    same for all labels, above which there are as many labels as expected.

    Args:
        probabilities: (n, n_classes) of the model.
        objective: ``f1``; ``precision=X`` for the lowest threshold with this precision; ``recall=X`` for the highest
            threshold with this recall; or a number, the threshold of all labels.
        targets: (n, n_classes) gold labels, 0 or 1. None expects them to occur with the probabilities.
        label_names: Names of the labels, for the warning about labels that do not reach a wanted precision.

    Returns:
        (n_classes,) thresholds; 0.5 for a label without any gold texts, and without texts. A label that does not reach
        the wanted precision gets the threshold with the best F1.
    """
    name, wanted = parse_threshold_objective(objective)
    n, n_classes = probabilities.shape
    if name == "threshold" or not n:
        return np.full(n_classes, wanted if name == "threshold" else 0.5)
    order = np.argsort(-probabilities, axis=0, kind="stable")
    scores = np.take_along_axis(np.asarray(probabilities, np.float64), order, axis=0)
    hits = np.take_along_axis(np.asarray(probabilities if targets is None else targets, np.float64), order, axis=0)
    n_hits, n_predicted, n_positive = hits.cumsum(axis=0), np.arange(1, n + 1)[:, None], hits.sum(axis=0)
    lower = np.concatenate([scores[1:], np.zeros((1, n_classes))])
    is_possible = scores > lower  # equal probabilities cannot be separated
    best = np.where(is_possible, 2 * n_hits / (n_predicted + n_positive), -1).argmax(axis=0)
    labels = np.arange(n_classes)
    if name == "f1" and targets is None:
        return _to_common(probabilities, np.asarray((scores[best, labels] + lower[best, labels]) / 2))
    if name == "recall":
        best = (is_possible & (n_hits >= wanted * n_positive * (1 - 1e-9))).argmax(axis=0)
    elif name == "precision":
        reached = is_possible & (n_hits >= wanted * n_predicted)
        unreached = [label_names[int(label)] for label in np.flatnonzero(~reached.any(axis=0))]
        if unreached:
            message = "No threshold is expected to reach a precision of %g for these labels, which get the best F1: %s."
            logger.warning(message, wanted, ", ".join(unreached[:10]) + ", ..." * (len(unreached) > 10))
        best = np.where(reached.any(axis=0), n - 1 - reached[::-1].argmax(axis=0), best)
    return np.where(n_positive > 0, (scores[best, labels] + lower[best, labels]) / 2, 0.5)


def _to_common(probabilities: Floats, thresholds: Floats) -> Floats:
    """Move thresholds half of the way, as logits, to a common one that as many labels as expected reach."""
    scores = np.sort(probabilities, axis=None)
    index = len(scores) - round(float(scores.sum()))
    common = scores[max(index - 1, 0) : index + 1].mean()
    return MULTI_LABEL.to_probabilities((MULTI_LABEL.to_logits(thresholds) + MULTI_LABEL.to_logits(common)) / 2)
