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
from setfit_kd.models.heads import (
    at_temperature,
    balanced_weights,
    fit_head,
    fit_temperature,
    head_at_temperature,
    head_logits,
    head_task,
    shift_intercepts,
)
from setfit_kd.models.io import new_model
from setfit_kd.models.thresholds import with_thresholds
from setfit_kd.signals.embedding_cache import cached_embed
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL, Task
from setfit_kd.utils.arrays import sample_rows

if TYPE_CHECKING:
    from setfit import SetFitModel

MAX_TEXTS = 10_000
"""Maximum number of pool texts to refine a head on; more do not improve a linear head."""
N_ROUNDS = 5
SHARPENING = 0.5
"""Temperature of the pseudo-labels."""
GOLD_WEIGHT = 3.0
FREQUENCY_WEIGHT, N_FREQUENCY_ROUNDS = 0.2, 50
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
    task = head_task(teacher.model_head)
    return TeacherSignals(texts, head_proba(teacher, embeddings), tuple(teacher.labels), embeddings, origin, task=task)


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
    config = SignalsConfig.merged(config, settings)
    with shared_backoff(cpu_fallback=config.cpu_fallback):
        texts = [*pool, *augmented, *labeled.texts]
        options: Any = {"encode_batch_size": config.encode_batch_size, "exact": config.exact, "cache": config.cache}
        signals = score(teacher, texts, origin=origin, **options)
    task, is_single = labeled.task, labeled.task is SINGLE_LABEL
    refine = (config.refine or ("self-training" if is_single else "frequencies")) if len(pool) else "none"
    if is_single and refine != "self-training":
        return teacher, signals
    embeddings: Any = signals.embeddings
    rows = sample_rows(np.arange(len(pool)), MAX_TEXTS, seed=[config.seed, 8])
    sample = np.asarray(embeddings[rows], np.float32)
    refined = new_model(teacher.model_body, labeled.label_names, task)
    refined.normalize_embeddings = teacher.normalize_embeddings
    refined.model_head = head = teacher.model_head
    if not is_single and refine != "none":
        shift = _frequency_shift(head_logits(head, sample), labeled.targets.mean(axis=0))
        refined.model_head = head = shift_intercepts(head, shift)
    probabilities, temperature = head_proba(refined, embeddings), 1.0
    if refine == "self-training":
        options = {"task": task, "C": config.soft_labels_c, "seed": config.seed}
        options |= {"class_weights": balanced_weights(labeled.counts, config.balance, task)}
        gold = embeddings[len(pool) + len(augmented) :]
        head, logits = self_train(gold, labeled.targets, sample, initial=None if is_single else head, **options)
        # Sharp labels are good targets but overconfident; the head from before the refinement calibrates them.
        temperature = fit_temperature(logits, probabilities[rows], task=task)
        refined.model_head = head
        probabilities = head_proba(refined, embeddings)
        probabilities[rows] = task.to_probabilities(logits)
    signals = replace(signals, probabilities=probabilities, temperature=temperature)
    typical = at_temperature(probabilities[rows] if len(pool) else probabilities, temperature, task)
    head = head_at_temperature(head, temperature)
    refined.model_head = with_thresholds(head, typical, config.thresholds, label_names=labeled.label_names)
    return refined, signals


def _frequency_shift(logits: npt.NDArray[np.floating], frequencies: npt.NDArray[np.floating]) -> Any:
    """Compute what to add to the logits of each label, from its frequency in the labeled texts and in the pool.

    The latter is estimated by expectation maximization (Saerens et al., 2002, "Adjusting the Outputs of a Classifier to
    New a Priori Probabilities"), in which the former counts as `FREQUENCY_WEIGHT` times the pool.

    Args:
        logits: (n, n_classes) calibrated logits of pool texts.
        frequencies: (n_classes,) shares of the labeled texts.
    """
    initial = MULTI_LABEL.to_logits(frequencies)
    estimated = frequencies
    for _ in range(N_FREQUENCY_ROUNDS):
        expected = MULTI_LABEL.to_probabilities(logits + MULTI_LABEL.to_logits(estimated) - initial).mean(axis=0)
        estimated = (expected + FREQUENCY_WEIGHT * frequencies) / (1 + FREQUENCY_WEIGHT)
    return MULTI_LABEL.to_logits(estimated) - initial


def self_train(
    labeled: npt.NDArray[np.floating],
    gold: npt.NDArray[np.floating],
    pool: npt.NDArray[np.floating],
    *,
    initial: Any = None,
    task: Task = SINGLE_LABEL,
    C: float | None = None,  # noqa: N803 - scikit-learn's name
    class_weights: npt.NDArray[np.floating] | None = None,
    seed: int = 0,
) -> tuple[Any, npt.NDArray[np.float64]]:
    """Fit a head on gold labels, then in `N_ROUNDS` rounds also on the head's own probabilities for the pool.

    These are sharpened at a temperature of `SHARPENING`, except in a multi-label task, and weighted by the square of
    their confidence (pseudo-labels: Lee, 2013; sharpening: Berthelot et al., 2019, "MixMatch").

    Args:
        labeled: (m, d) embeddings of the labeled texts.
        gold: (m, n_classes) gold labels, 0 or 1.
        pool: (n, d) embeddings of the pool.
        initial: Head whose probabilities for the pool are used first. [default: one fitted on the gold labels]
        task, C, class_weights: As in `fit_head`. In a multi-label task, each label has its own confidence.
        seed: Seed of the folds.

    Returns:
        The head, and its (n, n_classes) logits for the pool, out of fold: on texts whose own labels it was fitted on,
        it would be more confident than on new ones.
    """
    options: Any = {"task": task, "C": C, "class_weights": class_weights}
    head = initial or fit_head(labeled, gold, **options)
    embeddings = np.concatenate([labeled, pool])
    for _ in range(N_ROUNDS):
        logits = head_logits(head, pool)
        # In a multi-label task, sharpening would make rare labels rarer in each round.
        labels = task.to_probabilities(logits / (SHARPENING if task is SINGLE_LABEL else 1))
        targets = np.concatenate([gold, labels])
        confidence = task.confidence(task.to_probabilities(logits))
        weights = np.concatenate([np.full((len(gold), confidence.shape[1]), GOLD_WEIGHT), confidence**2])
        head = fit_head(embeddings, targets, weights, start=head, **options)
    folds = np.append(np.full(len(gold), -1), np.random.default_rng([seed, 17]).permutation(len(pool)) % FOLDS)
    logits = np.zeros((len(pool), gold.shape[1]))
    for fold in range(min(FOLDS, len(pool))):
        kept, held_out = folds != fold, folds[len(gold) :] == fold
        other = fit_head(embeddings[kept], targets[kept], weights[kept], start=head, **options)
        logits[held_out] = head_logits(other, pool[held_out])
    return head, logits
