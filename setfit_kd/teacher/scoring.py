"""Score a pool with a teacher: compute its embeddings and soft labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.config.stages import SignalsConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.models.encode import embed, head_proba
from setfit_kd.models.temperature import fit_temperature, head_at_temperature, head_logits
from setfit_kd.signals.embedding_cache import cached_embed
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.teacher.self_training import MAX_TEXTS, refine
from setfit_kd.utils.arrays import sample_rows

if TYPE_CHECKING:
    from setfit import SetFitModel


def score(
    teacher: SetFitModel,
    texts: Sequence[str],
    *,
    encode_batch_size: int = 32,
    origin: str = "a SetFit teacher",
    cache: bool = False,
) -> TeacherSignals:
    """Compute a teacher's embeddings and probabilities for a pool, in one pass over the texts.

    Args:
        teacher: A trained SetFit model, on the device to use.
        texts: n texts.
        encode_batch_size: Texts per forward pass.
        origin: Name of the signals' source, stored with them.
        cache: Read the embeddings from disk if the same teacher has embedded the same texts before, and store them
            otherwise. The environment variable ``SETFIT_KD_CACHE`` sets the folder.

    Returns:
        Signals with probabilities (n, n_classes) and embeddings (n, d).

    Raises:
        DataError: If there are no texts, or the teacher has no label names.
    """
    texts, embeddings = _embed_texts(teacher, texts, encode_batch_size, cache)
    return _to_signals(teacher, texts, embeddings, origin)


def _embed_texts(
    teacher: SetFitModel, texts: Sequence[str], encode_batch_size: int, cache: bool
) -> tuple[list[str], npt.NDArray[np.floating]]:
    """Return the n texts and their (n, d) embeddings."""
    if isinstance(texts, str):
        raise DataError("The texts to score must be a list, got a single string.", hint="Pass a list of texts.")
    texts = [str(text) for text in texts]
    if not texts:
        raise DataError("Expected at least one text to score, got no texts.", hint="Pass the texts of the pool.")
    if not teacher.labels:
        raise DataError("The teacher has no label names.", hint="Set teacher.labels.")
    embeddings = (cached_embed if cache else embed)(
        teacher.model_body,
        texts,
        batch_size=encode_batch_size,
        normalize=teacher.normalize_embeddings,
        description="Scoring pool",
    )
    return texts, embeddings


def _to_signals(
    teacher: SetFitModel, texts: list[str], embeddings: npt.NDArray[np.floating], origin: str
) -> TeacherSignals:
    """Compute the probabilities of the teacher's head and return the signals."""
    return TeacherSignals(texts, head_proba(teacher, embeddings), tuple(teacher.labels or ()), embeddings, origin)


def refine_and_score(
    teacher: SetFitModel,
    labeled: LabeledSet,
    pool: Sequence[str],
    *,
    config: SignalsConfig | None = None,
    origin: str = "a SetFit teacher",
    **settings: Any,
) -> tuple[SetFitModel, TeacherSignals]:
    """Refine a teacher's head on the pool, then score the pool and the labeled texts.

    Args:
        teacher: A trained SetFit model, on the device to use; it is not changed.
        labeled: The m labeled texts it was trained on.
        pool: n unlabeled texts.
        config: The settings. Each can also be passed by keyword, as in ``refine_and_score(..., refine="none")``.
        origin: Name of the signals' source, stored with them.

    Returns:
        The refined teacher, which shares its body with ``teacher``, and n + m signals: the pool's texts, followed by
        the labeled texts, which a student treats as any other text. Refinement sharpens the signals' probabilities;
        their temperature calibrates them. The refined teacher's own probabilities are at that temperature.

    Raises:
        ConfigError: If a setting is unknown or out of range.
        DataError: If there are no texts, or the teacher has no label names.
    """
    config = SignalsConfig.merged(config, settings)
    with shared_backoff(cpu_fallback=config.cpu_fallback):
        texts, embeddings = _embed_texts(teacher, [*pool, *labeled.texts], config.encode_batch_size, config.cache)
    refined = refine(
        teacher,
        labeled,
        embeddings[len(pool) :],
        embeddings[: len(pool)],
        method=config.refine,
        head_c=config.head_c,
        balance=config.balance,
        seed=config.seed,
    )
    signals = _to_signals(refined, texts, embeddings, origin)
    if refined is teacher:
        return refined, signals
    # Sharp labels are good targets but overconfident; the head from before the refinement calibrates them.
    rows = sample_rows(np.arange(len(pool)), MAX_TEXTS, seed=[config.seed, 8])
    sample = np.asarray(embeddings[rows], np.float64)
    temperature = fit_temperature(head_logits(refined.model_head, sample), head_proba(teacher, sample))
    refined.model_head = head_at_temperature(refined.model_head, temperature)
    return refined, replace(signals, temperature=temperature)
