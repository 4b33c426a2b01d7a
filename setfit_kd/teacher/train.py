"""Train a teacher on a few labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.base import Family, StageConfig, resolved
from setfit_kd.config.stages import FinetuneConfig, TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet, check_classes, encode_labels
from setfit_kd.data.sources import Source, read
from setfit_kd.finetune.train import finetune, finetune_steps, resolve_batch_size
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import family_of, locate_body
from setfit_kd.models.io import new_model
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL
from setfit_kd.training.precision import check_precision
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

PAIRS_PER_BATCH = 16
"""SetFit's default."""
MIN_TRANSFORMER_STEPS = 150
"""Default minimum for a transformer teacher; with a few labels, three epochs would hardly change it."""
MIN_STEPS, MIN_EPOCHS = {SINGLE_LABEL: 20, MULTI_LABEL: 80}, 2
"""Default minimum of steps, and of epochs over the labels, for a teacher with the in-batch objective."""


def train_teacher(
    labeled: LabeledSet | Source,
    teacher: str | Path | SentenceTransformer,
    *,
    config: TeacherConfig | None = None,
    description: str = "Training teacher",
    checkpoints: str | Path | None = None,
    **settings: Any,
) -> SetFitModel:
    """Fine-tune a body on a few labels and fit its head; a transformer is fine-tuned end to end.

    Args:
        labeled: The labels: a `LabeledSet`, or anything that `read` accepts, with the columns ``text`` and ``label``.
        teacher: The body: a hub name, a folder or ``demo:all-MiniLM-L6-v2``, with the prefix ``transformer:`` to train
            it end to end; or a loaded body, which is trained in place.
        config: The settings. Each can also be passed by keyword, as in ``train_teacher(..., teacher_steps=40)``.
        description: Name of the phase in the progress bar and in messages.
        checkpoints: Folder for checkpoints. Training resumes from a checkpoint that is already in it, so use a separate
            folder for each training.

    Returns:
        A `setfit.SetFitModel` with a fitted `sklearn.linear_model.LogisticRegression`; for a transformer, the head has
        the weights of its last layer.

    Raises:
        ConfigError: If a setting is unknown or out of range.
        DataError: If the labels cannot be used.
        ModelError: If the body cannot be loaded.
        OutOfMemoryError: If memory runs out even for a single text on the CPU.
        TrainingError: If the loss or the weights are not finite.
        UnavailableError: If the hub cannot be reached.
    """
    config = TeacherConfig.merged(config, settings)
    if not isinstance(labeled, LabeledSet):
        labeled = encode_labels(read(labeled, label_column="label"))
    check_classes(labeled)
    device = resolve_device(config.device)
    check_precision(config.precision, device)
    if isinstance(teacher, str | Path):
        teacher = locate_body(teacher).load(labeled.label_names, seed=config.seed)
    if family_of(teacher) == "transformer":
        finetune_config = to_finetune_config(config, labeled, device)
        return finetune(labeled, teacher, config=finetune_config, description=description, checkpoints=checkpoints)
    config = config.with_family_defaults("setfit")
    steps, batch_texts = steps_and_batch_size(config, labeled, family="setfit", device=device)
    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        from setfit_kd.teacher.trainer import TeacherTrainer
        from setfit_kd.training.loop import train

        return train(
            teacher,
            partial(TeacherTrainer, new_model(teacher, labeled.label_names, labeled.task), labeled),
            config,
            device=device,
            texts=labeled.texts,
            batch_texts=batch_texts,
            steps=steps,
            description=description,
            checkpoints=checkpoints,
        )


def steps_and_batch_size(
    config: TeacherConfig, labeled: LabeledSet, *, family: Family, device: torch.device
) -> tuple[int, int]:
    """Return the number of training steps of a teacher, and the number of texts in a full batch."""
    n = len(labeled)
    if family == "transformer":
        finetune_config = to_finetune_config(config, labeled, device)
        return finetune_steps(finetune_config, n, device), resolve_batch_size(device, finetune_config)
    if config.teacher_objective == "pairs":
        return -(-2 * config.num_iterations * n // PAIRS_PER_BATCH), 2 * PAIRS_PER_BATCH
    batch_size = resolved(config.with_family_defaults("setfit").teacher_batch_size)
    return config.teacher_steps or max(MIN_STEPS[labeled.task], -(-MIN_EPOCHS * n // batch_size)), min(batch_size, n)


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
    # The thresholds are chosen on the pool.
    return finetune_config.model_copy(update={"steps": config.teacher_steps or default_steps, "thresholds": "f1"})
