"""How many steps a teacher's training takes, and on which texts."""

from __future__ import annotations

from setfit_kd.config import TeacherConfig
from setfit_kd.data import LabeledSet

PAIRS_BATCH = 16
"""Pairs in a batch, as SetFit has it by default."""


def teacher_batches(config: TeacherConfig, labeled: LabeledSet) -> list[list[int]]:
    """The batches of the in-batch objective, as rows of the labeled set."""
    from setfit_kd.objectives import balanced_batches

    return balanced_batches(
        labeled.labels, batch_size=config.teacher_batch_size, steps=config.teacher_steps, seed=config.seed
    )


def teacher_steps(config: TeacherConfig, labeled: LabeledSet) -> tuple[int, int]:
    """Steps, and texts passed forward, of training a teacher's body."""
    if config.teacher_objective == "in-batch":
        return config.teacher_steps, sum(map(len, teacher_batches(config, labeled)))
    pairs = 2 * config.num_iterations * len(labeled)
    return -(-pairs // PAIRS_BATCH), 2 * pairs
