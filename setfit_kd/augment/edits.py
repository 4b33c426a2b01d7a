"""New texts out of given ones, for a pool that is too small.

They carry no labels, and need not make sense: they need only lie near what the teacher shall be asked about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from setfit_kd.data import normalise

Fill = Callable[[Sequence[str], int], list[str]]
"""From texts and a seed to the texts, in their order, with some words replaced."""

Method = Callable[[str, str, np.random.Generator], str | None]
"""From a text of two words or more and another such text to a new one, or to None where the method does not apply."""

REPLACE = "replace"
"""The method that is the caller's: all texts it is drawn for are handed over at once."""

_DELETED = 0.1
_WORDS_PER_SWAP = 10
_MAX_FAILED_DRAWS = 100
# A lower-case letter goes on with a sentence: "approx. five".
_SENTENCE_END = re.compile(r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”’)\]]))\s+(?=[^\sa-z])")


def augment(
    texts: Sequence[str], n: int, *, seed: int, forbidden: Iterable[str] = (), fill: Fill | None = None
) -> list[str]:
    """Make new texts by `METHODS`, and by masked words replaced where ``fill`` is given.

    The texts are drawn evenly, and each goes to the method used least so far of those that make something new of it. A
    text of one word only, as are those of languages written without spaces, is left out.

    Args:
        texts: What to make them from.
        n: How many to make.
        seed: The same seed makes the same texts.
        forbidden: Texts that must not come out, however written (see `normalise`), such as the evaluation set's.
        fill: Replaces words, such as a `FillMask` (Jiao et al., 2020, "TinyBERT").

    Returns:
        n texts, no two the same and none the same as one of ``texts``, after `normalise`; fewer where a hundred draws
        more than there are texts give nothing new.
    """
    rng = np.random.default_rng([seed, 13])
    own: dict[str, str] = {}
    for text in texts:
        own.setdefault(normalise(text), text)
    sources = [text for text in own.values() if len(text.split()) > 1]
    seen = {"", *own, *map(normalise, forbidden)}
    made: list[str] = []

    def add(text: str | None) -> bool:
        key = "" if text is None else normalise(text)
        if text is None or key in seen:
            return False
        seen.add(key)
        made.append(text)
        return True

    used = dict.fromkeys([*METHODS, REPLACE] if fill else METHODS, 0)
    draws = _draw_pairs(sources, rng)
    patience = len(sources) + _MAX_FAILED_DRAWS if sources else 0
    idle = 0
    while len(made) < n and idle < patience:
        waiting: list[str] = []
        while len(made) + len(waiting) < n and idle < patience:
            idle += 1
            text, other = next(draws)
            for name in sorted(used, key=used.__getitem__):
                if name == REPLACE:
                    waiting.append(text)
                elif add(METHODS[name](text, other, rng)):
                    idle = 0
                else:
                    continue
                used[name] += 1
                break
        if fill and waiting:
            for new in fill(waiting, int(rng.integers(2**31))):
                if add(new):
                    idle = 0
    return made


def _draw_pairs(texts: Sequence[str], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Without end: a text and any other; each text once in random order, then each once more."""
    while True:
        for row, other in zip(rng.permutation(len(texts)), rng.integers(len(texts), size=len(texts)), strict=True):
            yield texts[row], texts[other]


def _delete(text: str, _: str, rng: np.random.Generator) -> str:
    words = text.split()
    kept = rng.random(len(words)) >= _DELETED
    if kept.all() or not kept.any():
        place = rng.integers(len(words))
        kept[place] = not kept[place]
    return " ".join(word for word, is_kept in zip(words, kept, strict=True) if is_kept)


def _swap(text: str, _: str, rng: np.random.Generator) -> str:
    words = text.split()
    for _pair in range(max(1, round(len(words) / _WORDS_PER_SWAP))):
        one = rng.integers(len(words))
        two = (one + rng.integers(1, len(words))) % len(words)
        words[one], words[two] = words[two], words[one]
    return " ".join(words)


def _sentences(text: str, _: str, __: np.random.Generator) -> str | None:
    sentences = _SENTENCE_END.split(text.strip())
    return " ".join(reversed(sentences)) if len(sentences) > 1 else None


def _crossover(text: str, other: str, _: np.random.Generator) -> str:
    first, second = text.split(), other.split()
    return " ".join([*first[: len(first) // 2], *second[len(second) // 2 :]])


METHODS: dict[str, Method] = {
    "delete": _delete,
    "swap": _swap,
    "sentences": _sentences,
    "crossover": _crossover,
}
"""By name: each word dropped with probability 0.1, but not none and not all; two words swapped for every ten (both Wei
and Zou, 2019, "EDA"); the sentences in reverse order; the first half of one text's words before the second half of
another's (Luque, 2019, "Atalaya at TASS 2019"), the best of the four for short questions."""
