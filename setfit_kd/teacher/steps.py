"""How many steps a teacher's training takes, and on which texts."""

from __future__ import annotations

from setfit_kd.config import TeacherConfig
from setfit_kd.data import LabeledSet

PAIRS_BATCH = 16
"""Pairs in a batch, as SetFit has it by default."""


LEAST_STEPS, LEAST_PASSES = 20, 2
"""What an in-batch teacher takes unless told otherwise: so many steps, and so many passes over all labels."""


def teacher_batches(config: TeacherConfig, labeled: LabeledSet) -> list[list[int]]:
    """The batches of the in-batch objective, as rows of the labeled set."""
    from setfit_kd.objectives import balanced_batches

    return balanced_batches(
        labeled.labels,
        batch_size=config.teacher_batch_size,
        steps=teacher_steps(config, labeled),
        seed=config.seed,
    )


def teacher_steps(config: TeacherConfig, labeled: LabeledSet) -> int:
    """Steps of training a teacher's body."""
    if config.teacher_objective == "pairs":
        return -(-_pairs(config, labeled) // PAIRS_BATCH)
    return config.teacher_steps or max(LEAST_STEPS, -(-LEAST_PASSES * len(labeled) // config.teacher_batch_size))


def teacher_batch_texts(config: TeacherConfig, labeled: LabeledSet) -> int:
    """Texts in a whole batch."""
    if config.teacher_objective == "pairs":
        return 2 * PAIRS_BATCH
    return min(config.teacher_batch_size, len(labeled))


def teacher_passes(config: TeacherConfig, labeled: LabeledSet) -> int:
    """Texts passed forward in making a teacher."""
    if config.teacher_objective == "in-batch":
        batches, columns = [len(batch) for batch in teacher_batches(config, labeled)], 1
    else:
        full, rest = divmod(_pairs(config, labeled), PAIRS_BATCH)
        batches, columns = [PAIRS_BATCH] * full + [rest], 2
    passes = sum(config.passes(batch, columns=columns) for batch in batches)
    return passes + len(labeled)


def _pairs(config: TeacherConfig, labeled: LabeledSet) -> int:
    return 2 * config.num_iterations * len(labeled)
