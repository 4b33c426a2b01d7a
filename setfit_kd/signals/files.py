"""Read teacher signals from a file of class probabilities."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from setfit_kd.data.readers import LINE_NUMBERED, read_records
from setfit_kd.data.sources import RowErrors, get_text
from setfit_kd.errors import DataError
from setfit_kd.signals.signals import TeacherSignals

_TEXT, _PROBABILITIES, _COLUMN, _EMBEDDING = "text", "probabilities", "probability_", "embedding"
_TOLERANCE = 0.01
"""Largest accepted difference between 1 and the sum of a row's probabilities, which may have been rounded."""


def read_signals(path: str | Path) -> TeacherSignals:
    """Read signals of any teacher, such as a large language model, people or another program.

    The file is JSONL, Parquet, CSV or TSV. Each row has a ``text`` and its probabilities: an object ``probabilities``
    with the labels as keys, or one column ``probability_LABEL`` per label, both as written by ``setfit-kd predict``.
    Rows may also have an ``embedding``, a list of numbers. The first row determines the labels.

    Raises:
        DataError: If the file cannot be read, or rows are unusable. The message names the rows.

    Example:
        >>> from setfit_kd import train_student
        >>> train_student(read_signals("labels.jsonl"), "path/to/a/body", objective="soft-labels")  # doctest: +SKIP
    """
    path = Path(path)
    texts: list[str] = []
    probabilities, embeddings = array("f"), array("f")
    names: tuple[str, ...] = ()
    dimension: int | None = None
    errors = RowErrors(str(path), "line" if path.suffix.lower() in LINE_NUMBERED else "row")
    for number, record in read_records(path):
        if not names:
            names = _label_names(record, path)
            dimension = _dimension(record, path)
        text, text_problem = get_text(record, (_TEXT,))
        distribution, distribution_problem = _distribution(_probabilities(record), names)
        embedding, embedding_problem = _embedding(record, dimension)
        problem = text_problem or distribution_problem or embedding_problem
        if problem is not None:
            errors.add(number, problem)
            continue
        texts.append(text)
        probabilities.extend(distribution)
        embeddings.extend(embedding)
    if errors.total:
        raise DataError(f"{errors}.", hint="Fix or remove these rows.")
    if not texts:
        raise DataError(f"{path} has no rows.", hint="Add at least two rows.")
    distributions = np.array(probabilities, np.float32).reshape(len(texts), len(names))
    vectors = None if dimension is None else np.array(embeddings, np.float32).reshape(len(texts), dimension)
    return TeacherSignals(texts, distributions, names, vectors, str(path))


def _probabilities(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the unchecked probabilities of a row by label, or None."""
    value = record.get(_PROBABILITIES)
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # a Parquet map is read as a list of pairs
    if isinstance(value, Mapping):
        return {str(name): probability for name, probability in value.items()}
    columns = {name.removeprefix(_COLUMN): value for name, value in record.items() if name.startswith(_COLUMN)}
    return columns or None


def _label_names(record: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    probabilities = _probabilities(record)
    if _TEXT not in record or probabilities is None:
        raise DataError(
            f"{path} has the columns {', '.join(map(repr, record))}.",
            hint=f"Add {_TEXT!r}, and {_PROBABILITIES!r} by label or one column '{_COLUMN}LABEL' per label.",
        )
    if len(probabilities) < 2:
        raise DataError(f"{path}: expected at least two labels, got {len(probabilities)}.", hint="Add more labels.")
    return tuple(probabilities)


def _distribution(probabilities: dict[str, Any] | None, names: tuple[str, ...]) -> tuple[list[float], str | None]:
    """Return the probabilities in the order of ``names``, scaled to sum to 1, and the reason if they are unusable."""
    if probabilities is None:
        return [], "no probabilities"
    if probabilities.keys() != set(names):
        name = sorted(probabilities.keys() ^ set(names))[0]
        return [], f"the label {name!r} is {'not' if name in probabilities else 'only'} in the first row"
    values = [_number(probabilities[name]) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None or not 0 <= value <= 1 + _TOLERANCE:
            return [], f"the probability of {name!r} must be between 0 and 1, got {probabilities[name]!r:.40}"
    total = math.fsum(value for value in values if value is not None)
    if abs(total - 1) > _TOLERANCE:
        return [], f"the probabilities must sum to 1, got {total:.4g}"
    return [value / total for value in values if value is not None], None


def _embedding(record: Mapping[str, Any], dimension: int | None) -> tuple[list[float], str | None]:
    """Return the embedding of a row, and the reason if it is unusable; without ``dimension``, rows must have none."""
    embedding = record.get(_EMBEDDING)
    if dimension is None:
        return [], None if embedding is None else "unexpected embedding: the first row has none"
    if not isinstance(embedding, list) or len(embedding) != dimension:
        return [], f"expected an embedding of {dimension} numbers, as in the first row"
    values = [_number(value) for value in embedding]
    if not all(value is not None and math.isfinite(value) for value in values):
        return [], "the embedding must contain only finite numbers"
    return [value for value in values if value is not None], None


def _dimension(record: Mapping[str, Any], path: Path) -> int | None:
    """Return the dimension of a row's embedding, or None if the row has none."""
    embedding = record.get(_EMBEDDING)
    if embedding is not None and (not isinstance(embedding, list) or not embedding):
        raise DataError(
            f"{path}: the embedding of the first row must be a list of numbers, got {embedding!r:.40}.",
            hint="Use JSONL or Parquet for embeddings, since CSV and TSV cannot contain lists, or remove the column.",
        )
    return None if embedding is None else len(embedding)


def _number(value: Any) -> float | None:
    """Convert a number or a numeric string to float; return None for NaN and all other values."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number is None or math.isnan(number) else number
