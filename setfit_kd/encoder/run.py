"""Run of `setfit-kd encoder`: read the data, train the encoder, evaluate and write it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from setfit_kd.config.encoder import EncoderConfig, EncoderRunConfig
from setfit_kd.data.sources import SentencePairs, read_pairs
from setfit_kd.data.splits import normalize
from setfit_kd.encoder.train import check_settings, load_models, read_rows, train_on_rows
from setfit_kd.errors import DataError
from setfit_kd.memory.backoff import move_model, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import content_hash
from setfit_kd.models.encode import embed
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.files import fingerprint
from setfit_kd.utils.output_folder import Trained, open_output_folder

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_SPEARMAN = "spearman"  # key by which ``metrics.json`` is recognized


def encoder_run(config: EncoderRunConfig) -> Trained:
    """Train a sentence encoder, evaluate it, and write it to a folder in the format of sentence-transformers.

    The metric is Spearman's rank correlation of cosines and scores, before and after training; None without scores.
    An interrupted run that is started again resumes from its last checkpoint, in a folder next to the output folder.

    Raises:
        SetFitKDError: If an input or a setting cannot be used; no partial files are left behind.
    """
    check_settings(config, nli=config.nli, teacher=config.teacher, texts=config.texts)
    options: Any = {"overwrite": config.overwrite, "command": "encoder", "keys": {_SPEARMAN}}
    with open_output_folder(config.output_dir, **options) as output, shared_backoff(cpu_fallback=config.cpu_fallback):
        columns, nli, sts = (config.first_column, config.second_column), None, None
        if config.nli is not None:
            nli = read_pairs(config.nli, *columns, config.label_column)
        if config.sts is not None:
            sts = read_pairs(config.sts, *columns, config.score_column, scored=True)
        if nli is not None and sts is not None:
            nli = _remove_leaks(nli, sts)
        rows = read_rows(config, nli=nli, texts=config.texts)
        device = resolve_device(config.device)
        body, teacher = load_models(config.model, config.teacher, rows.texts, config, device)
        before = None if sts is None else spearman(body, sts, device, config)
        hashes = [content_hash(part) for part in (body, teacher) if part is not None]
        data = rows.texts, [column.tolist() for column in rows.columns], rows.labels.tolist()
        training = fingerprint(EncoderConfig.fingerprint_inputs(config), hashes, *data)
        train_on_rows(body, rows, teacher, config, device, checkpoints=output.checkpoints / training)
        after = None if sts is None else spearman(body, sts, device, config)
        metrics = {_SPEARMAN: {"before": before, "after": after}}
        output.write(partial(_save, body), {**metrics, "settings": config.model_dump(mode="json")})
        return Trained(body, metrics)


def spearman(body: SentenceTransformer, pairs: SentencePairs, device: torch.device, config: EncoderConfig) -> float:
    """Compute Spearman's rank correlation of the cosine of each pair with its score."""
    move_model(body, device, phase="Evaluating")
    n, texts = len(pairs.values), [*pairs.first, *pairs.second]
    rows = embed(body, texts, batch_size=config.encode_batch_size, normalize=True, description="Evaluating")
    cosines = np.einsum("ij,ij->i", rows[:n], rows[n:], dtype=np.float32)
    return float(spearmanr(cosines, pairs.values).statistic)


def _remove_leaks(pairs: SentencePairs, held_out: SentencePairs) -> SentencePairs:
    """Remove the pairs whose `normalize`d texts are a pair to evaluate on, in any order, and warn of their number."""

    def keys(pairs: SentencePairs) -> list[frozenset[str]]:
        return [frozenset(map(normalize, texts)) for texts in zip(pairs.first, pairs.second, strict=True)]

    seen = set(keys(held_out))
    rows = [row for row, key in enumerate(keys(pairs)) if key not in seen]
    if len(rows) == len(pairs.values):
        return pairs
    message = "Leak guard: removed %d labeled pairs that are also in the evaluation set."
    logger.warning(message, len(pairs.values) - len(rows))
    if not rows:
        message = f"{pairs.origin}: no pairs are left without those of {held_out.origin}."
        raise DataError(message, hint="Pass other pairs with --nli or --sts.")
    first, second, values = ([column[row] for row in rows] for column in (pairs.first, pairs.second, pairs.values))
    return SentencePairs(first, second, values, f"{pairs.origin} without the pairs of the evaluation set")


def _save(body: SentenceTransformer, folder: Path) -> None:
    with atomic_folder(folder) as part, quiet_libraries(with_setfit=False):
        body.save_pretrained(str(part), create_model_card=False)
