"""Create unlabeled texts, which need not make sense, by editing existing ones, for pools that are too small."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from setfit_kd.data.splits import normalize
from setfit_kd.errors import DataError
from setfit_kd.models.heads import at_temperature
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import read_json_lines

logger = logging.getLogger(__name__)

# Replaces some words of texts, with a random seed.
Fill = Callable[[Sequence[str], int], list[str]]
# Returns a new text from two texts, each of at least two words, or None if the edit does not apply.
Edit = Callable[[str, str, np.random.Generator], str | None]
_REPLACE_WORDS = "replace"  # name of the edit that ``fill`` makes, in one call for all texts it was chosen for
_DELETE_PROBABILITY, _WORDS_PER_SWAP, _MAX_FAILED_DRAWS = 0.1, 10, 100
_TEXTS = "texts.jsonl"
# A lower-case letter continues the sentence: "approx. five".
_SENTENCE_END = re.compile(r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”’)\]]))\s+(?=[^\sa-z])")


def augment(
    texts: Sequence[str], n: int, *, seed: int, forbidden: Iterable[str] = (), fill: Fill | None = None
) -> list[str]:
    """Create ``n`` new texts with `EDITS` and, if ``fill`` is set, by replacing masked words.

    The texts are drawn evenly. To each, the least used of the edits that create something new is applied. Texts of a
    single word, such as texts in languages written without spaces, are skipped.

    Args:
        forbidden: Texts that must not be created, after `normalize`, such as those of the evaluation set.
        fill: Replaces words, such as a `FillMask` (Jiao et al., 2020, "TinyBERT").

    Returns:
        n texts that differ from each other and from ``texts`` after `normalize`; fewer if 100 + len(texts) consecutive
        draws create nothing new.
    """
    rng = np.random.default_rng([seed, 13])
    originals: dict[str, str] = {}
    for text in texts:
        originals.setdefault(normalize(text), text)
    sources = [text for text in originals.values() if len(text.split()) > 1]
    seen = {"", *originals, *map(normalize, forbidden)}
    augmented: list[str] = []
    counts = dict.fromkeys([*EDITS, _REPLACE_WORDS] if fill else EDITS, 0)
    draws = _draw_pairs(sources, rng)
    max_failed = len(sources) + _MAX_FAILED_DRAWS if sources else 0
    n_failed = 0

    def add(text: str | None) -> bool:
        nonlocal n_failed
        key = normalize(text or "")
        if text is None or key in seen:
            return False
        seen.add(key)
        augmented.append(text)
        n_failed = 0
        return True

    while len(augmented) < n and n_failed < max_failed:
        to_fill: list[str] = []
        while len(augmented) + len(to_fill) < n and n_failed < max_failed:
            n_failed += 1
            text, other = next(draws)
            for name in sorted(counts, key=counts.__getitem__):
                if name == _REPLACE_WORDS:
                    to_fill.append(text)
                if name == _REPLACE_WORDS or add(EDITS[name](text, other, rng)):
                    counts[name] += 1
                    break
        if fill and to_fill:
            for text in fill(to_fill, int(rng.integers(2**31))):
                add(text)
    return augmented


def _draw_pairs(texts: Sequence[str], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Yield pairs of a text and a random other text forever; each pass has every text once, in random order."""
    while True:
        for row, other in zip(rng.permutation(len(texts)), rng.integers(len(texts), size=len(texts)), strict=True):
            yield texts[row], texts[other]


def _delete_words(text: str, _: str, rng: np.random.Generator) -> str:
    words = text.split()
    keep = rng.random(len(words)) >= _DELETE_PROBABILITY
    if keep.all() or not keep.any():
        index = rng.integers(len(words))
        keep[index] = not keep[index]
    return " ".join(word for word, is_kept in zip(words, keep, strict=True) if is_kept)


def _swap_words(text: str, _: str, rng: np.random.Generator) -> str:
    words = text.split()
    for _pair in range(max(1, round(len(words) / _WORDS_PER_SWAP))):
        i = rng.integers(len(words))
        j = (i + rng.integers(1, len(words))) % len(words)
        words[i], words[j] = words[j], words[i]
    return " ".join(words)


def _reverse_sentences(text: str, _: str, __: np.random.Generator) -> str | None:
    sentences = _SENTENCE_END.split(text.strip())
    return " ".join(reversed(sentences)) if len(sentences) > 1 else None


def _crossover(text: str, other: str, _: np.random.Generator) -> str:
    first, second = text.split(), other.split()
    return " ".join([*first[: len(first) // 2], *second[len(second) // 2 :]])


EDITS: dict[str, Edit] = {
    # Delete each word with probability 0.1, but at least one and not all (Wei and Zou, 2019, "EDA").
    "delete": _delete_words,
    # Swap two words, once per ten words (same paper).
    "swap": _swap_words,
    "sentences": _reverse_sentences,
    # Join the halves of two texts (Luque, 2019, "Atalaya at TASS 2019"); best for short questions.
    "crossover": _crossover,
}


def save_texts(texts: Sequence[str], folder: Path) -> None:
    """Write augmented texts to a new folder, as `atomic_folder` does."""
    with atomic_folder(folder) as part, (part / _TEXTS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)


def load_texts(folder: Path) -> list[str]:
    """Read texts written by `save_texts`; raise a `DataError` if they cannot be read."""
    try:
        return [str(text) for text in read_json_lines(folder / _TEXTS)]
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the texts in {folder} ({error}).", hint="Create them again.") from None


def drop_uncertain(signals: TeacherSignals, rows: range, *, min_confidence: float) -> TeacherSignals:
    """Remove those of the ``rows`` whose prediction has a calibrated probability below ``min_confidence``.

    In a multi-label task, it is that of the least certain label.
    """
    augmented, task = np.arange(rows.start, rows.stop), signals.task
    calibrated = at_temperature(signals.probabilities[augmented], signals.temperature, task).astype(np.float32)
    confidence = task.confidence(calibrated).min(axis=1)
    uncertain = augmented[confidence < min_confidence]
    n_kept = len(augmented) - len(uncertain)
    logger.info("The teacher is confident about %d of %d augmented texts.", n_kept, len(augmented))
    return signals.take(np.setdiff1d(np.arange(len(signals)), uncertain))
