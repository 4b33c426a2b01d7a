"""Train a student on a teacher's signals."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.config.base import Family, resolved
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import StudentConfig
from setfit_kd.config.values import parse_objectives
from setfit_kd.data.labeled_set import LabeledSet, encode_labels
from setfit_kd.data.sources import Source, read
from setfit_kd.data.splits import normalize
from setfit_kd.errors import DataError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import family_of, locate_body
from setfit_kd.models.io import new_model
from setfit_kd.training.precision import check_precision
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

    from setfit_kd.signals.signals import TeacherSignals

HELD_OUT_SHARE, MAX_HELD_OUT, MIN_HELD_OUT = 0.1, 500, 16


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
        DataError: If the pool is smaller than a batch, the labels do not match the signals, or the signals have no
            embeddings and the objective needs them.
        SetFitKDError: As `train_teacher`.
    """
    config = StudentConfig.merged(config, settings)
    check_pool(len(signals), config)
    gold = labeled
    if gold is not None and not isinstance(gold, LabeledSet):
        gold = encode_labels(read(gold, label_column="label"), signals.label_names, signals.task)
    if gold is not None and gold.label_names != signals.label_names:
        raise DataError(
            f"The classes must be the teacher's ({', '.join(signals.label_names)}), got {', '.join(gold.label_names)}.",
            hint="Use the same classes in the same order.",
        )
    if gold is not None and gold.task is not signals.task:
        message = f"{gold.origin} is {gold.task.name}, but the signals of {signals.origin} are {signals.task.name}."
        raise DataError(message, hint="Use labels and signals of the same task.")
    if signals.embeddings is None:
        config = config.model_copy(update={"objective": config.objective or "soft-labels"})
        if set(parse_objectives(resolved(config.objective))) != {"soft-labels"}:
            raise DataError(
                f"The signals of {signals.origin} have no embeddings, which the objective needs.",
                hint="Use --objective soft-labels, or score the pool with a SetFit teacher.",
            )
    device = resolve_device(config.device)
    check_precision(config.precision, device)
    if isinstance(student, str | Path):
        student = locate_body(student).load(signals.label_names, seed=config.seed)
    family = family_of(student)
    config = config.with_family_defaults(family)
    rows = [] if gold is None else rows_without_signals(signals, gold)
    steps = student_steps(config, family, len(signals), len(rows), n_labeled=len(gold or ()))
    if gold is not None and _trains_on_labeled_texts(family, config):
        signals = _append_labeled(signals, gold.take(rows))

    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        from setfit_kd.student.trainer import StudentTrainer
        from setfit_kd.training.loop import train

        return train(
            student,
            partial(StudentTrainer, new_model(student, signals.label_names, signals.task), signals, gold),
            config,
            device=device,
            texts=signals.texts,
            batch_texts=config.batch_size * (2 if config.objective == "pairs" else 1),
            steps=steps,
            description="Training student",
            checkpoints=checkpoints,
        )


def check_pool(pool_size: int, config: StudentConfig) -> None:
    """Raise a `DataError` unless the texts, pool and labeled texts together, fill at least one batch."""
    if pool_size < config.batch_size:
        raise DataError(
            f"Expected at least one batch of {config.batch_size} training texts, got {pool_size}.",
            hint=f"Add texts with --unlabeled, or use --batch-size {max(pool_size, 4)} or less.",
        )


def n_held_out(pool_size: int, config: StudentConfig, n_labeled: int = 0) -> int:
    """Return the number of pool texts to calibrate the student on, measure its agreement and stop early.

    It is not trained on them. Pools that are small, or of which ``n_labeled`` texts leave too few, are only split for
    early stopping.
    """
    n = min(int(HELD_OUT_SHARE * pool_size), MAX_HELD_OUT)
    if n >= MIN_HELD_OUT and (config.patience is not None or n <= pool_size - n_labeled):
        return n
    return 0 if config.patience is None else min(MIN_HELD_OUT, pool_size // 2)


def hold_out(
    n: int, config: StudentConfig, *, avoid: npt.NDArray[np.bool_] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split the rows of a pool of n texts into training rows and `n_held_out` held-out rows, both sorted.

    ``avoid`` is a (n,) mask of rows to hold out only if there are too few others.
    """
    count = n_held_out(n, config, 0 if avoid is None else int(avoid.sum()))
    order = np.random.default_rng([config.seed, 6]).permutation(n)
    if avoid is not None:
        order = np.concatenate([order[~avoid[order]], order[avoid[order]]])
    return np.sort(order[count:]), np.sort(order[:count])


def student_steps(
    config: StudentConfig, family: Family, pool_size: int, n_without_signals: int = 0, *, n_labeled: int = 0
) -> int:
    """Return the maximum number of training steps on texts with signals, and on labeled texts without signals.

    ``n_labeled`` are all labeled texts, with and without signals.
    """
    config = config.with_family_defaults(family)
    trains = _trains_on_labeled_texts(family, config)
    texts = pool_size + n_without_signals * trains
    texts -= n_held_out(texts, config, n_labeled - n_without_signals * (not trains))
    if config.objective == "pairs":
        return config.epochs * -(-texts * config.num_iterations // config.batch_size)
    full, rest = divmod(texts, config.batch_size)
    return config.epochs * (full + (rest > 1))  # a last batch of one text has no pair and is dropped


def labels_only_config(config: RunConfig, pool_size: int, n_without_signals: int = 0, *, n_labeled: int) -> RunConfig:
    """Create the config of a transformer student's baseline: trained on the labels only, for as many steps."""
    student = config.with_family_defaults("transformer")
    steps = student_steps(student, "transformer", pool_size, n_without_signals, n_labeled=n_labeled)
    return config.model_copy(
        update={
            "teacher_steps": steps,
            "teacher_batch_size": student.batch_size,
            "teacher_learning_rate": student.learning_rate,
            "teacher_dropout": student.dropout,
        }
    )


def _trains_on_labeled_texts(family: Family, config: StudentConfig) -> bool:
    """Return whether the body is also trained on labeled texts without signals, see `train_student`."""
    objectives = set(parse_objectives(resolved(config.objective)))
    return family == "transformer" and config.alpha > 0 and objectives == {"soft-labels"}


def rows_without_signals(signals: TeacherSignals, labeled: LabeledSet) -> list[int]:
    """Find the rows of the labeled texts without signals (compared by `normalize`), each text once."""
    scored = set(map(normalize, signals.texts))
    return list({text: row for row, text in enumerate(map(normalize, labeled.texts)) if text not in scored}.values())


def n_without_signals(signals: TeacherSignals, labeled: LabeledSet, config: StudentConfig, family: Family) -> int:
    """Count the labeled texts without signals that the body is trained on, see `train_student`."""
    trains = _trains_on_labeled_texts(family, config.with_family_defaults(family))
    return len(rows_without_signals(signals, labeled)) if trains else 0


def _append_labeled(signals: TeacherSignals, labeled: LabeledSet) -> TeacherSignals:
    """Append labeled texts with one-hot probabilities to signals, without the embeddings."""
    probabilities = np.concatenate([signals.probabilities, labeled.targets])
    return replace(signals, texts=[*signals.texts, *labeled.texts], probabilities=probabilities, embeddings=None)
