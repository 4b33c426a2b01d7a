"""How many steps a student's training takes at most."""

from __future__ import annotations

from setfit_kd.config import Family, RunConfig, StudentConfig, parse_objectives, resolved

HEAD_TEXTS = 20_000
"""Most pool texts that a head is fitted on; a linear head gains nothing from more, and each must be embedded."""
START_TEXTS = 256
"""Pool texts that what an objective trains beside the body is fitted on before training; it goes on from there."""
HELD_OUT_SHARE, MAX_HELD_OUT, MIN_HELD_OUT = 0.1, 500, 16
EVALUATION_STEPS = 500
"""About so many steps lie between two looks at the held-out texts; a look comes at the end of each pass at least."""


def held_out_texts(pool_size: int) -> int:
    """How many of a pool's texts early stopping holds out."""
    return int(min(max(HELD_OUT_SHARE * pool_size, min(MIN_HELD_OUT, pool_size // 2)), MAX_HELD_OUT))


def evaluations_per_epoch(steps: int) -> int:
    """How often a pass of so many steps is interrupted, or ended, by a look at the held-out texts."""
    return max(1, round(steps / EVALUATION_STEPS))


def has_trained_head(family: Family, config: StudentConfig) -> bool:
    """Whether a student comes out of its training with a head: a transformer whose last layer an objective trains."""
    return family == "transformer" and "soft-labels" in parse_objectives(resolved(config.objective))


def trains_on_labeled_texts(family: Family, config: StudentConfig) -> bool:
    """Whether a student's body is trained on labeled texts without signals: a transformer that needs no embeddings."""
    objectives = set(parse_objectives(resolved(config.objective)))
    return family == "transformer" and config.alpha > 0 and objectives == {"soft-labels"}


def labels_only_config(config: RunConfig, pool_size: int, unseen: int = 0) -> RunConfig:
    """How a transformer student's body is trained on hard labels alone, to compare: as the student, for its steps."""
    student = config.with_family_defaults("transformer")
    pool_size += unseen if trains_on_labeled_texts("transformer", student) else 0
    return config.model_copy(
        update={
            "teacher_steps": student_steps(student, pool_size),
            "teacher_batch_size": student.batch_size,
            "teacher_learning_rate": student.learning_rate,
            "teacher_dropout": student.dropout,
        }
    )


def student_batch_texts(config: StudentConfig) -> int:
    """Texts in a whole batch."""
    return config.batch_size * (2 if config.objective == "pairs" else 1)


def student_steps(config: StudentConfig, pool_size: int) -> int:
    """Steps of training a student's body on ``pool_size`` texts."""
    texts = pool_size - (held_out_texts(pool_size) if config.patience is not None else 0)
    if config.objective == "pairs":
        return config.epochs * -(-texts * config.num_iterations // config.batch_size)
    full, rest = divmod(texts, config.batch_size)
    return config.epochs * (full + (rest > 1))  # a last text alone has no pair
