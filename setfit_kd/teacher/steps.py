"""How many steps a teacher's training takes, and on which texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from setfit_kd.config import Family, FinetuneConfig, StageConfig, TeacherConfig, resolved
from setfit_kd.data import LabeledSet
from setfit_kd.finetune import finetune_steps, resolve_batch_size

if TYPE_CHECKING:
    import torch

PAIRS_BATCH = 16
"""Pairs in a batch, as SetFit has it by default."""


MIN_UPDATES = 150
"""What a transformer teacher takes at least: with a few labels, three passes would leave it where it was."""
MIN_STEPS, MIN_EPOCHS = 20, 2
"""What an in-batch teacher takes unless told otherwise: so many steps, and so many passes over all labels."""


def teacher_batches(config: TeacherConfig, labeled: LabeledSet) -> list[list[int]]:
    """The batches of the in-batch objective, as rows of the labeled set."""
    from setfit_kd.losses import balanced_batches

    return balanced_batches(
        labeled.labels,
        batch_size=resolved(config.teacher_batch_size),
        steps=teacher_steps(config, labeled),
        seed=config.seed,
    )


def teacher_steps(config: TeacherConfig, labeled: LabeledSet) -> int:
    """Steps of training a teacher's body."""
    if config.teacher_objective == "pairs":
        return -(-_pairs(config, labeled) // PAIRS_BATCH)
    config = config.with_family_defaults("setfit")
    return config.teacher_steps or max(MIN_STEPS, -(-MIN_EPOCHS * len(labeled) // resolved(config.teacher_batch_size)))


def teacher_batch_texts(config: TeacherConfig, labeled: LabeledSet) -> int:
    """Texts in a whole batch."""
    if config.teacher_objective == "pairs":
        return 2 * PAIRS_BATCH
    return min(resolved(config.teacher_batch_size), len(labeled))


def resolve_teacher_batch_size(
    config: TeacherConfig, labeled: LabeledSet, *, family: Family, device: torch.device
) -> int:
    """Texts in a whole batch on a device; those of a transformer are more where there is an accelerator."""
    if family == "transformer":
        return resolve_batch_size(device, to_finetune_config(config, labeled, device))
    return teacher_batch_texts(config.with_family_defaults(family), labeled)


def to_finetune_config(config: TeacherConfig, labeled: LabeledSet, device: torch.device) -> FinetuneConfig:
    """How a transformer teacher is fine-tuned: three passes over the labels, or `MIN_UPDATES` steps."""
    config = config.with_family_defaults("transformer")
    found = FinetuneConfig.of(
        **{name: getattr(config, name) for name in StageConfig.model_fields},
        batch_size=config.teacher_batch_size,
        learning_rate=config.teacher_learning_rate,
        dropout=config.teacher_dropout,
    ).with_family_defaults("transformer")
    steps = config.teacher_steps or max(MIN_UPDATES, finetune_steps(found, len(labeled), device))
    return found.model_copy(update={"steps": steps})


def training_steps(config: TeacherConfig, labeled: LabeledSet, *, family: Family, device: torch.device) -> int:
    """Steps of training a teacher of a family on a device."""
    if family == "transformer":
        return finetune_steps(to_finetune_config(config, labeled, device), len(labeled), device)
    return teacher_steps(config, labeled)


def _pairs(config: TeacherConfig, labeled: LabeledSet) -> int:
    return 2 * config.num_iterations * len(labeled)
