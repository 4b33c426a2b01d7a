"""Read teacher signals from a file of class probabilities."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from setfit_kd.data import LINE_NUMBERED, RowErrors, get_text, read_records
from setfit_kd.errors import DataError
from setfit_kd.signals.signals import TeacherSignals

_TEXT, _PROBABILITIES, _COLUMN, _EMBEDDING = "text", "probabilities", "probability_", "embedding"
_ROUNDED = 0.01
"""How far from 1 probabilities may sum up that were rounded by whoever wrote them."""


def read_signals(path: str | Path) -> TeacherSignals:
    """Read what any teacher says about texts: a large language model, people, another program.

    The file is JSONL, Parquet, CSV or TSV, with a ``text`` a row and its probabilities: an object ``probabilities`` by
    label, or a column ``probability_LABEL`` a label, both as ``setfit-kd predict`` writes them. An ``embedding``, a
    list of numbers, may stand beside them. The first row says which labels there are.

    Raises:
        DataError: The file cannot be read, or rows cannot be used; with their numbers.

    Example:
        >>> from setfit_kd import train_student
        >>> train_student(read_signals("labels.jsonl"), "path/to/a/body", objective="soft-labels")  # doctest: +SKIP
    """
    path = Path(path)
    texts: list[str] = []
    probabilities, embeddings = array("f"), array("f")
    names: tuple[str, ...] = ()
    width: int | None = None
    problems = RowErrors(str(path), "line" if path.suffix.lower() in LINE_NUMBERED else "row")
    for number, record in read_records(path):
        if not names:
            names = _names(record, path)
            width = _width(record, path)
        text, problem = get_text(record, (_TEXT,))
        row, wrong = _distribution(_told(record), names)
        vector, unlike = _vector(record, width)
        problem = problem or wrong or unlike
        if problem is not None:
            problems.add(number, problem)
            continue
        texts.append(text)
        probabilities.extend(row)
        embeddings.extend(vector)
    if problems.total:
        raise DataError(f"{problems}.", hint="Mend or remove those rows.")
    if not texts:
        raise DataError(f"There are no rows in {path}.", hint="Give at least two rows.")
    rows = np.array(probabilities, np.float32).reshape(len(texts), len(names))
    vectors = None if width is None else np.array(embeddings, np.float32).reshape(len(texts), width)
    return TeacherSignals(texts, rows, names, vectors, str(path))


def _told(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row's probabilities by label, unchecked."""
    told = record.get(_PROBABILITIES)
    if isinstance(told, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in told):
        told = dict(told)  # how a map of Parquet's arrives
    if isinstance(told, Mapping):
        return {str(name): value for name, value in told.items()}
    columns = {name.removeprefix(_COLUMN): value for name, value in record.items() if name.startswith(_COLUMN)}
    return columns or None


def _names(record: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    told = _told(record)
    if _TEXT not in record or told is None:
        raise DataError(
            f"{path} has the columns {', '.join(map(repr, record))}.",
            hint=f"Give {_TEXT!r}, and {_PROBABILITIES!r} by label or a column '{_COLUMN}LABEL' a label.",
        )
    if len(told) < 2:
        raise DataError(f"{path} tells of {len(told)} label.", hint="Give the probabilities of two labels or more.")
    return tuple(told)


def _distribution(told: dict[str, Any] | None, names: tuple[str, ...]) -> tuple[list[float], str | None]:
    """Probabilities in the order of the names, summing to 1, or what is wrong with them."""
    if told is None:
        return [], "no probabilities"
    if told.keys() != set(names):
        other = sorted(told.keys() ^ set(names))[0]
        return [], f"the label {other!r} is {'not' if other in told else 'only'} in the first row"
    values = [_number(told[name]) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None or not 0 <= value <= 1 + _ROUNDED:
            return [], f"the probability of {name!r} is {told[name]!r:.40}"
    total = math.fsum(value for value in values if value is not None)
    if abs(total - 1) > _ROUNDED:
        return [], f"the probabilities sum to {total:.4g}"
    return [value / total for value in values if value is not None], None


def _vector(record: Mapping[str, Any], width: int | None) -> tuple[list[float], str | None]:
    """A row's embedding, or what is wrong with it; without a width, none is read."""
    given = record.get(_EMBEDDING)
    if width is None:
        return [], None if given is None else "an embedding, where the first row has none"
    if not isinstance(given, list) or len(given) != width:
        return [], f"no embedding of {width} numbers, as the first row has"
    values = [_number(value) for value in given]
    if not all(value is not None and math.isfinite(value) for value in values):
        return [], "the embedding is not of finite numbers"
    return [value for value in values if value is not None], None


def _width(record: Mapping[str, Any], path: Path) -> int | None:
    """How many numbers an embedding has; None where there are none."""
    given = record.get(_EMBEDDING)
    if given is not None and (not isinstance(given, list) or not given):
        raise DataError(
            f"{path}: the embedding of the first row is no list of numbers.",
            hint="Give lists, which CSV and TSV cannot hold, or drop the column.",
        )
    return None if given is None else len(given)


def _number(value: Any) -> float | None:
    """A number, or a text that is one; NaN is none."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number is None or math.isnan(number) else number
