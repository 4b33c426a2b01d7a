"""Questions about the bundled news texts, which ask for the words after a word."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conftest import newswire

from setfit_kd.config.questions import QuestionConfig
from setfit_kd.qa.data import Question

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

QUICK: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "max_length": 64,
    "stride": 8,
    "max_answer_tokens": 12,
    "batch_size": 4,
    "epochs": 1,
    "learning_rate": 1e-3,
    "dropout": False,
}
"""Settings with which a tiny model is trained in a fraction of a second."""


def config(**settings: Any) -> QuestionConfig:
    return QuestionConfig.of(**{**QUICK, **settings})


def make_questions(n: int, *, first: int = 0, unanswerable: int = 0, characters: int = 70) -> list[Question]:
    """Return n questions about the beginnings of texts; the last ones ask about another text."""
    questions = []
    for row, text in enumerate(row["text"][:characters] for row in newswire("train")[first : first + n]):
        words = list(re.finditer(r"\w+", text))
        word, start, end = words[row % 4 + 1], words[row % 4 + 2].start(), words[row % 4 + 3].end()
        questions.append(Question(f"q{first + row}", f"what is after {word[0]} ?", text, ((text[start:end], start),)))
    for row in range(n - unanswerable, n):
        questions[row] = replace(questions[row], question=f"who won against {row} ?", answers=())
    return questions


def load_body(folder: Path, seed: int = 0) -> SentenceTransformer:
    from setfit_kd.models.token_model import load_token_model

    return load_token_model(folder, "question-answering", seed=seed)


def to_row(question: Question) -> dict[str, Any]:
    """Return a question as a row of a JSONL file in the form of SQuAD."""
    row: dict[str, Any] = {"id": question.id, "question": question.question, "context": question.context}
    if question.answers is not None:
        texts, starts = zip(*question.answers, strict=True) if question.answers else ((), ())
        row["answers"] = {"text": list(texts), "answer_start": list(starts)}
    return row


def write_questions(path: Path, questions: Sequence[Question]) -> Path:
    path.write_text("".join(json.dumps(to_row(question)) + "\n" for question in questions), encoding="utf-8")
    return path
