"""Number of steps and batches of a teacher's training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from setfit_kd.config.base import Family, StageConfig, resolved
from setfit_kd.config.stages import FinetuneConfig, TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.finetune.steps import finetune_steps, resolve_batch_size

if TYPE_CHECKING:
    import torch

PAIRS_PER_BATCH = 16
"""SetFit's default."""
MIN_TRANSFORMER_STEPS = 150
"""Default minimum for a transformer teacher; with a few labels, three epochs would hardly change it."""
MIN_STEPS, MIN_EPOCHS = 20, 2
"""Default minimum of steps, and of epochs over the labels, for a teacher with the in-batch objective."""


def teacher_batches(config: TeacherConfig, labeled: LabeledSet) -> list[list[int]]:
    """Draw the batches of the in-batch objective, as rows of the labeled set."""
    from setfit_kd.losses.contrastive import balanced_batches

    return balanced_batches(
        labeled.labels,
        batch_size=resolved(config.teacher_batch_size),
        steps=teacher_steps(config, labeled),
        seed=config.seed,
    )


def teacher_steps(config: TeacherConfig, labeled: LabeledSet) -> int:
    """Number of training steps of a SetFit teacher's body."""
    if config.teacher_objective == "pairs":
        return -(-_n_pairs(config, labeled) // PAIRS_PER_BATCH)
    config = config.with_family_defaults("setfit")
    return config.teacher_steps or max(MIN_STEPS, -(-MIN_EPOCHS * len(labeled) // resolved(config.teacher_batch_size)))


def teacher_batch_texts(config: TeacherConfig, labeled: LabeledSet) -> int:
    """Number of texts in a full batch of a SetFit teacher."""
    if config.teacher_objective == "pairs":
        return 2 * PAIRS_PER_BATCH
    return min(resolved(config.teacher_batch_size), len(labeled))


def resolve_teacher_batch_size(
    config: TeacherConfig, labeled: LabeledSet, *, family: Family, device: torch.device
) -> int:
    """Number of texts in a full batch of a teacher of a family; a transformer's default depends on the device."""
    if family == "transformer":
        return resolve_batch_size(device, to_finetune_config(config, labeled, device))
    return teacher_batch_texts(config.with_family_defaults(family), labeled)


def to_finetune_config(config: TeacherConfig, labeled: LabeledSet, device: torch.device) -> FinetuneConfig:
    """Convert to the config of a transformer teacher: by default 3 epochs, at least `MIN_TRANSFORMER_STEPS` steps."""
    config = config.with_family_defaults("transformer")
    finetune_config = FinetuneConfig.of(
        **{name: getattr(config, name) for name in StageConfig.model_fields},
        batch_size=config.teacher_batch_size,
        learning_rate=config.teacher_learning_rate,
        dropout=config.teacher_dropout,
    ).with_family_defaults("transformer")
    default_steps = max(MIN_TRANSFORMER_STEPS, finetune_steps(finetune_config, len(labeled), device))
    return finetune_config.model_copy(update={"steps": config.teacher_steps or default_steps})


def training_steps(config: TeacherConfig, labeled: LabeledSet, *, family: Family, device: torch.device) -> int:
    """Number of training steps of a teacher of a family on a device."""
    if family == "transformer":
        return finetune_steps(to_finetune_config(config, labeled, device), len(labeled), device)
    return teacher_steps(config, labeled)


def _n_pairs(config: TeacherConfig, labeled: LabeledSet) -> int:
    return 2 * config.num_iterations * len(labeled)
