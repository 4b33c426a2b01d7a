"""Cross-validated accuracy of a teacher, by which several teachers can be weighted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.config.base import Family
from setfit_kd.config.stages import TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.memory.backoff import move_model, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.encode import predict_proba
from setfit_kd.teacher.steps import training_steps
from setfit_kd.teacher.train import train_teacher

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer


MAX_FOLDS, MIN_LABELS_PER_CLASS = 4, 3

Rows = npt.NDArray[np.int64]


def _folds(labeled: LabeledSet, seed: int) -> list[tuple[Rows, Rows]]:
    """Split the labels into folds of training rows and held-out rows; return none if there are too few labels."""
    from sklearn.model_selection import StratifiedKFold

    if labeled.counts.min() < MIN_LABELS_PER_CLASS:
        return []
    splitter = StratifiedKFold(min(MAX_FOLDS, int(labeled.counts.min())), shuffle=True, random_state=seed)
    return list(splitter.split(labeled.texts, labeled.labels))


def cross_validation_steps(config: TeacherConfig, labeled: LabeledSet, *, family: Family, device: torch.device) -> int:
    """Count the training steps of `cross_validated_accuracy`."""
    folds = _folds(labeled, config.seed)
    return sum(training_steps(config, labeled.take(train), family=family, device=device) for train, _ in folds)


def cross_validated_accuracy(
    labeled: LabeledSet, load_body: Callable[[], SentenceTransformer], *, config: TeacherConfig
) -> float | None:
    """Measure a teacher's accuracy by stratified cross-validation on its labels.

    There are at most `MAX_FOLDS` folds; for each, a new teacher is trained on the other folds.

    Args:
        labeled: The labels.
        load_body: Function that returns a new copy of the body.
        config: The teacher's settings.

    Returns:
        The accuracy, from 0 to 1; None if a class has fewer than `MIN_LABELS_PER_CLASS` labels.
    """
    folds = _folds(labeled, config.seed)
    if not folds:
        return None
    n_correct = 0
    for number, (train_rows, held_out_rows) in enumerate(folds, 1):
        phase = f"Cross-validating teacher, fold {number} of {len(folds)}"
        with shared_backoff(cpu_fallback=config.cpu_fallback):
            model = train_teacher(labeled.take(train_rows), load_body(), config=config, description=phase)
            move_model(model.model_body, resolve_device(config.device), phase=phase)
            held_out = labeled.take(held_out_rows)
            probabilities = predict_proba(model, held_out.texts, batch_size=config.encode_batch_size, description=phase)
            del model  # free its memory before the next one is trained
        n_correct += int((np.asarray(probabilities).argmax(axis=1) == held_out.labels).sum())
    return n_correct / len(labeled)
