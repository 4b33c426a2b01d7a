"""Score a pool with a teacher: refine its head by self-training, and compute embeddings and soft labels."""

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
from setfit_kd.models.encode import choose_forward, embed, head_proba
from setfit_kd.models.forward import METHODS, ForwardPass
from setfit_kd.models.heads import balanced_weights, fit_head, fit_temperature, head_at_temperature, head_logits
from setfit_kd.models.io import new_model
from setfit_kd.signals.embedding_cache import cached_embed
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.utils.arrays import sample_rows

if TYPE_CHECKING:
    from setfit import SetFitModel
    from sklearn.linear_model import LogisticRegression

MAX_TEXTS = 10_000
"""Maximum number of pool texts to refine a head on; more do not improve a linear head."""
N_ROUNDS = 5
SHARPENING = 0.5
"""Temperature of the pseudo-labels."""
GOLD_WEIGHT = 3.0
FOLDS = 5
"""Number of parts of the pool, each of which is labeled by a head that was fitted on the others."""


def score(
    teacher: SetFitModel,
    texts: Sequence[str],
    *,
    encode_batch_size: int | None = None,
    exact: bool = False,
    origin: str = "a SetFit teacher",
    cache: bool = False,
) -> TeacherSignals:
    """Compute a teacher's embeddings and probabilities for a pool, in one pass over the texts.

    Args:
        teacher: A trained SetFit model, on the device to use.
        texts: n texts.
        encode_batch_size: Maximum number of texts per forward pass. [default: limited by the number of tokens]
        exact: Run the teacher in single precision with torch, even if another way is faster.
        origin: Name of the signals' source, stored with them.
        cache: Read the embeddings from disk if the same teacher has embedded the same texts before, and store them
            otherwise. The environment variable ``SETFIT_KD_CACHE`` sets the folder.

    Returns:
        Signals with probabilities (n, n_classes) and embeddings (n, d).

    Raises:
        DataError: If there are no texts, or the teacher has no label names.
    """
    if isinstance(texts, str):
        raise DataError("The texts to score must be a list, got a single string.", hint="Pass a list of texts.")
    texts = [str(text) for text in texts]
    if not texts:
        raise DataError("Expected at least one text to score, got no texts.", hint="Pass the texts of the pool.")
    if not teacher.labels:
        raise DataError("The teacher has no label names.", hint="Set teacher.labels.")

    def choose() -> ForwardPass:
        return ForwardPass(teacher.model_body) if exact else choose_forward(teacher, texts)

    options: Any = {"batch_size": encode_batch_size, "normalize": teacher.normalize_embeddings}
    options["description"] = "Scoring pool"
    if cache:
        embeddings = cached_embed(
            choose, teacher.model_body, texts, methods=METHODS[:1] if exact else METHODS, **options
        )
    else:
        embeddings = embed(teacher.model_body, texts, forward=choose(), **options)
    return TeacherSignals(texts, head_proba(teacher, embeddings), tuple(teacher.labels), embeddings, origin)


def refine_and_score(
    teacher: SetFitModel,
    labeled: LabeledSet,
    pool: Sequence[str],
    *,
    augmented: Sequence[str] = (),
    config: SignalsConfig | None = None,
    origin: str = "a SetFit teacher",
    **settings: Any,
) -> tuple[SetFitModel, TeacherSignals]:
    """Refine a teacher's head on the pool, then score the pool and the labeled texts.

    Args:
        teacher: A trained SetFit model, on the device to use; it is not changed.
        labeled: The m labeled texts it was trained on.
        pool: n unlabeled texts. If there are more than `MAX_TEXTS`, the head is refined on a sample.
        augmented: k texts created from others, which are scored, but not used to refine the head: it would become
            overconfident.
        config: The settings. Each can also be passed by keyword, as in ``refine_and_score(..., refine="none")``.
        origin: Name of the signals' source, stored with them.

    Returns:
        The refined teacher, which shares its body with ``teacher``, and n + k + m signals: those of the pool, of the
        augmented texts and of the labeled texts, which a student treats as any other text. Refinement sharpens the
        signals' probabilities; their temperature calibrates them. The refined teacher's own probabilities are at that
        temperature.

    Raises:
        ConfigError: If a setting is unknown or out of range.
        DataError: If there are no texts, or the teacher has no label names.
    """
    from scipy.special import softmax

    config = SignalsConfig.merged(config, settings)
    with shared_backoff(cpu_fallback=config.cpu_fallback):
        texts = [*pool, *augmented, *labeled.texts]
        options: Any = {"encode_batch_size": config.encode_batch_size, "exact": config.exact, "cache": config.cache}
        signals = score(teacher, texts, origin=origin, **options)
    if config.refine == "none" or not len(pool):
        return teacher, signals
    embeddings: Any = signals.embeddings
    rows = sample_rows(np.arange(len(pool)), MAX_TEXTS, seed=[config.seed, 8])
    sample = np.asarray(embeddings[rows], np.float32)
    refined = new_model(teacher.model_body, labeled.label_names)
    refined.normalize_embeddings = teacher.normalize_embeddings
    class_weights = balanced_weights(labeled.counts, config.balance)
    train_options: Any = {"C": config.soft_labels_c, "class_weights": class_weights, "seed": config.seed}
    gold = embeddings[len(pool) + len(augmented) :]
    refined.model_head, logits = self_train(gold, labeled.one_hot, sample, **train_options)
    probabilities = head_proba(refined, embeddings)
    probabilities[rows] = softmax(logits, axis=1)
    # Sharp labels are good targets but overconfident; the head from before the refinement calibrates them.
    temperature = fit_temperature(logits, head_proba(teacher, sample))
    refined.model_head = head_at_temperature(refined.model_head, temperature)
    return refined, replace(signals, probabilities=probabilities, temperature=temperature)


def self_train(
    labeled: npt.NDArray[np.floating],
    gold: npt.NDArray[np.floating],
    pool: npt.NDArray[np.floating],
    *,
    C: float | None = None,  # noqa: N803 - scikit-learn's name
    class_weights: npt.NDArray[np.floating] | None = None,
    seed: int = 0,
) -> tuple[LogisticRegression, npt.NDArray[np.float64]]:
    """Fit a head on gold labels, then in `N_ROUNDS` rounds also on the head's own probabilities for the pool.

    These are sharpened at a temperature of `SHARPENING` and weighted by the square of their confidence (pseudo-labels:
    Lee, 2013; sharpening: Berthelot et al., 2019, "MixMatch").

    Args:
        labeled: (m, d) embeddings of the labeled texts.
        gold: (m, n_classes) one-hot gold labels.
        pool: (n, d) embeddings of the pool.
        C, class_weights: As in `fit_head`.
        seed: Seed of the folds.

    Returns:
        The head, and its (n, n_classes) logits for the pool, out of fold: on texts whose own labels it was fitted on,
        it would be more confident than on new ones.
    """
    options: Any = {"C": C, "class_weights": class_weights}
    head = fit_head(labeled, gold, **options)
    embeddings = np.concatenate([labeled, pool])
    for _ in range(N_ROUNDS):
        probabilities = head.predict_proba(pool)
        confidence = probabilities.max(axis=1)
        sharp = (probabilities / confidence[:, None]) ** (1 / SHARPENING)
        targets = np.concatenate([gold, sharp / sharp.sum(axis=1, keepdims=True)])
        weights = np.concatenate([np.full(len(gold), GOLD_WEIGHT), confidence**2])
        head = fit_head(embeddings, targets, weights, start=head, **options)
    folds = np.append(np.full(len(gold), -1), np.random.default_rng([seed, 17]).permutation(len(pool)) % FOLDS)
    logits = np.zeros((len(pool), gold.shape[1]))
    for fold in range(min(FOLDS, len(pool))):
        kept, held_out = folds != fold, folds[len(gold) :] == fold
        other = fit_head(embeddings[kept], targets[kept], weights[kept], start=head, **options)
        logits[held_out] = head_logits(other, pool[held_out])
    return head, logits
