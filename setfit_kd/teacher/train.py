"""From a body and a few labels to a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config import TeacherConfig
from setfit_kd.data import LabeledSet, Source, check_classes, encode_labels, read
from setfit_kd.finetune import finetune
from setfit_kd.memory import resolve_device, shared_backoff
from setfit_kd.models import family_of, locate_body, new_model
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
    """Fine-tune a body on a few labels and fit its head; a transformer, end to end.

    Args:
        labeled: The labels: a `LabeledSet`, or anything that `read` takes, with the columns ``text`` and ``label``.
        teacher: The body: a hub name, a folder, ``demo:all-MiniLM-L6-v2``, any of them after ``transformer:`` to be
            trained end to end, or a loaded body, which is changed in place.
        config: The settings; any of them may also be given by keyword, as in ``train_teacher(..., teacher_steps=40)``.
        description: What to call the step on the progress bar.
        checkpoints: Folder in which the training's state is kept from time to time. A training that finds the state of
            an earlier one there goes on from it: give a folder to one training alone.

    Returns:
        A `setfit.SetFitModel` with a fitted `sklearn.linear_model.LogisticRegression`; of a transformer, that is its
        last layer.

    Raises:
        ConfigError: A setting is unknown or out of range.
        DataError: The labels cannot be used.
        ModelError: The body does not load.
        OutOfMemoryError: Not even one text at once fits, on the CPU neither.
        TrainingError: The loss or the weights are no longer finite.
        UnavailableError: The hub cannot be reached.
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
        how = to_finetune_config(config, labeled, device)
        return finetune(labeled, body, config=how, description=description, checkpoints=checkpoints)
    config = config.with_family_defaults("setfit")

    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        from setfit_kd.teacher.trainer import TeacherTrainer
        from setfit_kd.training.loop import train

        def make(settled: TeacherConfig, device: torch.device, scratch: str) -> TeacherTrainer:
            return TeacherTrainer(new_model(body, labeled.label_names), labeled, settled, device, scratch)

        return train(
            body,
            make,
            config,
            device=device,
            texts=labeled.texts,
            batch_texts=teacher_batch_texts(config, labeled),
            steps=teacher_steps(config, labeled),
            description=description,
            checkpoints=checkpoints,
        )
