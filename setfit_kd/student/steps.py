"""How many steps, and forward passes, a student's training takes."""

from __future__ import annotations

from setfit_kd.config import StudentConfig


def student_steps(config: StudentConfig, pool_size: int) -> int:
    """Steps of training a student's body on ``pool_size`` texts."""
    if config.objective == "similarity":
        full, rest = divmod(pool_size, config.batch_size)
        return config.epochs * (full + (rest > 1))
    return config.epochs * -(-pool_size * config.num_iterations // config.batch_size)


def student_passes(config: StudentConfig, pool_size: int) -> int:
    """Texts passed forward in training a student's body on ``pool_size`` texts."""
    passes_of_a_text = 1 if config.objective == "similarity" else 2 * config.num_iterations
    return config.epochs * pool_size * passes_of_a_text
