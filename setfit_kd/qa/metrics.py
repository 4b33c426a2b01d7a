"""Exact match and F1 of answers, and the threshold for giving no answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from setfit_kd.errors import DataError
from setfit_kd.evaluation.metrics import bootstrap_mean
from setfit_kd.qa.data import Question
from setfit_kd.runtime.answer import Candidates

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Normalize an answer as SQuAD does: fold case, remove punctuation and articles, and collapse white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, gold: str) -> float:
    """Return 1 if two answers are the same after `normalize_answer`, else 0."""
    return float(normalize_answer(predicted) == normalize_answer(gold))


def word_f1(predicted: str, gold: str) -> float:
    """Return the F1 of the words of an answer after `normalize_answer`; without words, 1 if both have none, else 0."""
    words, gold_words = (normalize_answer(text).split() for text in (predicted, gold))
    if not words or not gold_words:
        return float(words == gold_words)
    return 2 * (Counter(words) & Counter(gold_words)).total() / (len(words) + len(gold_words))


def gold_texts(question: Question) -> list[str]:
    """Return the gold answers that have words, or an empty text if there are none; a `DataError` if unknown."""
    if question.answers is None:
        message = f"Question {question.id!r:.60} has no gold answers."
        raise DataError(message, hint="Add the column answers, with an empty list if the context has no answer.")
    return [text for text, _ in question.answers if normalize_answer(text)] or [""]


def score_answers(predicted: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    """Compute exact match and F1, from 0 to 1, as the evaluation script of SQuAD 2.0 does.

    Each is the mean over the questions of the maximum over the gold answers. Its 95% interval from the bootstrap over
    the questions, such as ``f1_interval``, is a list of the lower and the upper bound. If there are questions without
    an answer, the metrics of those with (``hasans_``) and without an answer (``noans_``) are added.

    References:
        - Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text".
        - Rajpurkar et al., 2018, "Know What You Don't Know: Unanswerable Questions for SQuAD".
    """
    golds = [gold_texts(question) for question in questions]
    has_answer = np.array([bool(question.answers) for question in questions])
    scores: dict[str, Any] = {}
    values = {
        name: np.array(
            [max(metric(text, gold) for gold in texts) for text, texts in zip(predicted, golds, strict=True)]
        )
        for name, metric in (("exact_match", exact_match), ("f1", word_f1))
    }
    groups = {"": has_answer | True, **({} if has_answer.all() else {"hasans_": has_answer, "noans_": ~has_answer})}
    for prefix, rows in groups.items():
        if rows.any():
            scores |= {f"{prefix}{name}": float(value[rows].mean()) for name, value in values.items()}
    intervals = {name: bootstrap_mean(value) for name, value in values.items()}
    return scores | {f"{name}_interval": [interval.low, interval.high] for name, interval in intervals.items()}


def fit_null_threshold(candidates: Sequence[Candidates], questions: Sequence[Question]) -> float | None:
    """Choose the threshold above which a question gets no answer, for the best F1; None if all have an answer.

    Questions with the same difference of scores get the same decision. Of several best thresholds, the highest is
    chosen, which gives most answers.
    """
    if all(question.answers for question in questions):
        return None
    f1 = [
        [max(word_f1(text, gold) for gold in gold_texts(question)) for text in (candidate.best.text, "")]
        for candidate, question in zip(candidates, questions, strict=True)
    ]  # (n, 2), with and without an answer
    differences = np.array([candidate.difference for candidate in candidates])
    order = np.argsort(differences, kind="stable")
    gains = np.concatenate([[0.0], np.cumsum(np.subtract(*np.array(f1)[order].T))])  # of answering the first k
    ordered = np.concatenate([[-np.inf], differences[order], [np.inf]])
    gains[ordered[:-1] == ordered[1:]] = -np.inf  # a threshold cannot separate equal differences
    best = len(gains) - 1 - int(gains[::-1].argmax())
    low, high = ordered[best], ordered[best + 1]
    return float(high - 1 if best == 0 else low + 1 if best == len(order) else (low + high) / 2)
