"""Train a teacher on a few labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.stages import TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet, check_classes, encode_labels
from setfit_kd.data.sources import Source, read
from setfit_kd.finetune.train import finetune
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import family_of, locate_body
from setfit_kd.models.io import new_model
from setfit_kd.teacher.steps import teacher_batch_texts, teacher_steps, to_finetune_config
from setfit_kd.training.precision import check_precision
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel


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
        body = locate_body(teacher).load(labeled.label_names, seed=config.seed)
    else:
        body = teacher
    if family_of(body) == "transformer":
        finetune_config = to_finetune_config(config, labeled, device)
        return finetune(labeled, body, config=finetune_config, description=description, checkpoints=checkpoints)
    config = config.with_family_defaults("setfit")

    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        from setfit_kd.teacher.trainer import TeacherTrainer
        from setfit_kd.training.loop import train

        def make_trainer(config: TeacherConfig, device: torch.device, folder: str) -> TeacherTrainer:
            return TeacherTrainer(new_model(body, labeled.label_names), labeled, config, device, folder)

        return train(
            body,
            make_trainer,
            config,
            device=device,
            texts=labeled.texts,
            batch_texts=teacher_batch_texts(config, labeled),
            steps=teacher_steps(config, labeled),
            description=description,
            checkpoints=checkpoints,
        )
