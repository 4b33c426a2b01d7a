"""How many steps a student's training takes."""

from __future__ import annotations

from setfit_kd.config import StudentConfig


def student_steps(config: StudentConfig, pool_size: int) -> tuple[int, int]:
    """Steps and texts passed forward when training a student on ``pool_size`` texts."""
    if config.objective == "similarity":
        full, rest = divmod(pool_size, config.batch_size)
        return config.epochs * (full + (rest > 1)), config.epochs * pool_size
    pairs = pool_size * config.num_iterations
    return config.epochs * -(-pairs // config.batch_size), config.epochs * 2 * pairs
