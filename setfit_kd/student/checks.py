"""Checks of pool and signals before a student is trained."""

from __future__ import annotations

from setfit_kd.config.stages import StudentConfig
from setfit_kd.config.values import parse_objectives
from setfit_kd.errors import DataError
from setfit_kd.signals.signals import TeacherSignals


def check_pool(pool_size: int, config: StudentConfig) -> None:
    """Check that the texts, pool and labeled texts together, fill at least one batch.

    Raises:
        DataError: If they do not.
    """
    if pool_size < config.batch_size:
        raise DataError(
            f"Expected at least one batch of {config.batch_size} training texts, got {pool_size}.",
            hint=f"Add texts with --unlabeled, or use --batch-size {max(pool_size, 4)} or less.",
        )


def check_embeddings(signals: TeacherSignals, config: StudentConfig) -> None:
    """Check that the signals have the teacher's embeddings if the objective needs them.

    Args:
        signals: The signals to train a student on.
        config: The student's settings. If the objective is None, embeddings are not needed.

    Raises:
        DataError: If the objective needs embeddings and the signals have none.
    """
    if signals.embeddings is None and set(parse_objectives(config.objective or "soft-labels")) != {"soft-labels"}:
        raise DataError(
            f"The signals of {signals.origin} have no embeddings, which the objective needs.",
            hint="Use --objective soft-labels, or score the pool with a SetFit teacher.",
        )
