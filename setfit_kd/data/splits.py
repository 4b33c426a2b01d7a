"""Split the data of a run into labeled texts, pool and evaluation set, without duplicates and leaks."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from heapq import heappush, heapreplace
from operator import itemgetter

from setfit_kd.config.stages import DataConfig
from setfit_kd.data.labeled_set import LabeledSet, draw_shots
from setfit_kd.data.sources import INVISIBLE
from setfit_kd.errors import DataError

logger = logging.getLogger(__name__)

_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛‹›ʼ", "'") | dict.fromkeys("“”„‟«»〝〞〟⹂", '"'))


@dataclass(frozen=True)
class DataReport:
    """Numbers of texts used, and of texts removed by cleaning.

    Attributes:
        labeled: Labeled texts used.
        pool: Pool texts used.
        evaluation: Texts of the evaluation set.
        labeled_duplicates: Labeled texts removed as duplicates.
        labeled_conflicts: Labeled texts removed because they occur with different labels.
        labeled_leaks: Labeled texts removed because they are in the evaluation set.
        pool_duplicates: Pool texts removed as duplicates.
        pool_labeled: Pool texts removed because they are labeled texts.
        pool_leaks: Pool texts removed because they are in the evaluation set.
    """

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
        """Return the counts by name."""
        return asdict(self)


@dataclass(frozen=True)
class DataSplits:
    """Labeled texts, pool and optional evaluation set, without duplicates and leaks."""

    labeled: LabeledSet
    pool: list[str]
    evaluation: LabeledSet | None
    report: DataReport


def normalize(text: str) -> str:
    """Normalize a text for comparison: texts with the same result count as duplicates.

    Applies NFKC, removes invisible characters, replaces typographic quotes and apostrophes by ASCII ones, folds case
    and collapses white space. NFKC is applied again at the end, since case folding can leave characters that compose.
    """
    if text.isascii():
        return " ".join(text.casefold().split())
    folded = unicodedata.normalize("NFKC", text.translate(INVISIBLE)).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded.translate(_QUOTES)).split())


def remove_leaks(data: LabeledSet, held_out: set[str], *, name: str, held_out_name: str) -> LabeledSet:
    """Remove the texts whose `normalize`d form is in ``held_out``, and log a warning with their number."""
    rows = [row for row, text in enumerate(data.texts) if normalize(text) not in held_out]
    n_leaks = len(data) - len(rows)
    if not n_leaks:
        return data
    logger.warning("Leak guard: removed %d %s texts that are also in the %s set.", n_leaks, name, held_out_name)
    return replace(data.take(rows), origin=f"{data.origin} without the texts of the {held_out_name} set")


def split_data(
    labeled: LabeledSet,
    pool: Iterable[str] | None,
    evaluation: LabeledSet | None,
    config: DataConfig,
    *,
    disjoint: bool = True,
) -> DataSplits:
    """Remove leaks and duplicates, then draw the labeled texts and the pool.

    1. Leak guard: remove all texts of the evaluation set, after `normalize`, from the labeled set and the pool.
    2. Remove duplicates, and labeled texts that occur with different labels.
    3. Draw the labeled texts, and remove them from the pool if ``disjoint``.
    4. Draw the pool from the rest. It is read only once: memory holds the drawn texts and about 100 bytes per text of
       the pool to detect duplicates.

    Args:
        labeled: Labeled texts.
        pool: Unlabeled texts; None for no pool.
        evaluation: Evaluation set, or None.
        config: How many texts to draw, and the seed.
        disjoint: Remove the labeled texts from the pool. Without it, ``labeled`` may be empty.

    Raises:
        DataError: If too few texts are left for training.
    """
    held_out = {normalize(text) for text in evaluation.texts} if evaluation else set()
    n_labeled, labeled = len(labeled), remove_leaks(labeled, held_out, name="labeled", held_out_name="evaluation")
    n_leaks = n_labeled - len(labeled)

    keys = [normalize(text) for text in labeled.texts]
    labels_by_key: dict[str, set[int]] = {}
    for key, label in zip(keys, labeled.labels.tolist(), strict=True):
        labels_by_key.setdefault(key, set()).add(label)
    rows = []
    conflicts = duplicates = 0
    seen: set[str] = set()
    for row, key in enumerate(keys):
        if len(labels_by_key[key]) > 1:
            conflicts += 1
        elif key in seen:
            duplicates += 1
        else:
            seen.add(key)
            rows.append(row)
    if conflicts:
        logger.warning("Removed %d labeled texts that occur with different labels.", conflicts)
    shots = cleaned = labeled.take(rows)
    if disjoint or (config.shots is not None and len(cleaned)):
        shots = draw_shots(cleaned, config.shots, seed=config.seed)
        _warn_about_small_classes(shots, config.shots)

    shot_keys = {normalize(text) for text in shots.texts} if disjoint else set()
    texts, pool_leaks, pool_labeled, pool_duplicates = (
        ([], 0, 0, 0) if pool is None else _draw_pool(pool, held_out, shot_keys, config)
    )
    report = DataReport(
        labeled=len(shots),
        pool=len(texts),
        evaluation=len(evaluation) if evaluation else 0,
        labeled_duplicates=duplicates,
        labeled_conflicts=conflicts,
        labeled_leaks=n_leaks,
        pool_duplicates=pool_duplicates,
        pool_labeled=pool_labeled,
        pool_leaks=pool_leaks,
    )
    _log_report(report)
    return DataSplits(shots, texts, evaluation, report)


def _draw_pool(
    pool: Iterable[str], held_out: set[str], shots: set[str], config: DataConfig
) -> tuple[list[str], int, int, int]:
    """Clean the pool and draw texts from it.

    The texts with the smallest keyed hashes are drawn. The draw therefore depends only on the seed and the texts, not
    on their order, and a smaller draw is a subset of a larger one.

    Returns:
        The drawn texts in the order of the pool, and the numbers of leaks, labeled texts and duplicates removed.
    """
    size = config.pool_size
    drawn: list[tuple[int, int, str]] = []  # a heap with the largest hash first: (-hash, row, text)
    leaks = labeled = duplicates = 0
    seen: set[bytes] = set()
    for row, text in enumerate(pool):
        key = normalize(text)
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
        if size is None:
            drawn.append((-rank, row, text))
        elif len(drawn) < size:
            heappush(drawn, (-rank, row, text))
        elif -rank > drawn[0][0]:
            heapreplace(drawn, (-rank, row, text))
    if leaks:
        logger.warning("Leak guard: removed %d pool texts that are also in the evaluation set.", leaks)
    if not drawn:
        raise DataError(
            "The pool is empty after removing the labeled texts and the evaluation texts.",
            hint="Add unlabeled texts that are not in these sets.",
        )
    if size is not None and len(seen) < size:
        logger.warning("The pool has only %d texts, expected %d: using all of them.", len(seen), size)
    drawn.sort(key=itemgetter(1))
    return [text for _, _, text in drawn], leaks, labeled, duplicates


def _warn_about_small_classes(labeled: LabeledSet, shots: int | None) -> None:
    if shots is None:
        return
    for name, count in zip(labeled.label_names, labeled.counts, strict=True):
        if count < shots:
            logger.warning("Class %r has only %d labeled texts, expected %d: using all of them.", name, count, shots)


def _log_report(report: DataReport) -> None:
    logger.info(
        "Data: %d labeled, %d pool and %d evaluation texts (removed %d labeled and %d pool duplicates).",
        report.labeled,
        report.pool,
        report.evaluation,
        report.labeled_duplicates,
        report.pool_duplicates,
    )
