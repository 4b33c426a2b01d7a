"""Decoding against a naive search, and the metrics and the threshold against their definitions."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import byte_tokenizer, word_tokenizer

from setfit_kd.errors import DataError
from setfit_kd.qa.data import Question
from setfit_kd.qa.metrics import exact_match, fit_null_threshold, normalize_answer, score_answers, word_f1
from setfit_kd.runtime.answer import Answer, Candidates, Windows, decode, find_answers, pad

CONTEXT = "abc de fgh ij a bcd ef ghi j abc def"
NO_ANSWER = Answer("", 0.5, None, None)


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), byte_tokenizer()], ids=["words", "bytes"])
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_best_answer_is_that_of_a_naive_search(tokenizer: Any, seed: int, max_answer_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    windows = Windows(tokenizer.to_str(), max_length=20, stride=5).split([("ab", CONTEXT)])
    assert len(windows) > 2
    logits = [(w, *rng.normal(scale=3, size=(2, len(w.ids))).astype(np.float32)) for w in windows]
    logits = [(w, starts, ends) for w, starts, ends in logits]
    sums: dict[tuple[int, int], list[float]] = {}
    for window, starts, ends in logits:
        for i in range(len(window.ids)):
            for j in range(i, min(i + max_answer_tokens, len(window.ids))):
                if window.in_context[i] and window.in_context[j]:
                    key = int(window.spans[i, 0]), int(window.spans[j, 1])
                    sums.setdefault(key, []).append(float(starts[i]) + float(ends[j]))
    null = min(float(starts[0]) + float(ends[0]) for _, starts, ends in logits)
    (start, end), scores = max(sums.items(), key=lambda item: max(item[1]))
    total = math.exp(null) + sum(math.exp(score) for values in sums.values() for score in values)
    candidates = decode(CONTEXT, logits, max_answer_tokens)
    best = candidates.best
    assert best.text == CONTEXT[start:end].strip() == CONTEXT[best.start : best.end]
    assert best.score == pytest.approx(sum(map(math.exp, scores)) / total)
    assert candidates.null.score == pytest.approx(math.exp(null) / total)
    assert candidates.null._replace(score=0) == ("", 0, None, None)
    assert candidates.difference == pytest.approx(null - max(scores))


def test_question_and_special_tokens_are_never_part_of_an_answer() -> None:
    (window,) = Windows(word_tokenizer().to_str(), max_length=20, stride=0).split([("a b", "c d")])
    # [CLS] a b [SEP] c d [SEP]
    starts = np.array([0, 99, 99, 99, 1, 0, 99.0])
    ends = np.array([0, 99, 99, 99, 2, 0, 99.0])
    assert decode("c d", [(window, starts, ends)], 30).best[::2] == ("c", 0)
    starts = np.array([0, 0, 0, 0, -5, 5, 0.0])
    ends = np.array([0, 0, 0, 0, 9, -6, 0.0])  # the highest sum is that of an end before its start
    assert decode("c d", [(window, starts, ends)], 30).best.text == "c"
    long = decode("c d", [(window, -starts, -ends)], 30), decode("c d", [(window, -starts, -ends)], 1)
    assert [candidates.best.text for candidates in long] == ["c d", "d"]


def test_context_without_tokens_has_no_answer() -> None:
    windows = Windows(byte_tokenizer().to_str(), max_length=20, stride=0).split([("a", "")])
    candidates = decode("", [(windows[0], *np.zeros((2, len(windows[0].ids))))], 30)
    assert candidates.decide(None) == Answer("", 1.0, None, None)


def test_answers_do_not_depend_on_batches() -> None:
    questions = [("a", CONTEXT), ("b", "c d"), ("c", "abc de fgh")]
    windows = Windows(word_tokenizer().to_str(), max_length=20, stride=5).split(questions)

    def run(inputs: dict[str, Any]) -> list[Any]:
        noise = np.sin(inputs["input_ids"] * 7.0 + inputs["token_type_ids"] + np.arange(inputs["input_ids"].shape[1]))
        return [3 * noise, 3 * noise[:, ::-1] * 0 + noise**2]

    options: dict[str, Any] = {"pad_id": 0, "max_answer_tokens": 4}
    one_by_one = find_answers(questions, windows, [[i] for i in range(len(windows))], run, **options)
    together = find_answers(questions, windows, [list(range(len(windows)))[::-1]], run, **options)
    assert one_by_one == together
    inputs = pad(windows, 0)
    assert inputs["attention_mask"].sum(axis=1).tolist() == [len(window.ids) for window in windows]
    assert inputs["token_type_ids"].sum(axis=1).tolist() == [int(window.in_context.sum()) + 1 for window in windows]


def test_threshold_decides_between_best_and_no_answer() -> None:
    candidates = Candidates(Answer("x", 0.4, 0, 1), NO_ANSWER, 1.5)
    assert [candidates.decide(t).text for t in (None, 2.0, 1.5, 1.4)] == ["x", "x", "x", ""]


# Metrics, checked once against torchmetrics 1.9 as well


@pytest.mark.parametrize(
    ("predicted", "gold", "match", "f1"),
    [
        ("The Panthers!", "panthers", 1, 1),
        ("the", "a", 1, 1),  # without articles, both are empty
        ("", "the", 1, 1),
        ("New York", "new york city", 0, 0.8),
        ("b b", "b", 0, 2 / 3),
        ("b a c", "c b", 0, 1),
        ("U.S.", "US", 1, 1),
        ("twenty-one", "twenty one", 0, 0),
        ("x", "", 0, 0),
        ("theatre", "atre", 0, 0),
        ("’s", "s", 0, 0),  # only ASCII punctuation is removed
        ("two\u00a0 words", "two words", 1, 1),
    ],
)
def test_metrics_of_known_answers(predicted: str, gold: str, match: float, f1: float) -> None:
    assert exact_match(predicted, gold) == match
    assert word_f1(predicted, gold) == pytest.approx(f1)


@given(*[st.lists(st.sampled_from(["the", "a", "An", "Ann", "bob!", "BOB", "c-d", ".", "é"])).map(" ".join)] * 2)
def test_metrics_follow_the_definition(predicted: str, gold: str) -> None:
    def normalize(text: str) -> str:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    assert normalize_answer(predicted) == normalize(predicted)
    words, gold_words = normalize(predicted).split(), normalize(gold).split()
    n_same = sum((Counter(words) & Counter(gold_words)).values())
    expected = float(words == gold_words)
    if n_same:
        precision, recall = n_same / len(words), n_same / len(gold_words)
        expected = 2 * precision * recall / (precision + recall)
    assert word_f1(predicted, gold) == pytest.approx(expected)
    assert exact_match(predicted, gold) == (normalize(predicted) == normalize(gold))


def question(*answers: str) -> Question:
    return Question("1", "who?", "context", tuple((text, 0) for text in answers))


def test_scores_are_means_of_the_best_gold_answer() -> None:
    questions = [question("x", "new york city"), question("y"), question(), question()]
    scores = score_answers(["New York", "z", "", "y"], questions)
    intervals = {name: scores.pop(f"{name}_interval") for name in ("exact_match", "f1")}
    assert scores == pytest.approx({
        "exact_match": 0.25, "f1": 0.45, "hasans_exact_match": 0, "hasans_f1": 0.4, "noans_exact_match": 0.5,
        "noans_f1": 0.5,
    })  # fmt: skip
    assert intervals["exact_match"] == pytest.approx([0.0, 0.75])  # of 0, 1, ..., 4 of 4 questions
    assert intervals["f1"][0] < 0.45 < intervals["f1"][1]
    only_answerable = score_answers(["New York", "y"], questions[:2])
    assert [only_answerable[name] for name in ("exact_match", "f1")] == pytest.approx([0.5, 0.9])
    assert only_answerable["f1_interval"] == pytest.approx([0.8, 1.0])
    assert score_answers([""], [question("the", "x")])["exact_match"] == 0  # a gold answer without words does not count
    assert {name for name in score_answers(["x"], [question()]) if name.startswith("noans_")} == {
        "noans_exact_match",
        "noans_f1",
    }
    with pytest.raises(DataError, match="Question '1' has no gold answers"):
        score_answers(["x"], [replace(question(), answers=None)])


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([("x",), ("x", "y z"), ("y",), ()])), min_size=1, max_size=8)
)
def test_null_threshold_has_the_best_f1(rows: list[tuple[int, tuple[str, ...]]]) -> None:
    questions = [question(*answers) for _, answers in rows]
    candidates = [Candidates(Answer("y", 0.5, 0, 1), NO_ANSWER, float(difference)) for difference, _ in rows]
    threshold = fit_null_threshold(candidates, questions)
    if all(answers for _, answers in rows):
        assert threshold is None
        return
    assert threshold is not None

    def f1(threshold: float) -> float:
        scores = score_answers([candidate.decide(threshold).text for candidate in candidates], questions)
        return float(scores["f1"])

    assert f1(threshold) == pytest.approx(max(f1(t / 2) for t in range(-9, 10)))
