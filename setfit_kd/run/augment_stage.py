"""The stage that augments the pool."""

from __future__ import annotations

from pathlib import Path

from setfit_kd.augment import augment_pool, load_fill_mask, load_texts, save_texts
from setfit_kd.config import RunConfig
from setfit_kd.memory import resolve_device
from setfit_kd.run.data import RunData
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run.student_stages import labeled_key
from setfit_kd.run_folder import AUGMENTED
from setfit_kd.utils.hashing import fingerprint, hash_parts


def augmented_texts(config: RunConfig, data: RunData, fill_mask: Path | None, stage_cache: StageCache) -> list[str]:
    """Augment the pool, or load the texts from the run folder.

    Args:
        config: The settings, with device and precision resolved.
        data: The data of the run; texts of its evaluation set are never created.
        fill_mask: Folder of a masked language model, if words are to be replaced by one.
        stage_cache: Cache of stage results.
    """
    n = config.augment
    if n is None:
        return []

    def make() -> list[str]:
        forbidden = data.evaluation.texts if data.evaluation else ()
        model = None
        if fill_mask is not None:
            model = load_fill_mask(fill_mask, device=resolve_device(config.device), batch_size=config.encode_batch_size)
        return augment_pool([*data.pool, *data.labeled.texts], n, seed=config.seed, forbidden=forbidden, fill=model)

    model_key = fill_mask and hash_parts(file.read_bytes() for file in sorted(fill_mask.iterdir()) if file.is_file())
    key = fingerprint(labeled_key(data.labeled), data.pool, labeled_key(data.evaluation), n, model_key, config.seed)
    return stage_cache.run_or_load(AUGMENTED, key, make=make, save=save_texts, load=load_texts)
