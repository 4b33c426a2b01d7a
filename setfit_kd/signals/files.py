"""Read teacher signals from files of class probabilities."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from setfit_kd.data.readers import READERS, file_format, read_records, record_unit
from setfit_kd.data.sources import RowErrors, get_pair
from setfit_kd.errors import DataError
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL, Task

_COLUMN = "probability_"
_TOLERANCE = 0.01  # largest difference between 1 and the sum of a row's probabilities, which may have been rounded


def read_signals(path: str | Path) -> TeacherSignals:
    """Read signals of any teacher, such as a large language model, people or another program.

    The file is JSONL, Parquet, CSV or TSV; several files, as of a folder or a pattern, are read in the order of their
    paths. Each row has a ``text`` and its probabilities: an object ``probabilities``
    with the labels as keys, or one column ``probability_LABEL`` per label, both as written by ``setfit-kd predict``.
    Pairs have a ``text_pair``, too. Rows may also have an ``embedding``, a list of numbers. The first row determines
    the labels. If it has ``labels``, which predict writes for several labels per text, the probabilities are
    independent and need not sum to 1.

    Raises:
        DataError: If the file cannot be read, or rows are unusable. The message names the rows.

    Example:
        >>> from setfit_kd import train_student
        >>> train_student(read_signals("labels.jsonl"), "path/to/a/body", objective="soft-labels")  # doctest: +SKIP
    """
    path, texts, probabilities, embeddings = Path(path), list[str](), array("f"), array("f")
    errors = {file: RowErrors(str(file), record_unit(file)) for file in _list_files(path)}
    names: tuple[str, ...] = ()
    task = SINGLE_LABEL
    dimension: int | None = None
    pair_column: tuple[str, ...] = ()
    for file, (number, record) in ((path, row) for path in errors for row in read_records(path)):
        by_label = _probabilities(record)
        if not names:
            names = tuple(by_label)
            task = MULTI_LABEL if "labels" in record and "label" not in record else SINGLE_LABEL
            dimension = _check_first_row(record, names, file)
            pair_column = ("text_pair",) if "text_pair" in record else ()
        text, problem = get_pair(record, ("text",), pair_column)
        try:
            distribution = _distribution(by_label, names, task)
            embedding = _embedding(record.get("embedding"), dimension)
        except ValueError as error:
            problem = problem or str(error)
        if problem is not None:
            errors[file].add(number, problem)
        else:
            texts.append(text)
            probabilities.extend(distribution)
            embeddings.extend(embedding)
    for file_errors in errors.values():
        file_errors.check()
    if not texts:
        raise DataError(f"{path} has no rows.", hint="Add at least two rows.")
    distributions = np.array(probabilities, np.float32).reshape(len(texts), len(names))
    vectors = None if dimension is None else np.array(embeddings, np.float32).reshape(len(texts), dimension)
    return TeacherSignals(texts, distributions, names, vectors, str(path), task=task)


def _list_files(path: Path) -> list[Path]:
    """Return the files of a folder or a pattern in the order of their paths; other paths are returned as they are."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file_format(file) in READERS)
    return [path] if path.exists() else sorted(map(Path, LocalFileSystem().glob(str(path)))) or [path]


def _probabilities(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the unchecked probabilities of a row by label; empty if it has none."""
    value = record.get("probabilities")
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # a Parquet map is read as a list of pairs
    if isinstance(value, Mapping):
        return {str(name): probability for name, probability in value.items()}
    return {name.removeprefix(_COLUMN): value for name, value in record.items() if name.startswith(_COLUMN)}


def _check_first_row(record: Mapping[str, Any], names: tuple[str, ...], path: Path) -> int | None:
    """Return the dimension of the embeddings, or None if there are none."""
    if "text" not in record or len(names) < 2:
        message = f"{path} has the columns {', '.join(map(repr, record))}, with probabilities of {len(names)} labels."
        hint = f"Add 'text', and 'probabilities' by label or one column '{_COLUMN}LABEL' per label, for two or more."
        raise DataError(message, hint=hint)
    embedding = record.get("embedding")
    if embedding is not None and (not isinstance(embedding, list) or not embedding):
        message = f"{path}: the embedding of the first row must be a list of numbers, got {embedding!r:.40}."
        raise DataError(message, hint="Use JSONL or Parquet for embeddings, or remove the column.")
    return None if embedding is None else len(embedding)


def _distribution(probabilities: dict[str, Any], names: tuple[str, ...], task: Task) -> list[float]:
    """Return the probabilities in the order of ``names``; raise a `ValueError` if unusable.

    Those of a single-label task are scaled to sum to 1.
    """
    if not probabilities:
        raise ValueError("no probabilities")
    for name in sorted(probabilities.keys() ^ set(names)):
        raise ValueError(f"the label {name!r} is {'not' if name in probabilities else 'only'} in the first row")
    values = [_number(probabilities[name]) for name in names]
    for name, value in zip(names, values, strict=True):
        if not 0 <= value <= 1 + _TOLERANCE:
            raise ValueError(f"the probability of {name!r} must be between 0 and 1, got {probabilities[name]!r:.40}")
    if task is MULTI_LABEL:
        return [min(value, 1.0) for value in values]
    total = math.fsum(values)
    if abs(total - 1) > _TOLERANCE:
        several = "several labels per text need a column 'labels'"
        raise ValueError(f"the probabilities must sum to 1, got {total:.4g} ({several})")
    return [value / total for value in values]


def _embedding(embedding: Any, dimension: int | None) -> list[float]:
    """Return the embedding of a row as numbers; raise a `ValueError` if it is unusable."""
    if dimension is None:
        if embedding is not None:
            raise ValueError("unexpected embedding: the first row has none")
        return []
    if not isinstance(embedding, list) or len(embedding) != dimension:
        raise ValueError(f"expected an embedding of {dimension} numbers, as in the first row")
    values = [_number(value) for value in embedding]
    if not all(map(math.isfinite, values)):
        raise ValueError("the embedding must contain only finite numbers")
    return values


def _number(value: Any) -> float:
    """Convert a number or a numeric string to float, and all other values to NaN."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
