"""A teacher's one pass over the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.config import SignalsConfig
from setfit_kd.data import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.memory import shared_backoff
from setfit_kd.models import embed, fit_temperature, head_at_temperature, head_proba, logits
from setfit_kd.signals import TeacherSignals, cached_embed
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
    """Embed a pool and label it softly; each text passes through the teacher once.

    Args:
        teacher: A trained SetFit model, on the device it shall run on.
        texts: n texts.
        encode_batch_size: Texts a forward pass.
        origin: Where the signals come from, for the record.
        cache: Take the embeddings from disk where the same teacher has met the same texts before, and keep them there
            otherwise; the environment's ``SETFIT_KD_CACHE`` names the folder.

    Returns:
        Signals with probabilities (n, n_classes) and embeddings (n, d).

    Raises:
        DataError: There are no texts, or the teacher has no labels.
    """
    texts, embeddings = _embedded(teacher, texts, encode_batch_size, cache)
    return _signals(teacher, texts, embeddings, origin)


def _embedded(
    teacher: SetFitModel, texts: Sequence[str], encode_batch_size: int, cache: bool
) -> tuple[list[str], npt.NDArray[np.floating]]:
    """The n texts and their (n, d) embeddings."""
    if isinstance(texts, str):
        raise DataError("A single string is no pool.", hint="Give a list of texts.")
    texts = [str(text) for text in texts]
    if not texts:
        raise DataError("There are no texts to score.", hint="Give a pool of at least two.")
    if not teacher.labels:
        raise DataError("The teacher does not name its labels.", hint="Set teacher.labels.")
    embeddings = (cached_embed if cache else embed)(
        teacher.model_body,
        texts,
        batch_size=encode_batch_size,
        normalize=teacher.normalize_embeddings,
        description="Scoring pool",
    )
    return texts, embeddings


def _signals(
    teacher: SetFitModel, texts: list[str], embeddings: npt.NDArray[np.floating], origin: str
) -> TeacherSignals:
    """What the teacher's head says of embedded texts."""
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
    """Refine a teacher's head on the pool, and take its signals on the pool and the labeled texts.

    Args:
        teacher: A trained SetFit model, on the device it shall run on; it is not changed.
        labeled: The m labels it was trained on.
        pool: n unlabeled texts.
        config: The settings; any of them may also be given by keyword, as in ``refine_and_score(..., refine="none")``.
        origin: Where the signals come from, for the record.

    Returns:
        The refined teacher, which shares its body with ``teacher``, and n + m signals: labeled texts are texts like any
        other to a student, and follow the pool's. The signals are as sharp as the refinement leaves them, with the
        temperature that they are meant at; the teacher's own probabilities are at that temperature.

    Raises:
        ConfigError: A setting is unknown or out of range.
        DataError: There are no texts, or the teacher has no labels.
    """
    config = SignalsConfig.merged(config, settings)
    with shared_backoff(cpu_fallback=config.cpu_fallback):
        texts, embeddings = _embedded(teacher, [*pool, *labeled.texts], config.encode_batch_size, config.cache)
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
    signals = _signals(refined, texts, embeddings, origin)
    if refined is teacher:
        return refined, signals
    # Sharp labels teach well; what they mean is what the head says that has not heard itself.
    rows = sample_rows(np.arange(len(pool)), MAX_TEXTS, seed=[config.seed, 8])
    sample = np.asarray(embeddings[rows], np.float64)
    temperature = fit_temperature(logits(refined.model_head, sample), head_proba(teacher, sample))
    refined.model_head = head_at_temperature(refined.model_head, temperature)
    return refined, replace(signals, temperature=temperature)
