"""Stage that augments the pool."""

from __future__ import annotations

from pathlib import Path

from setfit_kd.augment.edits import augment
from setfit_kd.augment.fill_mask import load_fill_mask
from setfit_kd.augment.stage import load_texts, save_texts
from setfit_kd.config.run import RunConfig
from setfit_kd.memory.devices import resolve_device
from setfit_kd.run.data import RunData
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run.student_stages import fingerprint_labeled
from setfit_kd.run_folder.names import AUGMENTED
from setfit_kd.utils.hashing import fingerprint, hash_parts


def augment_or_load(config: RunConfig, data: RunData, fill_mask: Path | None, stage_cache: StageCache) -> list[str]:
    """Augment the pool, or load the augmented texts from the run folder.

    Args:
        config: The settings, with device and precision resolved.
        data: Data of the run; texts of its evaluation set are never created.
        fill_mask: Folder of a masked language model that replaces words; None to use the other edits only.
        stage_cache: Cache of stage results.
    """
    n = config.augment
    if n is None:
        return []

    def run() -> list[str]:
        forbidden = data.evaluation.texts if data.evaluation else ()
        model = None
        if fill_mask is not None:
            model = load_fill_mask(fill_mask, device=resolve_device(config.device), batch_size=config.encode_batch_size)
        return augment([*data.pool, *data.labeled.texts], n, seed=config.seed, forbidden=forbidden, fill=model)

    model_hash = fill_mask and hash_parts(file.read_bytes() for file in sorted(fill_mask.iterdir()) if file.is_file())
    labeled, evaluation = fingerprint_labeled(data.labeled), fingerprint_labeled(data.evaluation)
    inputs_fingerprint = fingerprint(labeled, data.pool, evaluation, n, model_hash, config.seed)
    return stage_cache.run_or_load(AUGMENTED, inputs_fingerprint, run=run, save=save_texts, load=load_texts)
