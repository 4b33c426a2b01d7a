"""What differs between the classification of texts with one label each and with any number of labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64] | npt.NDArray[np.bool_]
"""Single-label: (n,) int64, the class of each text. Multi-label: (n, n_classes) bool, whether a text has a label."""


@dataclass(frozen=True)
class Task:
    """Functions of a task over n texts and its classes.

    Attributes:
        name: ``single-label`` or ``multi-label``.
        to_probabilities: Converts (n, n_classes) logits to probabilities.
        to_logits: Converts (n, n_classes) probabilities to finite logits.
        cross_entropy: Computes the (n,) cross-entropy of (n, n_classes) logits and target probabilities.
        decide: Predicts labels from (n, n_classes) probabilities and the (n_classes,) thresholds of a multi-label task.
        confidence: Computes the probability of the prediction for each text, (n, 1), or of each label, (n, n_classes).
        joint_probability: Computes the (n,) probability that all labels of a text are as given.
        targets: Converts labels to (n, n_classes) float32 target probabilities, given the number of classes.
        problem_type: Name of the task in the config of a transformers model.
        multi_target_strategy: SetFit's name of a head for the task.
    """

    name: str
    to_probabilities: Callable[[Floats], Floats]
    to_logits: Callable[[Floats], Floats]
    cross_entropy: Callable[[Floats, Floats], Floats]
    decide: Callable[[Floats, Floats | None], Labels]
    confidence: Callable[[Floats], Floats]
    joint_probability: Callable[[Floats, Labels], Floats]
    targets: Callable[[Labels, int], npt.NDArray[np.float32]]
    problem_type: str
    multi_target_strategy: str | None = None


def is_equal(labels: Labels, others: Labels) -> npt.NDArray[np.bool_]:
    """Return (n,) whether all labels of each text are equal."""
    equal = labels == others
    return np.asarray(equal if equal.ndim == 1 else equal.all(axis=1), bool)


def task_of(labels: Labels) -> Task:
    """Return the task of labels."""
    return SINGLE_LABEL if labels.ndim == 1 else MULTI_LABEL


def _softmax(logits: Floats) -> Floats:
    from scipy.special import softmax

    return np.asarray(softmax(logits, axis=1))


def _log(probabilities: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(np.asarray(probabilities, np.float64), np.finfo(np.float32).tiny)))


def _softmax_cross_entropy(logits: Floats, targets: Floats) -> Floats:
    from scipy.special import log_softmax

    return np.asarray(-(targets * log_softmax(logits, axis=1)).sum(axis=1))


def _sigmoid(logits: Floats) -> Floats:
    from scipy.special import expit

    return np.asarray(expit(logits))


def _logit(probabilities: Floats) -> Floats:
    values = np.asarray(probabilities, np.float64)
    return np.asarray(_log(values) - _log(1 - values))


def _sigmoid_cross_entropy(logits: Floats, targets: Floats) -> Floats:
    return np.asarray((np.logaddexp(0, logits) - targets * logits).sum(axis=1))


def _above(probabilities: Floats, thresholds: Floats | None) -> Labels:
    return np.asarray(probabilities >= (0.5 if thresholds is None else thresholds), bool)


SINGLE_LABEL = Task(
    "single-label",
    to_probabilities=_softmax,
    to_logits=_log,
    cross_entropy=_softmax_cross_entropy,
    decide=lambda probabilities, _: np.asarray(probabilities.argmax(axis=1), np.int64),
    confidence=lambda probabilities: probabilities.max(axis=1, keepdims=True),
    joint_probability=lambda probabilities, labels: probabilities[np.arange(len(labels)), labels],
    targets=lambda labels, n_classes: np.eye(n_classes, dtype=np.float32)[labels],
    problem_type="single_label_classification",
)
MULTI_LABEL = Task(
    "multi-label",
    to_probabilities=_sigmoid,
    to_logits=_logit,
    cross_entropy=_sigmoid_cross_entropy,
    decide=_above,
    confidence=lambda probabilities: np.maximum(probabilities, 1 - probabilities),
    joint_probability=lambda probabilities, labels: np.where(labels, probabilities, 1 - probabilities).prod(axis=1),
    targets=lambda labels, _: labels.astype(np.float32),
    problem_type="multi_label_classification",
    multi_target_strategy="one-vs-rest",
)
TASKS = {task.name: task for task in (SINGLE_LABEL, MULTI_LABEL)}
