"""How many steps, and forward passes, a student's training takes at most."""

from __future__ import annotations

from setfit_kd.config import StudentConfig


def student_steps(config: StudentConfig, pool_size: int) -> int:
    """Steps of training a student's body on ``pool_size`` texts."""
    if config.objective == "pairs":
        return config.epochs * -(-pool_size * config.num_iterations // config.batch_size)
    full, rest = divmod(pool_size, config.batch_size)
    return config.epochs * (full + (rest > 1))


def student_passes(config: StudentConfig, pool_size: int) -> int:
    """Texts passed forward in training a student's body on ``pool_size`` texts."""
    return config.epochs * pool_size * (2 * config.num_iterations if config.objective == "pairs" else 1)
