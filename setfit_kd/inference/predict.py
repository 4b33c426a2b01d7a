"""Classify a stream of texts and write the predictions, one output row per input row."""

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
from setfit_kd.runtime.classify import chunk_texts
from setfit_kd.utils.atomic_io import atomic_file
from setfit_kd.utils.console import suppress_warnings
from setfit_kd.utils.escape import as_text, json_text

Row: TypeAlias = tuple[str | None, Mapping[str, Any]]
"""A text, or None if the row has no usable text, and the other columns of the row."""
Columns: TypeAlias = Mapping[str, Any]
"""The other columns of a table, with their Arrow types."""
CHUNK_SIZE = 1024
"""Maximum number of texts in memory."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for one chunk of m texts.

    Attributes:
        texts: m texts; None for rows without text.
        labels: m labels; None for rows without text and for probabilities below the threshold.
        probabilities: (m, n_classes) float32; NaN for rows without text.
        columns: m mappings with the other columns of each row.
    """

    texts: list[str | None]
    labels: list[str | None]
    probabilities: npt.NDArray[np.float32]
    columns: list[Mapping[str, Any]]

    def rows(self) -> Iterator[tuple[str | None, str | None, list[float] | None, Mapping[str, Any]]]:
        """Iterate over text, label, rounded probabilities (None without text) and other columns of each row."""
        for text, label, row, columns in zip(
            self.texts, self.labels, self.probabilities.tolist(), self.columns, strict=True
        ):
            yield text, label, None if text is None else [round(p, 6) for p in row], columns


WritePredictions = Callable[[Predictions], None]
OpenWriter = Callable[[IO[bytes], list[str], Columns], AbstractContextManager[WritePredictions]]
"""Opens a writer of predictions for the named classes on a binary file; in tables, the other columns come first."""


def classify(
    classifier: TextClassifier, rows: Iterable[Row], *, threshold: float = 0.0, chunk_size: int = CHUNK_SIZE
) -> Iterator[Predictions]:
    """Classify any number of texts in chunks, as they arrive.

    Args:
        classifier: Classifier to use.
        rows: Texts with the other columns of their rows.
        threshold: Minimum probability of a label, from 0 to 1; below it, the label is None.
        chunk_size: Maximum number of texts that are in memory and classified together.
    """
    names = classifier.labels
    for chunk in chunk_texts(rows, chunk_size, get_text=itemgetter(0)):
        texts = {row: text for row, (text, _) in enumerate(chunk) if text is not None}
        probabilities = np.full((len(chunk), len(names)), np.nan, np.float32)
        with suppress_warnings("setfit_kd.runtime"):  # `chunk_texts` logs one warning for all chunks
            probabilities[list(texts)] = classifier.predict_proba(list(texts.values()))
        labels: list[str | None] = [None] * len(chunk)
        for row in texts:
            column = int(probabilities[row].argmax())
            if probabilities[row, column] >= threshold:
                labels[row] = names[column]
        yield Predictions([text for text, _ in chunk], labels, probabilities, [columns for _, columns in chunk])


def _column_renamer(reserved: list[str]) -> Callable[[Iterable[str]], list[str]]:
    """Return a function that adds `input_` to input columns with a reserved name, in the same way for all rows."""
    used, new_names = set(reserved), dict[str, str]()

    def rename(columns: Iterable[str]) -> list[str]:
        similar = [name for name in columns if name not in new_names and re.sub("^(input_)+", "", name) in reserved]
        for column in sorted(similar, key=reserved.__contains__):  # first the columns that may keep their names
            new_names[column] = column
            while new_names[column] in used:
                new_names[column] = f"input_{new_names[column]}"
            used.add(new_names[column])
        return [new_names.get(name, name) for name in columns]

    return rename


def _to_cell(value: Any) -> Any:
    """Convert a value to a table cell: text, a number or None; lists and objects become JSON."""
    if value is None or value != value:
        return None
    if isinstance(value, bool | int | float):
        return value
    text = json_text(value) if isinstance(value, list | dict) else as_text(value)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def _json_lines(file: IO[bytes], names: list[str], _: Columns) -> Iterator[WritePredictions]:
    rename = _column_renamer(["text", "label", "probabilities"])

    def write(chunk: Predictions) -> None:
        for text, label, row, columns in chunk.rows():
            other = dict(zip(rename(columns), columns.values(), strict=True))
            probabilities = row and dict(zip(names, row, strict=True))
            record = {**other, "text": text, "label": label, "probabilities": probabilities}
            file.write(json_text(record).encode("utf-8") + b"\n")
        file.flush()

    yield write


def _header(names: list[str], columns: Columns) -> list[str]:
    output_columns = ["text", "label", "probability", *(f"probability_{name}" for name in names)]
    return [*map(_to_cell, _column_renamer(output_columns)(columns)), *output_columns]


def _delimited(delimiter: str) -> OpenWriter:
    @contextmanager
    def delimited(file: IO[bytes], names: list[str], columns: Columns) -> Iterator[WritePredictions]:
        def write_line(line: str) -> None:
            file.write(line.removesuffix("\r\n").encode("utf-8") + b"\n")

        # The csv module quotes a carriage return only if its line terminator contains one.
        table = csv.writer(SimpleNamespace(write=write_line), delimiter=delimiter, lineterminator="\r\n")

        def write(chunk: Predictions) -> None:
            for text, label, row, other in chunk.rows():
                probabilities = [max(row), *row] if row else [None] * (1 + len(names))
                table.writerow([*(_to_cell(other.get(name)) for name in columns), text, label, *probabilities])

        table.writerow(_header(names, columns))
        yield write

    return delimited


@contextmanager
def _parquet(file: IO[bytes], names: list[str], columns: Columns) -> Iterator[WritePredictions]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = [*columns.values(), pa.string(), pa.string(), *[pa.float32()] * (1 + len(names))]
    schema = pa.schema(list(zip(_header(names, columns), types, strict=True)))

    def to_arrow(values: list[Any], dtype: pa.DataType) -> pa.Array:
        if pa.types.is_string(dtype) or pa.types.is_floating(dtype):
            convert = str if pa.types.is_string(dtype) else float
            values = [None if cell is None else convert(cell) for cell in map(_to_cell, values)]
        return pa.array(values, dtype, from_pandas=True)

    with pq.ParquetWriter(file, schema) as table:

        def write(chunk: Predictions) -> None:
            missing = np.array([text is None for text in chunk.texts])
            highest = chunk.probabilities.max(axis=1)
            probabilities = [pa.array(p, pa.float32(), mask=missing) for p in (highest, *chunk.probabilities.T)]
            other = [to_arrow([row.get(name) for row in chunk.columns], dtype) for name, dtype in columns.items()]
            texts, labels = pa.array(chunk.texts, pa.string()), pa.array(chunk.labels, pa.string())
            table.write_batch(pa.record_batch([*other, texts, labels, *probabilities], schema=schema))

        yield write


_FORMATS: dict[str, OpenWriter] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}


def check_output(path: Path) -> None:
    """Check that predictions can be written to a file with this extension.

    Raises:
        ConfigError: If the extension is unknown.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"Unknown file extension: {path}.", hint=f"Use one of {', '.join(_FORMATS)}.")


@contextmanager
def predictions_file(path: Path, names: list[str], columns: Columns | None = None) -> Iterator[WritePredictions]:
    """Open a file for predictions; its extension selects the format.

    Yields a function that writes the next chunk. The file appears only if the block succeeds. Tables have ``columns``
    before those of the predictions.

    Raises:
        ConfigError: If the extension is unknown.
        OutputError: If the file cannot be written.
    """
    check_output(path)
    with atomic_file(path) as file, _FORMATS[path.suffix.lower()](file, names, columns or {}) as write:
        yield write


def predictions_stream(file: IO[bytes], names: list[str]) -> AbstractContextManager[WritePredictions]:
    """Open a binary stream for predictions as JSON lines; yields a function that writes the next chunk."""
    return _json_lines(file, names, {})
