"""Classify a stream of texts and write the predictions, one output row per input row."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ConfigError
from setfit_kd.inference.classifier import CHUNK_SIZE, TorchClassifier
from setfit_kd.runtime.classify import Classifier, chunk_texts
from setfit_kd.utils.atomic_io import atomic_file
from setfit_kd.utils.console import as_text, json_text, suppress_warnings

Row: TypeAlias = tuple[str | None, Mapping[str, Any]]  # usable text of a row, if it has one, and the other columns
Columns: TypeAlias = Mapping[str, Any]  # the other columns of a table, with their Arrow types


class Prediction(NamedTuple):
    """Prediction for one row; without usable text, text and label are None and the probabilities NaN."""

    text: str | None
    label: str | None  # also None if its probability is below the threshold
    probabilities: npt.NDArray[np.float32]  # (n_classes,)
    columns: Mapping[str, Any]  # the other columns of the row

    def rounded(self) -> list[float] | None:
        """Return the probabilities rounded for text formats; None without text."""
        return None if self.text is None else [round(p, 6) for p in self.probabilities.tolist()]


def classify(
    classifier: TorchClassifier | Classifier,
    rows: Iterable[Row],
    *,
    threshold: float = 0.0,
    is_waiting: Callable[[], bool] = lambda: False,
) -> Iterator[list[Prediction]]:
    """Classify any number of texts in chunks of at most `CHUNK_SIZE`, as they arrive.

    If ``is_waiting`` says that the next row has not arrived yet, the chunk is classified without it.
    """
    for chunk in chunk_texts(rows, CHUNK_SIZE, get_text=itemgetter(0), is_waiting=is_waiting):
        has_text = [text is not None for text, _ in chunk]
        probabilities = np.full((len(chunk), len(classifier.labels)), np.nan, np.float32)
        with suppress_warnings("setfit_kd.runtime"):  # `chunk_texts` logs one warning for all chunks
            probabilities[has_text] = classifier.predict_proba([text for text, _ in chunk if text is not None])
        yield [  # a comparison with NaN is false
            Prediction(text, classifier.labels[row.argmax()] if row.max() >= threshold else None, row, columns)
            for (text, columns), row in zip(chunk, probabilities, strict=True)
        ]


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


def _write_json_lines(file: IO[bytes], chunks: Iterable[list[Prediction]], names: list[str], _: Columns) -> None:
    rename = _column_renamer(["text", "label", "probabilities"])
    for chunk in chunks:
        for prediction in chunk:
            other = dict(zip(rename(prediction.columns), prediction.columns.values(), strict=True))
            row = prediction.rounded()
            probabilities = row and dict(zip(names, row, strict=True))
            record = {**other, "text": prediction.text, "label": prediction.label, "probabilities": probabilities}
            file.write(json_text(record).encode("utf-8") + b"\n")
        file.flush()


def _header(names: list[str], columns: Columns) -> list[str]:
    output_columns = ["text", "label", "probability", *(f"probability_{name}" for name in names)]
    return [*map(_to_cell, _column_renamer(output_columns)(columns)), *output_columns]


def _write_delimited(
    delimiter: str, file: IO[bytes], chunks: Iterable[list[Prediction]], names: list[str], columns: Columns
) -> None:
    # The csv module quotes a carriage return only if its line terminator contains one.
    lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n").encode("utf-8") + b"\n"))
    table = csv.writer(lines, delimiter=delimiter, lineterminator="\r\n")
    table.writerow(_header(names, columns))
    for chunk in chunks:
        for prediction in chunk:
            row = prediction.rounded()
            probabilities = [max(row), *row] if row else [None] * (1 + len(names))
            other = [_to_cell(prediction.columns.get(name)) for name in columns]
            table.writerow([*other, prediction.text, prediction.label, *probabilities])


def _write_parquet(file: IO[bytes], chunks: Iterable[list[Prediction]], names: list[str], columns: Columns) -> None:
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
        for chunk in chunks:
            texts, labels, rows, others = zip(*chunk, strict=True)
            probabilities = np.array(rows)
            values = (probabilities.max(axis=1), *probabilities.T)
            other = [to_arrow([row.get(name) for row in others], dtype) for name, dtype in columns.items()]
            answers = [pa.array(texts, pa.string()), pa.array(labels, pa.string())]
            answers += [pa.array(column, pa.float32(), from_pandas=True) for column in values]
            table.write_batch(pa.record_batch([*other, *answers], schema=schema))


_FORMATS: dict[str, Callable[[IO[bytes], Iterable[list[Prediction]], list[str], Columns], None]] = {
    ".jsonl": _write_json_lines,
    ".ndjson": _write_json_lines,
    ".csv": partial(_write_delimited, ","),
    ".tsv": partial(_write_delimited, "\t"),
    ".parquet": _write_parquet,
}


def check_output(path: Path) -> None:
    """Raise a `ConfigError` if predictions cannot be written to a file with this extension."""
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"Unknown file extension: {path}.", hint=f"Use one of {', '.join(_FORMATS)}.")


def write_predictions(
    path: Path | None, chunks: Iterable[list[Prediction]], names: list[str], columns: Columns | None = None
) -> None:
    """Write predictions to a file, whose extension selects the format, or as JSON lines to stdout.

    A file appears only if everything was written. ``columns`` are the other columns of a table, which come first. The
    extension must be one that `check_output` accepts.

    Raises:
        OutputError: If the file cannot be written.
    """
    if path is None:
        _write_json_lines(sys.stdout.buffer, chunks, names, {})
        return
    with atomic_file(path) as file:
        _FORMATS[path.suffix.lower()](file, chunks, names, columns or {})
