"""The bundled corpus keeps its promises."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest
from conftest import newswire

ROWS = newswire("train") + newswire("eval")
CLASSES = ("World", "Sports", "Business", "Sci/Tech")


def tokens(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+(?:['’][a-z]+)?", text.lower()))


@pytest.mark.parametrize(("split", "each", "hard"), [("train", 150, 30), ("eval", 50, 10)])
def test_counts(split: str, each: int, hard: int) -> None:
    rows = newswire(split)
    assert Counter(row["label"] for row in rows) == dict.fromkeys(CLASSES, each)
    assert Counter(row["label"] for row in rows if row["hard"]) == dict.fromkeys(CLASSES, hard)
    assert all(set(row) == {"text", "label", "hard"} for row in rows)


def test_lengths_are_20_to_45_words() -> None:
    lengths = [len(row["text"].split()) for row in ROWS]
    assert min(lengths) >= 20
    assert max(lengths) <= 45


def test_no_near_duplicates() -> None:
    sets = [tokens(row["text"]) for row in ROWS]
    closest = max(len(a & b) / len(a | b) for a, b in combinations(sets, 2))
    assert closest < 0.5


def test_no_word_gives_a_class_away() -> None:
    """A word decides a class alone where nine in ten items that hold it are of that class."""
    per_class = {name: Counter[str]() for name in CLASSES}
    for row in ROWS:
        per_class[row["label"]].update(tokens(row["text"]))
    everywhere = sum(per_class.values(), Counter())
    for name in CLASSES:
        giveaways = {
            word: count
            for word, count in per_class[name].items()
            if count > 0.1 * 200 and count >= 0.9 * everywhere[word]
        }
        assert giveaways == {}, name


def test_texts_are_plain() -> None:
    assert all(row["text"] == row["text"].strip() and "\n" not in row["text"] for row in ROWS)
