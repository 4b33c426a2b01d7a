"""How many steps, and forward passes, a student's training takes at most."""

from __future__ import annotations

from setfit_kd.config import Family, RunConfig, StudentConfig, parse_objectives, settled

HEAD_TEXTS = 20_000
"""Most pool texts that a head is fitted on; a linear head gains nothing from more, and each must be embedded."""
START_TEXTS = 256
"""Pool texts that what an objective trains beside the body is fitted on before training; it goes on from there."""
HELD_OUT_SHARE, MOST_HELD_OUT, LEAST_HELD_OUT = 0.1, 500, 16
LOOK_STEPS = 500
"""About so many steps lie between two looks at the held-out texts; a look comes at the end of each pass at least."""


def held_out_texts(pool_size: int) -> int:
    """How many of a pool's texts early stopping holds out."""
    return int(min(max(HELD_OUT_SHARE * pool_size, min(LEAST_HELD_OUT, pool_size // 2)), MOST_HELD_OUT))


def looks_in_pass(steps: int) -> int:
    """How often a pass of so many steps is interrupted, or ended, by a look at the held-out texts."""
    return max(1, round(steps / LOOK_STEPS))


def trains_own_head(family: Family, config: StudentConfig) -> bool:
    """Whether a student comes out of its training with a head: a transformer whose last layer an objective trains."""
    return family == "transformer" and "soft-labels" in parse_objectives(settled(config.objective))


def on_labels_alone(config: RunConfig, pool_size: int) -> RunConfig:
    """How a transformer student's body is trained on hard labels alone, to compare: as the student, for its steps."""
    student = config.of_family("transformer")
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
    return config.epochs * len(_batches(config, _trained_on(config, pool_size)))


def student_passes(config: StudentConfig, pool_size: int, labeled: int = 0, *, family: Family = "setfit") -> int:
    """Texts passed forward in making a student from ``pool_size`` texts, of which ``labeled`` have a gold label."""
    config = config.of_family(family)
    objectives = set(parse_objectives(settled(config.objective)))
    has_own_head = trains_own_head(family, config)
    trained_on = _trained_on(config, pool_size)
    batches = _batches(config, trained_on)
    columns = 2 if config.objective == "pairs" else 1
    passes = config.epochs * sum(config.passes(batch, columns=columns) for batch in batches)
    if "embedding" in objectives or ("soft-labels" in objectives and not has_own_head):
        passes += min(START_TEXTS, trained_on)
    if config.patience is not None:
        looks = config.epochs * looks_in_pass(len(batches))
        passes += looks * (min(MOST_HELD_OUT, trained_on) + pool_size - trained_on)
    if has_own_head:
        return passes
    gold = labeled if config.gold_weight > 0 else 0
    return passes + min(HEAD_TEXTS, pool_size - gold) + gold


def _trained_on(config: StudentConfig, pool_size: int) -> int:
    return pool_size - (held_out_texts(pool_size) if config.patience is not None else 0)


def _batches(config: StudentConfig, texts: int) -> list[int]:
    """Sizes of the batches of one pass."""
    if config.objective == "pairs":
        full, rest = divmod(texts * config.num_iterations, config.batch_size)
        return [config.batch_size] * full + [rest] * (rest > 0)
    full, rest = divmod(texts, config.batch_size)
    return [config.batch_size] * full + [rest] * (rest > 1)  # a last text alone has no pair
