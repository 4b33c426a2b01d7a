"""From sources to what a run trains and evaluates on: clean, sampled, and free of leaks."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from heapq import heappush, heapreplace
from operator import itemgetter

from setfit_kd.config import DataConfig
from setfit_kd.data.labeled_set import LabeledSet, draw_shots
from setfit_kd.data.sources import INVISIBLE
from setfit_kd.errors import DataError

logger = logging.getLogger(__name__)

_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛‹›ʼ", "'") | dict.fromkeys("“”„‟«»〝〞〟⹂", '"'))


@dataclass(frozen=True)
class DataReport:
    """What cleaning took out and what is left, in texts."""

    labeled: int
    pool: int
    evaluation: int
    labeled_duplicates: int
    labeled_conflicts: int
    labeled_leaks: int
    pool_duplicates: int
    pool_labeled: int
    pool_leaks: int

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


@dataclass(frozen=True)
class DataSplits:
    """Labeled texts, pool, and evaluation set (None if there is none), without duplicates and leaks."""

    labeled: LabeledSet
    pool: list[str]
    evaluation: LabeledSet | None
    report: DataReport


def normalise(text: str) -> str:
    """The form in which two texts count as the same.

    Compatible characters are made one (NFKC), invisible ones dropped, typographic quotes and apostrophes replaced by
    ASCII ones, case folded, and runs of white space made one space. Folding can leave characters that compose anew,
    hence the second normalisation.
    """
    if text.isascii():
        return " ".join(text.casefold().split())
    folded = unicodedata.normalize("NFKC", text.translate(INVISIBLE)).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded.translate(_QUOTES)).split())


def remove_leaks(data: LabeledSet, held_out: set[str], *, name: str, held_out_name: str) -> LabeledSet:
    """Leave out the texts whose `normalise`d form is in ``held_out``, with a warning that tells how many."""
    kept = [row for row, text in enumerate(data.texts) if normalise(text) not in held_out]
    leaks = len(data) - len(kept)
    if not leaks:
        return data
    logger.warning("Leak guard: %d %s texts are in the %s set and were taken out.", leaks, name, held_out_name)
    return replace(data.take(kept), origin=f"{data.origin} without the texts of the {held_out_name} set")


def split_data(
    labeled: LabeledSet,
    pool: Iterable[str] | None,
    evaluation: LabeledSet | None,
    config: DataConfig,
    *,
    apart: bool = True,
) -> DataSplits:
    """Clean and sample; without a pool, there is none.

    The leak guard comes first: no text of the evaluation set, however written (see `normalise`), stays in the labeled
    set or the pool. Then duplicates go, and labeled texts that occur with different labels. The shots are drawn, their
    texts leave the pool, if the two shall be ``apart``, and the pool is drawn from what is left.

    The pool is gone through once and only what is drawn of it is kept, with about 100 bytes for each of its texts to
    know it again by.

    Raises:
        DataError: Too little is left to train on.
    """
    held_out = {normalise(text) for text in evaluation.texts} if evaluation else set()
    read, labeled = labeled, remove_leaks(labeled, held_out, name="labeled", held_out_name="evaluation")

    keys = [normalise(text) for text in labeled.texts]
    labels_of: dict[str, set[int]] = {}
    for key, label in zip(keys, labeled.labels.tolist(), strict=True):
        labels_of.setdefault(key, set()).add(label)
    kept = []
    conflicts = duplicates = 0
    seen: set[str] = set()
    for row, key in enumerate(keys):
        if len(labels_of[key]) > 1:
            conflicts += 1
        elif key in seen:
            duplicates += 1
        else:
            seen.add(key)
            kept.append(row)
    if conflicts:
        logger.warning("%d labeled texts occur with different labels and were taken out.", conflicts)
    left = labeled.take(kept)
    shots = left
    if apart or (config.shots is not None and len(left)):
        shots = draw_shots(left, config.shots, seed=config.seed)
        _warn_of_small_classes(shots, config.shots)

    shot_keys = {normalise(text) for text in shots.texts} if apart else set()
    texts, pool_leaks, pool_labeled, pool_duplicates = (
        ([], 0, 0, 0) if pool is None else _draw_pool(pool, held_out, shot_keys, config)
    )
    report = DataReport(
        labeled=len(shots),
        pool=len(texts),
        evaluation=len(evaluation) if evaluation else 0,
        labeled_duplicates=duplicates,
        labeled_conflicts=conflicts,
        labeled_leaks=len(read) - len(labeled),
        pool_duplicates=pool_duplicates,
        pool_labeled=pool_labeled,
        pool_leaks=pool_leaks,
    )
    _log_report(report)
    return DataSplits(shots, texts, evaluation, report)


def _draw_pool(
    pool: Iterable[str], held_out: set[str], shots: set[str], config: DataConfig
) -> tuple[list[str], int, int, int]:
    """The pool's texts, cleaned and drawn, in their order; and how many leaks, labeled texts and duplicates it had.

    The texts drawn are those with the smallest keyed hashes, so that a draw depends on the seed and the texts alone,
    and a smaller draw is part of a larger one.
    """
    wanted = config.pool_size
    drawn: list[tuple[int, int, str]] = []  # a heap, largest hash first: (-hash, place, text)
    leaks = labeled = duplicates = 0
    seen: set[bytes] = set()
    for place, text in enumerate(pool):
        key = normalise(text)
        if key in held_out:
            leaks += 1
            continue
        if key in shots:
            labeled += 1
            continue
        encoded = key.encode()
        digest = blake2b(encoded, digest_size=16).digest()
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        rank = int.from_bytes(blake2b(encoded, digest_size=8, key=config.seed.to_bytes(4, "big")).digest(), "big")
        if wanted is None:
            drawn.append((-rank, place, text))
        elif len(drawn) < wanted:
            heappush(drawn, (-rank, place, text))
        elif -rank > drawn[0][0]:
            heapreplace(drawn, (-rank, place, text))
    if leaks:
        logger.warning("Leak guard: %d pool texts are in the evaluation set and were taken out.", leaks)
    if not drawn:
        raise DataError(
            "No pool text is left after taking out the labeled and the evaluation texts.",
            hint="Give unlabeled texts that are not among them.",
        )
    if wanted is not None and len(seen) < wanted:
        logger.warning("The pool holds %d texts, fewer than the %d asked for: all are used.", len(seen), wanted)
    drawn.sort(key=itemgetter(1))
    return [text for _, _, text in drawn], leaks, labeled, duplicates


def _warn_of_small_classes(shots: LabeledSet, wanted: int | None) -> None:
    if wanted is None:
        return
    for name, count in zip(shots.label_names, shots.counts, strict=True):
        if count < wanted:
            logger.warning("Class %r has %d labeled texts, fewer than %d: all are used.", name, count, wanted)


def _log_report(report: DataReport) -> None:
    logger.info(
        "Data: %d labeled, %d pool, %d evaluation texts (%d labeled and %d pool duplicates taken out).",
        report.labeled,
        report.pool,
        report.evaluation,
        report.labeled_duplicates,
        report.pool_duplicates,
    )
