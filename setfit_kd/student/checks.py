"""What a student's training asks of its pool and signals, told before anything is trained."""

from __future__ import annotations

from setfit_kd.config import StudentConfig, parse_objectives
from setfit_kd.errors import DataError
from setfit_kd.signals import TeacherSignals


def check_pool(pool_size: int, config: StudentConfig) -> None:
    """Refuse texts, those of the pool and the labeled ones, that do not fill one batch.

    Raises:
        DataError: It does not.
    """
    if pool_size < config.batch_size:
        raise DataError(
            f"There are {pool_size} texts to learn from, fewer than one batch of {config.batch_size}.",
            hint=f"Give more texts by --unlabeled, or --batch-size {max(pool_size, 4)} or less.",
        )


def check_embeddings(signals: TeacherSignals, config: StudentConfig) -> None:
    """Refuse signals without the teacher's embeddings where the objective needs them.

    Raises:
        DataError: It does, and there are none.

    Args:
        signals: What a student shall learn from.
        config: How; an objective that is not given needs none.
    """
    if signals.embeddings is None and set(parse_objectives(config.objective or "soft-labels")) != {"soft-labels"}:
        raise DataError(
            f"The signals of {signals.origin} hold no embeddings, which the objective needs.",
            hint="Take --objective soft-labels, or score the pool by a SetFit teacher.",
        )
