"""Train masked language models, and evaluate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

from setfit_kd.config.mlm import MlmConfig
from setfit_kd.errors import DataError, ModelError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.mlm.data import NO_WORD, Ids, MaskedDataset, Masking, max_tokens, tokenize_words
from setfit_kd.mlm.loss import IGNORED, MaskedLanguageLoss
from setfit_kd.models.encode import run_batches
from setfit_kd.models.token_model import check_same_tokens
from setfit_kd.training.loop import BodyTrainer, train
from setfit_kd.training.precision import check_precision
from setfit_kd.utils.console import quiet_libraries

_LOSS_SETTINGS = ("temperature", "alpha", "cosine_weight", "dropout", "micro_batch_size")
_HEAD_LEARNING_RATE = 1e-3
_EVAL_BATCH_SIZE = 32


@dataclass
class MaskedLanguageModel:
    """Trained body with a head for masked tokens, and the loss of each training step."""

    model_body: SentenceTransformer
    loss_curve_: list[float] = field(default_factory=list)


def _create_loss(
    body: SentenceTransformer, teacher: SentenceTransformer | None, config: MlmConfig
) -> MaskedLanguageLoss:
    return MaskedLanguageLoss(body, teacher=teacher, **{name: getattr(config, name) for name in _LOSS_SETTINGS})


def pretrain_body(
    body: SentenceTransformer,
    texts: Sequence[str],
    *,
    config: MlmConfig | None = None,
    teacher: SentenceTransformer | None = None,
    description: str = "Pretraining",
    checkpoints: str | Path | None = None,
    **settings: Any,
) -> MaskedLanguageModel:
    """Train a body on masked tokens of texts, in place; with a teacher, also on the teacher's distributions.

    Args:
        body: A transformer with a head for masked tokens, from `create_token_body`.
        texts: Training texts.
        config: The settings; they can also be passed as keyword arguments.
        teacher: A masked language model with the same vocabulary, which is not changed.
        description: Name of the phase in the progress bar and in messages.
        checkpoints: Folder for checkpoints. Training resumes from a checkpoint that is already in it, so use a separate
            folder for each training.

    Raises:
        SetFitKDError: If the texts have no tokens to predict, teacher and body tokenize differently, a setting cannot
            be used, memory runs out, or the training diverges.
    """
    config = MlmConfig.merged(config, settings)
    device = resolve_device(config.device)
    check_precision(config.precision, device)
    if teacher is not None:
        check_teacher(teacher, body, texts)
    limit = body.max_seq_length
    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        dataset, create_loss = MaskedDataset(body, texts, config), partial(_create_loss, body, teacher)
        try:
            trained = train(
                body,
                partial(BodyTrainer, MaskedLanguageModel(body), body, dataset, create_loss, batches=dataset.batches),
                config,
                device=device,
                texts=texts,
                batch_texts=len(dataset.batches[0]),
                steps=len(dataset.batches),
                description=description,
                checkpoints=checkpoints,
            )
        finally:
            body.max_seq_length = limit  # which is saved with the tokenizer
    return cast("MaskedLanguageModel", trained)


def check_teacher(teacher: SentenceTransformer, body: SentenceTransformer, texts: Sequence[str]) -> None:
    """Raise a `ModelError` if a teacher has no head for masked tokens, or tokenizes the texts unlike a body."""
    if not teacher[0].has_head:
        hint = "Pretrain it with `setfit-kd pretrain` first, or use a masked language model."
        raise ModelError("The teacher has no head that predicts masked tokens.", hint=hint)
    check_same_tokens(teacher, body, texts)


def fit_mlm_head(
    body: SentenceTransformer, texts: Sequence[str], *, config: MlmConfig, checkpoints: str | Path | None = None
) -> None:
    """Train only the head of a body for ``head_steps`` steps, in place."""
    config = config.model_copy(update={"steps": config.head_steps, "learning_rate": _HEAD_LEARNING_RATE})
    module: Any = body[0]
    base = module.model.base_model
    base.requires_grad_(False)
    try:
        pretrain_body(body, texts, config=config, description="Training head", checkpoints=checkpoints)
    finally:
        base.requires_grad_(True)
    module.has_head = True


def evaluate_mlm(
    body: SentenceTransformer, texts: Sequence[str], *, config: MlmConfig | None = None
) -> dict[str, float]:
    """Measure how well a body predicts masked words of texts, on its device.

    Of each text, 15% of the words (``mask_probability``) are masked with all their tokens, drawn with the seed of the
    config. Long texts are truncated after that.

    Returns:
        ``loss``, the mean cross-entropy of a token; ``perplexity``, its exponential; and ``bits_per_character``: the
        bits of all masked tokens divided by the number of characters of their words. The first two depend on how a
        tokenizer splits words, since the rare tokens of a larger vocabulary cover more characters. The last one
        compares models of different vocabularies: they predict the same characters, because whole words are masked.
        The tokens of a word are predicted independently of each other, and their number is visible to the model.
    """
    config = config or MlmConfig.of()
    masking = Masking(body.tokenizer, config)
    length, characters, rows = max_tokens(body, masking, config), 0, list[tuple[Ids, Ids]]()
    for number, (text, tokens) in enumerate(zip(texts, tokenize_words(body.tokenizer, texts), strict=True)):
        if tokens.words.max(initial=NO_WORD) == NO_WORD:
            continue
        chosen = masking.choose(tokens.words, np.random.default_rng([config.seed, number]), whole_words=True)
        chosen[length:] = False
        characters += tokens.count_characters(text, chosen)
        masked = masking.mask(tokens.ids, chosen), np.where(chosen, tokens.ids, IGNORED)
        rows.append((masked[0][:length], masked[1][:length]))
    if not characters:
        raise DataError("The evaluation texts have no words to predict.", hint="Pass other texts.")
    loss = MaskedLanguageLoss(body)

    def sum_losses(batch: list[tuple[Ids, Ids]], size: int) -> tuple[float, int]:
        loss.micro_batch_size = size
        features = batch_to_device(masking.features(batch), body.device)
        with torch.inference_mode():
            n_tokens = loss.count_targets(features)
            return float(loss([features], torch.empty(0))) * n_tokens, n_tokens

    size = config.encode_batch_size or _EVAL_BATCH_SIZE
    batches = (rows[start : start + size] for start in range(0, len(rows), size))
    sums = list(run_batches(body, batches, sum_losses, len(rows), size, "Evaluating"))
    nats, n_tokens = (sum(values) for values in zip(*sums, strict=True))
    mean = nats / n_tokens
    return {"loss": mean, "perplexity": math.exp(mean), "bits_per_character": nats / math.log(2) / characters}
