"""How far a teacher can be trusted, measured on the few labels alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.config import Family, TeacherConfig
from setfit_kd.data import LabeledSet
from setfit_kd.memory import move_model, resolve_device, shared_backoff
from setfit_kd.models import predict_proba
from setfit_kd.teacher.steps import training_steps
from setfit_kd.teacher.train import train_teacher

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

FOLDS, MIN_LABELS = 4, 3
"""Parts of the labels that are held out in turn; and labels that each class must have for that."""


Rows = npt.NDArray[np.int64]


def _folds(labeled: LabeledSet, seed: int) -> list[tuple[Rows, Rows]]:
    """Rows to train on and rows held out, of each part; none where there are too few labels."""
    from sklearn.model_selection import StratifiedKFold

    if labeled.counts.min() < MIN_LABELS:
        return []
    folds = StratifiedKFold(min(FOLDS, int(labeled.counts.min())), shuffle=True, random_state=seed)
    return list(folds.split(labeled.texts, labeled.labels))


def cross_validation_steps(config: TeacherConfig, labeled: LabeledSet, *, family: Family, device: torch.device) -> int:
    """Training steps of `cross_validated_accuracy`."""
    parts = _folds(labeled, config.seed)
    return sum(training_steps(config, labeled.take(rest), family=family, device=device) for rest, _ in parts)


def cross_validated_accuracy(
    labeled: LabeledSet, fresh_body: Callable[[], SentenceTransformer], *, config: TeacherConfig
) -> float | None:
    """Share of the labels that a teacher gets right which was trained on the others.

    The labels are cut into `FOLDS` parts with as much of each class, and the teacher is trained anew without each: a
    teacher that has seen a label knows it.

    Args:
        labeled: The labels.
        fresh_body: Gives the body as it comes, a new one each time.
        config: How the teacher is trained.

    Returns:
        The accuracy, from 0 to 1; None where a class has fewer than `MIN_LABELS` labels.
    """
    parts = _folds(labeled, config.seed)
    if not parts:
        return None
    right = 0
    for number, (rest, held_out) in enumerate(parts, 1):
        name = f"Weighing teacher, part {number} of {len(parts)}"
        with shared_backoff(cpu_fallback=config.cpu_fallback):
            model = train_teacher(labeled.take(rest), fresh_body(), config=config, description=name)
            move_model(model.model_body, resolve_device(config.device), phase=name)
            apart = labeled.take(held_out)
            said = predict_proba(model, apart.texts, batch_size=config.encode_batch_size, description=name)
            del model  # before the next one is trained
        right += int((np.asarray(said).argmax(axis=1) == apart.labels).sum())
    return right / len(labeled)
