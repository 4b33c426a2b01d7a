"""The stage that makes further pool texts, and what is kept of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from setfit_kd.config import RunConfig
from setfit_kd.data import RunData, augment
from setfit_kd.errors import DataError
from setfit_kd.files import read_json_lines, whole_folder
from setfit_kd.hashing import content_name, fingerprint
from setfit_kd.journal import Journal
from setfit_kd.memory import resolve_device
from setfit_kd.models import load_fill_mask
from setfit_kd.runfolder import AUGMENTED
from setfit_kd.signals import TeacherSignals
from setfit_kd.stages import key_of
from setfit_kd.temperature import at_temperature

logger = logging.getLogger(__name__)

_TEXTS = "texts.jsonl"


def made_texts(config: RunConfig, data: RunData, fill_mask: Path | None, journal: Journal) -> list[str]:
    """Further texts, none of them in the pool, among the labeled texts or in the evaluation set.

    Args:
        config: The settings, device and precision settled; how many are wanted among them.
        data: What they are made of.
        fill_mask: Folder of a masked language model to make some of them by.
        journal: What has been gone through.
    """
    wanted = config.augment
    if wanted is None:
        return []

    def make() -> list[str]:
        forbidden = data.evaluation.texts if data.evaluation else ()
        model = None
        if fill_mask is not None:
            model = load_fill_mask(fill_mask, device=resolve_device(config.device), batch_size=config.encode_batch_size)
        texts = [*data.pool, *data.labeled.texts]
        made = augment(texts, wanted, seed=config.seed, forbidden=forbidden, fill=model)
        if len(made) < wanted:
            logger.warning("Of %d texts, only %d others could be made.", len(texts), len(made))
        return made

    def save(texts: list[str], folder: Path) -> None:
        with whole_folder(folder) as part, (part / _TEXTS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)

    def load(folder: Path) -> list[str]:
        try:
            return [str(text) for text in read_json_lines(folder / _TEXTS)]
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no whole texts ({error}).", hint="Make them again.") from None

    model_key = fill_mask and content_name(file.read_bytes() for file in sorted(fill_mask.iterdir()) if file.is_file())
    key = fingerprint(key_of(data.labeled), data.pool, key_of(data.evaluation), wanted, model_key, config.seed)
    return journal.go_through(AUGMENTED, key, make=make, save=save, load=load)


def without_doubtful(signals: TeacherSignals, rows: range, *, least: float) -> TeacherSignals:
    """Signals without those of the ``rows`` whose most probable label, at the temperature, is below ``least``."""
    if not rows:
        return signals
    made = np.arange(rows.start, rows.stop)
    confidence = at_temperature(signals.probabilities[made], signals.temperature).astype(np.float32).max(axis=1)
    doubtful = made[confidence < least]
    logger.info("Of %d texts that were made, the teacher is sure enough of %d.", len(made), len(made) - len(doubtful))
    return signals.take(np.setdiff1d(np.arange(len(signals)), doubtful))
