"""Train a transformer to answer questions, find answers and evaluate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from torch.utils.data import Dataset

from setfit_kd.config.questions import QuestionConfig
from setfit_kd.errors import ConfigError, DataError, ModelError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.memory.devices import resolve_device, to_device
from setfit_kd.models.encode import batch_limits, run_batches
from setfit_kd.models.forward import ForwardPass
from setfit_kd.models.token_model import check_same_tokens
from setfit_kd.qa.data import Question
from setfit_kd.qa.loss import AnswerLoss, answer_logits
from setfit_kd.qa.metrics import fit_null_threshold, gold_texts, score_answers
from setfit_kd.qa.model import QuestionAnswerer
from setfit_kd.qa.windows import BodyWindows, answer_tokens
from setfit_kd.runtime.answer import Answer, Candidates, find_answers, pad, warn_too_long
from setfit_kd.training.loop import BodyTrainer, train
from setfit_kd.training.precision import check_precision
from setfit_kd.utils.arrays import iter_batches
from setfit_kd.utils.console import quiet_libraries

_LOSS_SETTINGS = ("temperature", "alpha", "dropout", "micro_batch_size")
_CHUNK = 64  # questions per update of the progress bar


def train_questions(
    body: SentenceTransformer,
    questions: Sequence[Question],
    *,
    config: QuestionConfig,
    pool: Sequence[Question] = (),
    teacher: SentenceTransformer | None = None,
    description: str = "Fine-tuning",
    checkpoints: str | Path | None = None,
) -> QuestionAnswerer:
    """Train a transformer in place to answer questions, on gold answers or on those and a teacher, see `AnswerLoss`.

    Args:
        body: The transformer, see `load_token_model`.
        questions: Questions with gold answers; the first answer of each is used.
        config: The settings.
        pool: Questions whose answers are not used, for distillation.
        teacher: A fine-tuned transformer with the same tokenizer, to distil from.
        description: Name of the phase in the progress bar and in messages.
        checkpoints: Folder for checkpoints. Training resumes from a checkpoint that is already in it, so use a separate
            folder for each training.

    Raises:
        DataError: If a question has no known answers or is too long.
        ModelError: If the transformer is not for question answering, or teacher and student tokenize differently.
        SetFitKDError: As `train_teacher`.
    """
    if getattr(body[0], "task", None) != "question-answering":
        raise ModelError("The body is not for question answering.", hint="Load it with load_token_model.")
    if teacher is None and (pool or not questions):
        raise ConfigError("Training without a teacher needs questions with answers.", hint="Pass a teacher.")
    for question in questions:
        gold_texts(question)
    device = resolve_device(config.device)
    check_precision(config.precision, device)
    everything = [*questions, *(Question(q.id, q.question, q.context) for q in pool)]
    texts = [f"{question.question} {question.context}" for question in everything]
    if teacher is not None:
        check_same_tokens(teacher, body, texts)
        limits = [limit for limit in (body.max_seq_length, teacher.max_seq_length) if limit]
        body.max_seq_length = min(limits, default=None)  # a window must fit both
    dataset = _WindowDataset(body, everything, config)
    size = config.batch_size
    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        model: Any = train(
            body,
            partial(BodyTrainer, QuestionAnswerer(body, config), body, dataset, partial(_create_loss, body, teacher)),
            config,
            device=device,
            texts=texts,
            batch_texts=min(size, len(dataset)),
            steps=config.epochs * math.ceil(len(dataset) / size),
            description=description,
            checkpoints=checkpoints,
        )
    return cast("QuestionAnswerer", model)


class _WindowDataset(Dataset[Any]):
    """Windows of questions, with the tokens of the gold answers."""

    def __init__(self, body: SentenceTransformer, questions: Sequence[Question], config: QuestionConfig) -> None:
        splitter = BodyWindows(body, config)
        windows = splitter.split(questions)
        too_long = sorted(set(range(len(questions))) - {window.row for window in windows})
        if too_long:
            size = f"windows of {splitter.max_length} tokens with a stride of {splitter.stride}"
            message = f"Question {questions[too_long[0]].id!r:.60} is too long for {size}."
            raise DataError(message, hint="Shorten it, or pass a larger --max-length.")
        self.answer_tokens, self.pad_id = answer_tokens(windows, questions), body.tokenizer.pad_token_id or 0
        self.windows = [window._replace(spans=np.empty((0, 2), np.int32)) for window in windows]  # half the memory

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, rows: list[int]) -> dict[str, Any]:
        windows = [self.windows[row] for row in rows]
        inputs: dict[str, npt.NDArray[Any]] = {**pad(windows, self.pad_id), "answer_tokens": self.answer_tokens[rows]}
        mask = inputs["answer_mask"] = np.zeros(inputs["input_ids"].shape, bool)
        for row, window in enumerate(windows):
            mask[row, : len(window.ids)] = window.in_context
        mask[:, 0] = True
        features = {name: torch.from_numpy(values) for name, values in inputs.items()}
        return {"features": [features], "label": np.zeros(len(rows))}


def _create_loss(body: SentenceTransformer, teacher: SentenceTransformer | None, config: QuestionConfig) -> AnswerLoss:
    return AnswerLoss(body, teacher=teacher, **{name: getattr(config, name) for name in _LOSS_SETTINGS})


def find_candidates(
    model: QuestionAnswerer, questions: Sequence[Question], *, description: str = "Answering"
) -> list[Candidates]:
    """Find the best answer to each question, on the device of the model; those that are too long get none."""
    body, config = model.model_body, model.config
    windows, pad_id = BodyWindows(body, config), body.tokenizer.pad_token_id or 0
    max_texts = config.encode_batch_size or batch_limits(body)[0]

    def run(inputs: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.floating]:
        features = {name: to_device(torch.from_numpy(values), body.device) for name, values in inputs.items()}
        return cast("npt.NDArray[np.floating]", answer_logits(body, features).cpu().numpy().swapaxes(0, 1))

    def find(chunk: Sequence[Question], size: int) -> list[Candidates]:
        parts = windows.split(chunk)
        max_tokens = math.inf if config.encode_batch_size else batch_limits(body)[1] * size / max_texts
        lengths = np.array([len(window.ids) for window in parts])
        pairs = [(question.question, question.context) for question in chunk]
        batches = (batch.tolist() for batch in iter_batches(lengths, size, max_tokens))
        return find_answers(pairs, parts, batches, run, pad_id=pad_id, max_answer_tokens=config.max_answer_tokens)

    body.eval()
    chunks = (questions[start : start + _CHUNK] for start in range(0, len(questions), _CHUNK))
    with torch.inference_mode(), ForwardPass(body).context():
        batches = run_batches(body, chunks, find, len(questions), max_texts, description)
        candidates = list(chain.from_iterable(batches))
    warn_too_long(candidates)
    return candidates


def choose_threshold(model: QuestionAnswerer, labeled: Sequence[Question], validation: Sequence[Question]) -> None:
    """Set the threshold for giving no answer: with the best F1 on validation questions, if some have no answer.

    Otherwise it is 0 if labeled questions have no answer, and None if all have one.
    """
    threshold = None
    if validation:
        candidates = find_candidates(model, validation, description="Validating")
        threshold = fit_null_threshold(candidates, validation)
    if threshold is None and not all(question.answers for question in labeled):
        threshold = 0.0
    model.null_threshold = threshold


def predict_answers(model: QuestionAnswerer, questions: Sequence[Question]) -> list[Answer]:
    """Find the answer to each question; none if its score exceeds that of the best answer by the model's threshold."""
    return [candidates.decide(model.null_threshold) for candidates in find_candidates(model, questions)]


def evaluate_answers(model: QuestionAnswerer, questions: Sequence[Question]) -> dict[str, Any]:
    """Find the answer to each question, as `predict_answers`, and compute the metrics of `score_answers`."""
    return score_answers([answer.text for answer in predict_answers(model, questions)], questions)
