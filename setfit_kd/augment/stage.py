"""Store augmented texts, and drop those that the teacher is not confident about."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from setfit_kd.errors import DataError
from setfit_kd.models.heads import at_temperature
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import read_json_lines

logger = logging.getLogger(__name__)

_TEXTS = "texts.jsonl"


def save_texts(texts: Sequence[str], folder: Path) -> None:
    """Write augmented texts to a new folder, atomically.

    Raises:
        OutputError: If the folder exists or cannot be written.
    """
    with atomic_folder(folder) as part, (part / _TEXTS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)


def load_texts(folder: Path) -> list[str]:
    """Read texts written by `save_texts`.

    Raises:
        DataError: If they cannot be read.
    """
    try:
        return [str(text) for text in read_json_lines(folder / _TEXTS)]
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the texts in {folder} ({error}).", hint="Create them again.") from None


def drop_uncertain(signals: TeacherSignals, rows: range, *, min_confidence: float) -> TeacherSignals:
    """Remove those of the ``rows`` whose highest probability, at the temperature, is below ``min_confidence``."""
    augmented = np.arange(rows.start, rows.stop)
    confidence = at_temperature(signals.probabilities[augmented], signals.temperature).astype(np.float32).max(axis=1)
    uncertain = augmented[confidence < min_confidence]
    n_kept = len(augmented) - len(uncertain)
    logger.info("The teacher is confident about %d of %d augmented texts.", n_kept, len(augmented))
    return signals.take(np.setdiff1d(np.arange(len(signals)), uncertain))
