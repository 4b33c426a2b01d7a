"""From a stream of texts to a stream of predictions, and to files of them, in step: a row out for each row in."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ConfigError
from setfit_kd.inference.classifier import TextClassifier
from setfit_kd.runtime import in_windows
from setfit_kd.utils.atomic_io import atomic_file
from setfit_kd.utils.console import without_warnings
from setfit_kd.utils.escape import as_text, json_text

Row: TypeAlias = tuple[str | None, Mapping[str, Any]]
"""A text, None where there is none that can be used, and the other columns of its row."""
Columns: TypeAlias = Mapping[str, Any]
"""The other columns that a table has, with their Arrow types."""
CHUNK_SIZE = 1024
"""Most texts held in memory."""


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of the next m texts.

    Attributes:
        texts: m texts, None where a row has none.
        labels: m labels; None where there is no text, or no class is probable enough.
        probabilities: (m, n_classes) float32, NaN where there is no text.
        columns: m mappings, the other columns of each text's row.
    """

    texts: list[str | None]
    labels: list[str | None]
    probabilities: npt.NDArray[np.float32]
    columns: list[Mapping[str, Any]]

    def rows(self) -> Iterator[tuple[str | None, str | None, list[float] | None, Mapping[str, Any]]]:
        """Each text with its label, its rounded probabilities, None where there is no text, and its columns."""
        for text, label, row, columns in zip(
            self.texts, self.labels, self.probabilities.tolist(), self.columns, strict=True
        ):
            yield text, label, None if text is None else [round(p, 6) for p in row], columns


WritePredictions = Callable[[Predictions], None]
Format = Callable[[IO[bytes], list[str], Columns], AbstractContextManager[WritePredictions]]
"""Within its block, the predictions for the named classes go to a binary file; tables have the other columns first."""


def classify(
    classifier: TextClassifier, rows: Iterable[Row], *, threshold: float = 0.0, at_once: int = CHUNK_SIZE
) -> Iterator[Predictions]:
    """Classify texts as they come; at most ``at_once`` of them are held in memory.

    Args:
        classifier: Any.
        rows: However many.
        threshold: Least probability of a label, from 0 to 1; below it there is none.
        at_once: Most texts classified together.
    """
    names = classifier.labels
    for part in in_windows(rows, at_once, text_of=itemgetter(0)):
        texts = {row: text for row, (text, _) in enumerate(part) if text is not None}
        probabilities = np.full((len(part), len(names)), np.nan, np.float32)
        with without_warnings("setfit_kd.runtime"):  # `in_windows` warns of all parts together
            probabilities[list(texts)] = classifier.predict_proba(list(texts.values()))
        labels: list[str | None] = [None] * len(part)
        for row in texts:
            column = int(probabilities[row].argmax())
            if probabilities[row, column] >= threshold:
                labels[row] = names[column]
        yield Predictions([text for text, _ in part], labels, probabilities, [columns for _, columns in part])


def _kept_names(ours: list[str]) -> Callable[[Iterable[str]], list[str]]:
    """From input columns to the names they are written under, the same in all rows: `input_` before a name of ours."""
    taken, names = set(ours), dict[str, str]()

    def kept_names(columns: Iterable[str]) -> list[str]:
        near = [name for name in columns if name not in names and re.sub("^(input_)+", "", name) in ours]
        for column in sorted(near, key=ours.__contains__):  # those that can keep their names come first
            names[column] = column
            while names[column] in taken:
                names[column] = f"input_{names[column]}"
            taken.add(names[column])
        return [names.get(name, name) for name in columns]

    return kept_names


def _cell(value: Any) -> Any:
    """A value as a table has it: text, a number or None; lists and objects as JSON."""
    if value is None or value != value:
        return None
    if isinstance(value, bool | int | float):
        return value
    text = json_text(value) if isinstance(value, list | dict) else as_text(value)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def _json_lines(file: IO[bytes], names: list[str], _: Columns) -> Iterator[WritePredictions]:
    kept_names = _kept_names(["text", "label", "probabilities"])

    def write(part: Predictions) -> None:
        for text, label, row, columns in part.rows():
            kept = dict(zip(kept_names(columns), columns.values(), strict=True))
            known = row and dict(zip(names, row, strict=True))
            record = {**kept, "text": text, "label": label, "probabilities": known}
            file.write(json_text(record).encode("utf-8") + b"\n")
        file.flush()

    yield write


def _header(names: list[str], columns: Columns) -> list[str]:
    ours = ["text", "label", "probability", *(f"probability_{name}" for name in names)]
    return [*map(_cell, _kept_names(ours)(columns)), *ours]


def _delimited(delimiter: str) -> Format:
    @contextmanager
    def delimited(file: IO[bytes], names: list[str], columns: Columns) -> Iterator[WritePredictions]:
        def write_line(line: str) -> None:
            file.write(line.removesuffix("\r\n").encode("utf-8") + b"\n")

        # The csv module quotes a carriage return only where its own lines end with one.
        table = csv.writer(SimpleNamespace(write=write_line), delimiter=delimiter, lineterminator="\r\n")

        def write(part: Predictions) -> None:
            for text, label, row, kept in part.rows():
                known = [max(row), *row] if row else [None] * (1 + len(names))
                table.writerow([*(_cell(kept.get(name)) for name in columns), text, label, *known])

        table.writerow(_header(names, columns))
        yield write

    return delimited


@contextmanager
def _parquet(file: IO[bytes], names: list[str], columns: Columns) -> Iterator[WritePredictions]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [*columns.values(), pa.string(), pa.string(), *[pa.float32()] * (1 + len(names))]
    schema = pa.schema(list(zip(_header(names, columns), kinds, strict=True)))

    def column(values: list[Any], kind: pa.DataType) -> pa.Array:
        if pa.types.is_string(kind) or pa.types.is_floating(kind):
            convert = str if pa.types.is_string(kind) else float
            values = [None if cell is None else convert(cell) for cell in map(_cell, values)]
        return pa.array(values, kind, from_pandas=True)

    with pq.ParquetWriter(file, schema) as table:

        def write(part: Predictions) -> None:
            missing = np.array([text is None for text in part.texts])
            best = part.probabilities.max(axis=1)
            numbers = [pa.array(column, pa.float32(), mask=missing) for column in (best, *part.probabilities.T)]
            kept = [column([row.get(name) for row in part.columns], kind) for name, kind in columns.items()]
            ours = [pa.array(part.texts, pa.string()), pa.array(part.labels, pa.string()), *numbers]
            table.write_batch(pa.record_batch([*kept, *ours], schema=schema))

        yield write


_FORMATS: dict[str, Format] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}


def check_output(path: Path) -> None:
    """Refuse a file whose ending says nothing about how to write it.

    Raises:
        ConfigError: It does not.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path}: predictions cannot be written so.", hint=f"Known endings: {', '.join(_FORMATS)}.")


@contextmanager
def predictions_file(path: Path, names: list[str], columns: Columns | None = None) -> Iterator[WritePredictions]:
    """Within this block, predictions are written to a file of the kind that its ending says: whole, or not at all.

    Yields a function that takes the next of them. Tables have the given ``columns`` before those of the predictions.

    Raises:
        ConfigError: The ending is not known.
        OutputError: The file cannot be written.
    """
    check_output(path)
    with atomic_file(path) as file, _FORMATS[path.suffix.lower()](file, names, columns or {}) as write:
        yield write


def predictions_stream(file: IO[bytes], names: list[str]) -> AbstractContextManager[WritePredictions]:
    """Within this block, predictions go to a binary stream as JSON lines.

    Yields a function that takes the next of them.
    """
    return _json_lines(file, names, {})
