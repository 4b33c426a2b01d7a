"""Run of `setfit-kd pretrain`: read the texts, add words, train, evaluate and write the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.mlm import MlmConfig, PretrainConfig
from setfit_kd.data.sources import read
from setfit_kd.data.splits import normalize
from setfit_kd.errors import DataError
from setfit_kd.memory.backoff import move_model, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.mlm.vocabulary import add_words, choose_words, read_words
from setfit_kd.models.bodies import content_hash, locate_model
from setfit_kd.student.kinds import create_token_body
from setfit_kd.utils.files import fingerprint
from setfit_kd.utils.output_folder import Trained, open_output_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)
_BEFORE = "before"  # key by which ``metrics.json`` is recognized


def pretrain(config: PretrainConfig) -> Trained:
    """Train a masked language model on texts, and write it with its tokenizer to a folder in transformers format.

    A model without a head for masked tokens first gets one, trained with the rest of the model frozen; the metrics
    before training are those of the model with this head, and without the added words. The metrics of ``before``,
    ``after`` and ``teacher`` are as in `evaluate_mlm`, or None without evaluation texts (or a teacher).

    An interrupted run that is started again resumes from its last checkpoint, in a folder next to the output folder.

    Raises:
        SetFitKDError: If an input or a setting cannot be used; no partial files are left behind.
    """
    options: Any = {"overwrite": config.overwrite, "command": "pretrain", "keys": {_BEFORE}}
    with open_output_folder(config.output_dir, **options) as output, shared_backoff(cpu_fallback=config.cpu_fallback):
        texts, held_out, leaks = read_texts(config.texts, config.eval, config.text_column)
        device = resolve_device(config.device)

        from setfit_kd.mlm.data import check_tokenizer
        from setfit_kd.mlm.train import check_teacher, evaluate_mlm, fit_mlm_head, pretrain_body
        from setfit_kd.models.token_model import load_token_model, save_token_model

        teacher = None if config.teacher is None else load_token_model(locate_model(config.teacher), "fill-mask")
        body = create_token_body(config.model, "fill-mask", teacher=teacher, seed=config.seed)
        if teacher is not None:
            check_teacher(teacher, body, texts)
        check_tokenizer(body.tokenizer)
        words: list[str] = []
        if config.vocab_file is not None:
            words = read_words(Path(config.vocab_file), body.tokenizer)
        elif config.add_vocab is not None:
            words = choose_words(texts, body.tokenizer, config.add_vocab)

        def checkpoints(phase: str) -> Path:
            models = [None if model is None else content_hash(model) for model in (body, teacher)]
            return output.checkpoints / fingerprint(phase, MlmConfig.fingerprint_inputs(config), models, texts)

        def evaluate(model: SentenceTransformer) -> dict[str, float] | None:
            move_model(model, device, phase="Evaluating")
            return evaluate_mlm(model, held_out, config=config) if held_out else None

        if not body[0].has_head:
            fit_mlm_head(body, texts, config=config, checkpoints=checkpoints("head"))
        before = evaluate(body)
        if words:
            add_words(body, words)
            logger.info("Added %d words to the vocabulary, such as %s.", len(words), ", ".join(words[:3]))
        pretrain_body(body, texts, config=config, teacher=teacher, checkpoints=checkpoints("model"))
        after, of_teacher = evaluate(body), None if teacher is None else evaluate(teacher)
        metrics = {_BEFORE: before, "after": after, "teacher": of_teacher, "added_words": len(words), "leaks": leaks}
        output.write(partial(save_token_model, body), {**metrics, "settings": config.model_dump(mode="json")})
        return Trained(body, metrics)


def read_texts(source: str, evaluation: str | None, text_column: Sequence[str]) -> tuple[list[str], list[str], int]:
    """Read training and evaluation texts; remove the latter from the former, and return their number.

    Raises:
        SetFitKDError: If a source cannot be used, or all training texts are evaluation texts.
    """
    texts = read(source, text_column=text_column).texts
    held_out = [] if evaluation is None else read(evaluation, text_column=text_column, role="test").texts
    known = set(map(normalize, held_out))
    n_texts, texts = len(texts), [text for text in texts if normalize(text) not in known]
    if leaks := n_texts - len(texts):
        logger.warning("Leak guard: removed %d training texts that are also in the evaluation set.", leaks)
    if not texts:
        raise DataError("All training texts are evaluation texts.", hint="Pass other texts to train or to evaluate on.")
    return texts, held_out, leaks
