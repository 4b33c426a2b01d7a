"""Train a student on a teacher's signals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from setfit_kd.config.stages import StudentConfig
from setfit_kd.data.labeled_set import LabeledSet, encode_labels
from setfit_kd.data.sources import Source, read
from setfit_kd.data.splits import normalize
from setfit_kd.errors import DataError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import family_of, locate_body
from setfit_kd.models.io import new_model
from setfit_kd.student.checks import check_embeddings, check_pool
from setfit_kd.student.steps import student_batch_texts, student_steps, trains_on_labeled_texts
from setfit_kd.training.precision import check_precision
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

    from setfit_kd.signals.signals import TeacherSignals


def train_student(
    signals: TeacherSignals,
    student: str | Path | SentenceTransformer,
    *,
    labeled: LabeledSet | Source | None = None,
    config: StudentConfig | None = None,
    checkpoints: str | Path | None = None,
    **settings: Any,
) -> SetFitModel:
    """Distil a teacher's signals into a student; the teacher itself is not needed.

    Args:
        signals: The teacher's signals on the pool.
        student: The body: a hub name, a folder or ``demo:all-MiniLM-L6-v2``, with the prefix ``transformer:`` to train
            it end to end; or a loaded body, which is trained in place.
        labeled: Texts with gold labels, which are also used to fit the head. A transformer trained on soft labels only
            is also trained on those without signals, with one-hot labels, unless ``alpha`` is 0.
        config: The settings. Each can also be passed by keyword, as in ``train_student(..., epochs=5)``.
        checkpoints: Folder for checkpoints. Training resumes from a checkpoint that is already in it, so use a separate
            folder for each training.

    Returns:
        A `setfit.SetFitModel` with a fitted `sklearn.linear_model.LogisticRegression`; for a transformer, the head has
        the weights of its last layer.

    Raises:
        ConfigError: If a setting is unknown or out of range.
        DataError: If the pool is smaller than a batch, or the labels do not match the signals.
        ModelError: If the body cannot be loaded.
        OutOfMemoryError: If memory runs out even for a single text on the CPU.
        TrainingError: If the loss or the weights are not finite.
        UnavailableError: If the hub cannot be reached.
    """
    config = StudentConfig.merged(config, settings)
    check_pool(len(signals), config)
    if labeled is not None and not isinstance(labeled, LabeledSet):
        labeled = encode_labels(read(labeled, label_column="label"), signals.label_names)
    gold = labeled
    if gold is not None and gold.label_names != signals.label_names:
        raise DataError(
            f"The classes must be the teacher's ({', '.join(signals.label_names)}), got {', '.join(gold.label_names)}.",
            hint="Use the same classes in the same order.",
        )
    if config.objective is None and signals.embeddings is None:
        config = config.model_copy(update={"objective": "soft-labels"})
    check_embeddings(signals, config)
    device = resolve_device(config.device)
    check_precision(config.precision, device)
    if isinstance(student, str | Path):
        body = locate_body(student).load(signals.label_names, seed=config.seed)
    else:
        body = student
    config = config.with_family_defaults(family_of(body))
    if gold is not None and trains_on_labeled_texts(family_of(body), config):
        signals = _append_labeled(signals, gold.take(rows_without_signals(signals, gold)))

    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        from setfit_kd.student.trainer import StudentTrainer
        from setfit_kd.training.loop import train

        def make_trainer(config: StudentConfig, device: torch.device, folder: str) -> StudentTrainer:
            return StudentTrainer(new_model(body, signals.label_names), signals, gold, config, device, folder)

        return train(
            body,
            make_trainer,
            config,
            device=device,
            texts=signals.texts,
            batch_texts=student_batch_texts(config),
            steps=student_steps(config, len(signals)),
            description="Training student",
            checkpoints=checkpoints,
        )


def rows_without_signals(signals: TeacherSignals, labeled: LabeledSet) -> list[int]:
    """Find the rows of the labeled texts without signals (compared by `normalize`), each text once."""
    scored = set(map(normalize, signals.texts))
    return list({text: row for row, text in enumerate(map(normalize, labeled.texts)) if text not in scored}.values())


def _append_labeled(signals: TeacherSignals, labeled: LabeledSet) -> TeacherSignals:
    """Append labeled texts with one-hot probabilities to signals, without the embeddings."""
    one_hot = np.eye(len(labeled.label_names), dtype=np.float32)[labeled.labels]
    probabilities = np.concatenate([signals.probabilities, one_hot])
    return replace(signals, texts=[*signals.texts, *labeled.texts], probabilities=probabilities, embeddings=None)
