"""Number of steps and evaluations of a student's training."""

from __future__ import annotations

from setfit_kd.config.base import Family, resolved
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import StudentConfig
from setfit_kd.config.values import parse_objectives

MAX_HEAD_TEXTS = 20_000
"""Maximum number of pool texts to fit a head on. More do not improve a linear head, and each must be embedded."""
MAX_INIT_TEXTS = 256
"""Maximum number of pool texts to fit a loss's initial weights on, before they are trained with the body."""
HELD_OUT_SHARE, MAX_HELD_OUT, MIN_HELD_OUT = 0.1, 500, 16
EVALUATION_STEPS = 500
"""Approximate number of steps between two evaluations; there is one at the end of each epoch in any case."""


def n_held_out(pool_size: int) -> int:
    """Number of pool texts that early stopping holds out."""
    return int(min(max(HELD_OUT_SHARE * pool_size, min(MIN_HELD_OUT, pool_size // 2)), MAX_HELD_OUT))


def evaluations_per_epoch(steps: int) -> int:
    """Number of evaluations in an epoch of ``steps`` steps."""
    return max(1, round(steps / EVALUATION_STEPS))


def has_trained_head(family: Family, config: StudentConfig) -> bool:
    """Return whether the head is a transformer's last layer, which the soft-labels loss trains with the body."""
    return family == "transformer" and "soft-labels" in parse_objectives(resolved(config.objective))


def trains_on_labeled_texts(family: Family, config: StudentConfig) -> bool:
    """Return whether the body is also trained on labeled texts without signals.

    A transformer is if it is trained on soft labels only, unless ``alpha`` is 0.
    """
    objectives = set(parse_objectives(resolved(config.objective)))
    return family == "transformer" and config.alpha > 0 and objectives == {"soft-labels"}


def labels_only_config(config: RunConfig, pool_size: int, n_without_signals: int = 0) -> RunConfig:
    """Create the config of a transformer student's baseline: trained on the labels only, for as many steps.

    Args:
        config: The run's config.
        pool_size: Number of texts with signals.
        n_without_signals: Number of labeled texts without signals.
    """
    student = config.with_family_defaults("transformer")
    pool_size += n_without_signals if trains_on_labeled_texts("transformer", student) else 0
    return config.model_copy(
        update={
            "teacher_steps": student_steps(student, pool_size),
            "teacher_batch_size": student.batch_size,
            "teacher_learning_rate": student.learning_rate,
            "teacher_dropout": student.dropout,
        }
    )


def student_batch_texts(config: StudentConfig) -> int:
    """Number of texts in a full batch."""
    return config.batch_size * (2 if config.objective == "pairs" else 1)


def student_steps(config: StudentConfig, pool_size: int) -> int:
    """Maximum number of training steps of a student on ``pool_size`` texts."""
    texts = pool_size - (n_held_out(pool_size) if config.patience is not None else 0)
    if config.objective == "pairs":
        return config.epochs * -(-texts * config.num_iterations // config.batch_size)
    full, rest = divmod(texts, config.batch_size)
    return config.epochs * (full + (rest > 1))  # a last batch of one text has no pair and is dropped
