"""Early stopping on agreement with the teacher, for which no labels are needed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from setfit_kd.models import embed, fit_head, resolve_c
from setfit_kd.signals import TeacherSignals
from setfit_kd.student.steps import MAX_HELD_OUT, evaluations_per_epoch, held_out_texts
from setfit_kd.training.callbacks import EvaluationCallback
from setfit_kd.utils.arrays import sample_rows
from setfit_kd.utils.console import show_progress

logger = logging.getLogger(__name__)


def hold_out(
    n: int, *, seed: int, spared: npt.NDArray[np.bool_] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to train on and rows to hold out of a pool of n texts, both sorted; ``spared`` ones are held out last."""
    count = held_out_texts(n)
    order = np.random.default_rng([seed, 6]).permutation(n)
    if spared is not None:
        order = np.concatenate([order[~spared[order]], order[spared[order]]])
    return np.sort(order[count:]), np.sort(order[:count])


def soft_agreement(teacher: npt.NDArray[np.floating], student: npt.NDArray[np.floating]) -> float:
    """Mean probability that two (n, n_classes) distributions share, 0 to 1: one minus their total variation.

    Smoother than the share of equal classes, and so the better guide where few texts are held out.
    """
    return float(np.minimum(teacher, student).sum(axis=1).mean())


@dataclass
class AgreementCallback(EvaluationCallback):
    """Stops training once the student agrees no better with the teacher, and keeps its best weights.

    At each look a head is fitted on a sample of the training texts and compared with the teacher on held-out ones.

    Attributes:
        signals: The teacher's signals.
        training_rows, held_out_rows: Rows of the signals, see `hold_out`.
        head_c, balance: As in `RunConfig`.
        encode_batch_size: Texts a forward pass.
        seed: Of the sample.
    """

    signals: TeacherSignals
    training_rows: npt.NDArray[np.int64]
    held_out_rows: npt.NDArray[np.int64]
    head_c: float | str
    balance: bool
    encode_batch_size: int
    seed: int

    def is_due(self, step: int, args: Any, state: Any) -> bool:
        """At the end of a pass and, in a long one, at equal distances within it."""
        steps_per_pass = max(1, round(state.max_steps / args.num_train_epochs))
        looks = evaluations_per_epoch(steps_per_pass)
        return bool(step * looks % steps_per_pass < looks)

    def measure(self, step: int) -> float:
        """The agreement."""
        sample = sample_rows(self.training_rows, MAX_HELD_OUT, seed=[self.seed, 9])
        rows = np.concatenate([sample, self.held_out_rows])
        with show_progress(None):
            embeddings = embed(
                self.body,
                [self.signals.texts[row] for row in rows],
                batch_size=self.encode_batch_size,
                description="Comparing with teacher",
            )
        head = fit_head(
            embeddings[: len(sample)],
            self.signals.probabilities[sample],
            C=resolve_c(self.head_c),
            balance=self.balance,
        )
        student = head.predict_proba(embeddings[len(sample) :])
        agreement = soft_agreement(self.signals.probabilities[self.held_out_rows], student)
        logger.debug("Step %d: agreement with the teacher %.4f on held-out texts.", step, agreement)
        return agreement

    def restore(self) -> None:
        """Put the best weights back."""
        super().restore()
        if self.best_weights:
            logger.info("The student agrees best with the teacher after step %d.", self.best_step)
