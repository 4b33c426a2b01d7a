"""Tests of the bundled corpus."""

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


@pytest.mark.parametrize(("split", "per_class", "hard"), [("train", 150, 30), ("eval", 50, 10)])
def test_class_counts(split: str, per_class: int, hard: int) -> None:
    rows = newswire(split)
    assert Counter(row["label"] for row in rows) == dict.fromkeys(CLASSES, per_class)
    assert Counter(row["label"] for row in rows if row["hard"]) == dict.fromkeys(CLASSES, hard)
    assert all(set(row) == {"text", "label", "hard"} for row in rows)
    assert all(row["text"] == " ".join(row["text"].split()) and 20 <= len(row["text"].split()) <= 45 for row in rows)


def test_no_near_duplicates() -> None:
    token_sets = [tokens(row["text"]) for row in ROWS]
    max_similarity = max(len(a & b) / len(a | b) for a, b in combinations(token_sets, 2))
    assert max_similarity < 0.5


def test_no_word_identifies_a_class() -> None:
    """A word identifies a class if 90% of the texts with the word, and more than 20 texts, are of that class."""
    counts = Counter((word, row["label"]) for row in ROWS for word in tokens(row["text"]))
    totals = Counter(word for row in ROWS for word in tokens(row["text"]))
    assert [key for key, n in counts.items() if n > 20 and n >= 0.9 * totals[key[0]]] == []
