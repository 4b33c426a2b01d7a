"""Split the data of a run into labeled texts, pool and evaluation sets, without duplicates and leaks."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from heapq import nsmallest
from operator import itemgetter

from setfit_kd.config.stages import DataConfig
from setfit_kd.data.labeled_set import LabeledSet, draw_shots
from setfit_kd.errors import DataError
from setfit_kd.runtime.classify import INVISIBLE

logger = logging.getLogger(__name__)

_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛‹›ʼ", "'") | dict.fromkeys("“”„‟«»〝〞〟⹂", '"'))


@dataclass(frozen=True)
class DataReport:
    """Numbers of texts used and removed; conflicts occur with different labels, leaks are in an evaluation set."""

    labeled: int
    pool: int
    evaluation: int
    labeled_duplicates: int = 0
    labeled_conflicts: int = 0
    labeled_leaks: int = 0
    pool_duplicates: int = 0
    pool_labeled: int = 0
    pool_leaks: int = 0


@dataclass(frozen=True)
class DataSplits:
    """Labeled texts, pool and evaluation sets by name (the first is the main one), without duplicates and leaks."""

    labeled: LabeledSet
    pool: list[str]
    evaluations: dict[str, LabeledSet]
    report: DataReport

    @property
    def evaluation(self) -> LabeledSet | None:
        """The main evaluation set, if any."""
        return next(iter(self.evaluations.values()), None)


def normalize(text: str) -> str:
    """Normalize a text for comparison: texts with the same result count as duplicates.

    Applies NFKC, removes invisible characters, replaces typographic quotes and apostrophes by ASCII ones, folds case
    and collapses white space. NFKC is applied again at the end, since case folding can leave characters that compose.
    """
    if text.isascii():
        return " ".join(text.casefold().split())
    folded = unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold()
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
    evaluations: Mapping[str, LabeledSet],
    config: DataConfig,
    *,
    disjoint: bool = True,
) -> DataSplits:
    """Remove leaks and duplicates, then draw the labeled texts and the pool.

    1. Leak guard: remove all texts of the evaluation sets, after `normalize`, from the labeled set and the pool.
    2. Remove duplicates, and labeled texts that occur with different labels.
    3. Draw the labeled texts; if ``disjoint``, remove them from the pool. Otherwise ``labeled`` may be empty.
    4. Draw the pool (None for no pool) from the rest. It is read only once: memory holds the drawn texts and about 100
       bytes per text of the pool to detect duplicates. If too few texts are left, a `DataError` is raised.
    """
    held_out = {normalize(text) for data in evaluations.values() for text in data.texts}
    removed: Counter[str] = Counter(labeled_leaks=len(labeled))
    labeled = remove_leaks(labeled, held_out, name="labeled", held_out_name="evaluation")
    removed["labeled_leaks"] -= len(labeled)
    keys = [normalize(text) for text in labeled.texts]
    labels_by_key: dict[str, set[bytes]] = defaultdict(set)
    for key, label in zip(keys, labeled.labels, strict=True):
        labels_by_key[key].add(label.tobytes())
    first_rows = {key: row for row, key in reversed(list(enumerate(keys))) if len(labels_by_key[key]) == 1}
    removed["labeled_conflicts"] = n_conflicts = sum(key not in first_rows for key in keys)
    removed["labeled_duplicates"] = len(keys) - n_conflicts - len(first_rows)
    if n_conflicts:
        logger.warning("Removed %d labeled texts that occur with different labels.", n_conflicts)
    shots = labeled.take(sorted(first_rows.values()))
    if disjoint or (config.shots is not None and len(shots)):
        shots = draw_shots(shots, config.shots, seed=config.seed)
        for name, count in zip(shots.label_names, shots.counts, strict=True):
            if count < (config.shots or 0):
                message = "Class %r has only %d labeled texts, expected %d: using all of them."
                logger.warning(message, name, count, config.shots)
    shot_keys = {normalize(text) for text in shots.texts} if disjoint else set()
    texts = [] if pool is None else _draw_pool(pool, held_out, shot_keys, config, removed)
    report = DataReport(len(shots), len(texts), sum(map(len, evaluations.values())), **removed)
    message = "Data: %d labeled, %d pool and %d evaluation texts (removed %d labeled and %d pool duplicates)."
    counts = report.labeled, report.pool, report.evaluation, report.labeled_duplicates, report.pool_duplicates
    logger.info(message, *counts)
    return DataSplits(shots, texts, dict(evaluations), report)


def _draw_pool(
    pool: Iterable[str], held_out: set[str], shots: set[str], config: DataConfig, removed: Counter[str]
) -> list[str]:
    """Clean the pool and draw texts from it, in the order of the pool; count the removed texts in ``removed``.

    The texts with the smallest keyed hashes are drawn. The draw therefore depends only on the seed and the texts, not
    on their order, and a smaller draw is a subset of a larger one.
    """
    seen: set[bytes] = set()
    size = config.pool_size

    def hashed() -> Iterator[tuple[int, int, str]]:
        """Yield the hash, the row and the text of each text that may be drawn."""
        for row, text in enumerate(pool):
            key = normalize(text)
            encoded = key.encode()
            digest = blake2b(encoded, digest_size=16).digest()
            if key in held_out:
                removed["pool_leaks"] += 1
            elif key in shots:
                removed["pool_labeled"] += 1
            elif digest in seen:
                removed["pool_duplicates"] += 1
            else:
                seen.add(digest)
                keyed = blake2b(encoded, digest_size=8, key=config.seed.to_bytes(4, "big"))
                yield int.from_bytes(keyed.digest(), "big"), row, text

    drawn = sorted(hashed() if size is None else nsmallest(size, hashed()), key=itemgetter(1))
    if removed["pool_leaks"]:
        logger.warning("Leak guard: removed %d pool texts that are also in the evaluation set.", removed["pool_leaks"])
    if not drawn:
        message = "The pool is empty after removing the labeled texts and the evaluation texts."
        raise DataError(message, hint="Add unlabeled texts that are not in these sets.")
    if size is not None and len(seen) < size:
        logger.warning("The pool has only %d texts, expected %d: using all of them.", len(seen), size)
    return [text for _, _, text in drawn]
