"""From signals to a student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from setfit_kd.config import StudentConfig
from setfit_kd.data import LabeledSet, Source, encode_labels, normalise, read
from setfit_kd.errors import DataError
from setfit_kd.memory import resolve_device, shared_backoff
from setfit_kd.models import family_of, locate_body, new_model
from setfit_kd.student.checks import check_embeddings, check_pool
from setfit_kd.student.steps import student_batch_texts, student_steps, trains_on_labeled_texts
from setfit_kd.training.precision import check_precision
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

    from setfit_kd.signals import TeacherSignals


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
        signals: The teacher's signals over the pool.
        student: The body: a hub name, a folder, ``demo:all-MiniLM-L6-v2``, any of them after ``transformer:`` to be
            trained end to end, or a loaded body, which is changed in place.
        labeled: Texts with gold labels, which the head is fitted on too. A transformer trained on soft labels alone
            learns from those that the signals lack as well, by their one-hot labels; not at ``alpha`` 0.
        config: The settings; any of them may also be given by keyword, as in ``train_student(..., epochs=5)``.
        checkpoints: Folder in which the training's state is kept from time to time. A training that finds the state of
            an earlier one there goes on from it: give a folder to one training alone.

    Returns:
        A `setfit.SetFitModel` with a fitted `sklearn.linear_model.LogisticRegression`; of a transformer, that is its
        last layer.

    Raises:
        ConfigError: A setting is unknown or out of range.
        DataError: The pool is smaller than a batch, or labels do not match.
        ModelError: The body does not load.
        OutOfMemoryError: Not even one text at once fits, on the CPU neither.
        TrainingError: The loss or the weights are no longer finite.
        UnavailableError: The hub cannot be reached.
    """
    config = StudentConfig.merged(config, settings)
    check_pool(len(signals), config)
    if labeled is not None and not isinstance(labeled, LabeledSet):
        labeled = encode_labels(read(labeled, label_column="label"), signals.label_names)
    gold = labeled
    if gold is not None and gold.label_names != signals.label_names:
        raise DataError(
            f"The labels {', '.join(gold.label_names)} are not the teacher's: {', '.join(signals.label_names)}.",
            hint="Give the same classes in the same order.",
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
        signals = _with_labels(signals, gold.take(rows_without_signals(signals, gold)))

    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        from setfit_kd.student.trainer import StudentTrainer
        from setfit_kd.training.loop import train

        def make(settled: StudentConfig, device: torch.device, scratch: str) -> StudentTrainer:
            return StudentTrainer(new_model(body, signals.label_names), signals, gold, settled, device, scratch)

        return train(
            body,
            make,
            config,
            device=device,
            texts=signals.texts,
            batch_texts=student_batch_texts(config),
            steps=student_steps(config, len(signals)),
            description="Training student",
            checkpoints=checkpoints,
        )


def rows_without_signals(signals: TeacherSignals, labeled: LabeledSet) -> list[int]:
    """Rows of labeled texts that the signals lack (see `normalise`), each text once."""
    known = set(map(normalise, signals.texts))
    return list({key: row for row, key in enumerate(map(normalise, labeled.texts)) if key not in known}.values())


def _with_labels(signals: TeacherSignals, labeled: LabeledSet) -> TeacherSignals:
    """Signals without embeddings, followed by labeled texts with one-hot probabilities."""
    one_hot = np.eye(len(labeled.label_names), dtype=np.float32)[labeled.labels]
    probabilities = np.concatenate([signals.probabilities, one_hot])
    return replace(signals, texts=[*signals.texts, *labeled.texts], probabilities=probabilities, embeddings=None)
