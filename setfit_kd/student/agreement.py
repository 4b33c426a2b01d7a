"""Early stopping by agreement with the teacher, which needs no labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from setfit_kd.config.stages import StudentConfig
from setfit_kd.models.encode import embed
from setfit_kd.models.heads import fit_head, get_head
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.student.distil import MAX_HELD_OUT
from setfit_kd.tasks.classification import SINGLE_LABEL, Task
from setfit_kd.training.loss_trainer import EvaluationCallback
from setfit_kd.utils.arrays import sample_rows
from setfit_kd.utils.console import show_progress

logger = logging.getLogger(__name__)

EVALUATION_STEPS = 500
"""Approximate number of steps between two evaluations; there is one at the end of each epoch in any case."""


def soft_agreement(
    teacher: npt.NDArray[np.floating], student: npt.NDArray[np.floating], task: Task = SINGLE_LABEL
) -> float:
    """Compute the mean overlap, 0 to 1, of two (n, n_classes) distributions: one minus their total variation distance.

    It is smoother than the share of equal predictions, and so more reliable on few held-out texts. In a multi-label
    task, each label has two outcomes, and their overlaps are averaged.
    """
    return 1 - float(np.abs(teacher - student).sum(axis=1).mean()) / (2 if task is SINGLE_LABEL else teacher.shape[1])


@dataclass
class AgreementCallback(EvaluationCallback):
    """Callback that stops training when agreement with the teacher stops improving, and keeps the best weights.

    Each evaluation compares the student with the teacher on held-out rows of the signals, by a head that is fitted on a
    sample of the training rows; or, if these are None, by the last layer, which is trained with the body.
    """

    signals: TeacherSignals
    training_rows: npt.NDArray[np.int64] | None
    held_out_rows: npt.NDArray[np.int64]
    config: StudentConfig

    def is_due(self, step: int, args: Any, state: Any) -> bool:
        """Evaluate at the end of each epoch, and at equal intervals within long epochs."""
        steps_per_epoch = max(1, round(state.max_steps / args.num_train_epochs))
        n_evaluations = max(1, round(steps_per_epoch / EVALUATION_STEPS))
        return bool(step * n_evaluations % steps_per_epoch < n_evaluations)

    def measure(self, step: int) -> float:
        """Compute the agreement on the held-out texts."""
        config, sample = self.config, np.empty(0, np.int64)
        if self.training_rows is not None:
            sample = sample_rows(self.training_rows, MAX_HELD_OUT, seed=[config.seed, 9])
        texts = [self.signals.texts[row] for row in np.concatenate([sample, self.held_out_rows])]
        with show_progress(False):
            embeddings = embed(self.body, texts, batch_size=config.encode_batch_size, description="Measuring agreement")
        if self.training_rows is None:
            head = get_head(self.body)
        else:
            probabilities = self.signals.probabilities[sample]
            head = fit_head(embeddings[: len(sample)], probabilities, task=self.signals.task, C=config.soft_labels_c)
        student = head.predict_proba(embeddings[len(sample) :])
        agreement = soft_agreement(self.signals.probabilities[self.held_out_rows], student, self.signals.task)
        logger.debug("Step %d: agreement with the teacher on held-out texts is %.4f.", step, agreement)
        return agreement
