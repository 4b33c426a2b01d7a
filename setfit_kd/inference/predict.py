"""Classify a stream of texts and write the predictions, one output row per input row."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ConfigError
from setfit_kd.inference.classifier import CHUNK_SIZE, TorchClassifier
from setfit_kd.runtime.classify import Classifier, chunk_texts, split_pair
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL, TASKS, Task
from setfit_kd.utils.atomic_io import atomic_file
from setfit_kd.utils.console import as_text, json_text, suppress_warnings

Row: TypeAlias = tuple[str | None, Mapping[str, Any]]  # usable text of a row, if it has one, and the other columns
Columns: TypeAlias = Mapping[str, Any]  # the other columns of a table, with their Arrow types
_TEXT_COLUMNS = ("text", "text_pair")
_LABEL_COLUMNS = {SINGLE_LABEL: ["label", "probability"], MULTI_LABEL: ["labels"]}


class Layout(NamedTuple):
    """Columns of the output of a classifier."""

    names: list[str]  # of the classes
    others: Columns  # other columns of a table, which come first
    task: Task
    n_texts: int  # columns of texts: 2 for pairs

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the columns of texts."""
        return _TEXT_COLUMNS[: self.n_texts]


class Prediction(NamedTuple):
    """Prediction for one row; without usable text, text and label are None and the probabilities NaN."""

    text: str | None  # pairs are joined, see `join_pair`
    label: str | list[str] | None  # a list if multi-label; if single-label, None if its probability is too low
    probabilities: npt.NDArray[np.float32]  # (n_classes,)
    columns: Mapping[str, Any]  # the other columns of the row

    def texts(self, n_texts: int) -> tuple[str | None, ...]:
        """Return the text, or the two texts of a pair."""
        return (None,) * n_texts if self.text is None else split_pair(self.text) if n_texts == 2 else (self.text,)

    def rounded(self) -> list[float] | None:
        """Return the probabilities rounded for text formats; None without text."""
        return None if self.text is None else [round(p, 6) for p in self.probabilities.tolist()]


def classify(
    classifier: TorchClassifier | Classifier,
    rows: Iterable[Row],
    *,
    threshold: float | None = None,
    at_least_one: bool = False,
    embeddings: bool = False,
    is_waiting: Callable[[], bool] = lambda: False,
) -> Iterator[list[Prediction]]:
    """Classify any number of texts in chunks of at most `CHUNK_SIZE`, as they arrive.

    Args:
        classifier: The classifier.
        rows: The texts, with their other columns.
        threshold: Minimum probability of a label. [default: 0; the thresholds of a multi-label classifier]
        at_least_one: Predict one label for a text whose labels are all below their thresholds: the one with the largest
            difference of probability and threshold.
        embeddings: Add the embedding of each text, a list of floats, to the other columns as ``embedding``.
        is_waiting: Whether the next row has not arrived yet; the chunk is then classified without it.

    Raises:
        ConfigError: If ``at_least_one`` is set for a single-label classifier, or ``embeddings`` for another classifier
            than a SetFit model.
    """
    if at_least_one and classifier.task == SINGLE_LABEL.name:
        raise ConfigError("The model already predicts one label per text.", hint="Remove --at-least-one.")
    embed = getattr(classifier, "embed_and_predict", None)
    if embeddings and embed is None:
        raise ConfigError("Only SetFit models have embeddings.", hint="Remove --embeddings, or choose a SetFit model.")
    for chunk in chunk_texts(rows, CHUNK_SIZE, get_text=itemgetter(0), is_waiting=is_waiting):
        has_text = [text is not None for text, _ in chunk]
        probabilities = np.full((len(chunk), len(classifier.labels)), np.nan, np.float32)
        texts = [text for text, _ in chunk if text is not None]
        with suppress_warnings("setfit_kd.runtime"):  # `chunk_texts` logs one warning for all chunks
            if embeddings and embed is not None:
                vectors, probabilities[has_text] = embed(texts)
                rest = iter(np.round(vectors.astype(np.float64), 7).tolist())
                vector_of = [next(rest) if has else None for has in has_text]
                chunk = [(text, {**row, "embedding": v}) for (text, row), v in zip(chunk, vector_of, strict=True)]
            else:
                probabilities[has_text] = classifier.predict_proba(texts)
        labels = _decide(classifier, probabilities, threshold, at_least_one)
        yield [
            Prediction(text, None if text is None else label, row, columns)
            for (text, columns), row, label in zip(chunk, probabilities, labels, strict=True)
        ]


def _decide(
    classifier: TorchClassifier | Classifier,
    probabilities: npt.NDArray[np.float32],
    threshold: float | None,
    at_least_one: bool,
) -> list[Any]:
    """Return the label of each row of (n, n_classes) probabilities, or a list of labels if multi-label."""
    names = classifier.labels
    if classifier.task == SINGLE_LABEL.name:
        return [names[row.argmax()] if row.max() >= (threshold or 0) else None for row in probabilities]
    default = 0.5 if classifier.thresholds is None else classifier.thresholds
    thresholds = np.full(len(names), default if threshold is None else threshold, np.float32)
    decided = MULTI_LABEL.decide(probabilities, thresholds)
    if at_least_one:
        decided[np.arange(len(decided)), (probabilities - thresholds).argmax(axis=1)] |= ~decided.any(axis=1)
    return [[names[column] for column in np.flatnonzero(row)] for row in decided]


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


def _write_json_lines(file: IO[bytes], chunks: Iterable[list[Prediction]], layout: Layout) -> None:
    label_column = _LABEL_COLUMNS[layout.task][0]
    rename = _column_renamer([*layout.texts, "label", label_column, "probabilities"])
    for chunk in chunks:
        for prediction in chunk:
            other = dict(zip(rename(prediction.columns), prediction.columns.values(), strict=True))
            row = prediction.rounded()
            probabilities = row and dict(zip(layout.names, row, strict=True))
            texts = dict(zip(layout.texts, prediction.texts(layout.n_texts), strict=True))
            record = {**other, **texts, label_column: prediction.label, "probabilities": probabilities}
            file.write(json_text(record).encode("utf-8") + b"\n")
        file.flush()


def _header(layout: Layout) -> list[str]:
    probabilities = (f"probability_{name}" for name in layout.names)
    output_columns = [*layout.texts, *_LABEL_COLUMNS[layout.task], *probabilities]
    return [*map(_to_cell, _column_renamer(output_columns)(layout.others)), *output_columns]


def _write_delimited(delimiter: str, file: IO[bytes], chunks: Iterable[list[Prediction]], layout: Layout) -> None:
    is_single_label, names = layout.task is SINGLE_LABEL, layout.names
    to_text: Any = str if is_single_label else json_text if "|" in "".join(names) else "|".join
    # The csv module quotes a carriage return only if its line terminator contains one.
    lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n").encode("utf-8") + b"\n"))
    table = csv.writer(lines, delimiter=delimiter, lineterminator="\r\n")
    table.writerow(_header(layout))
    for chunk in chunks:
        for prediction in chunk:
            row: Any = prediction.rounded()
            highest = [row and max(row)] if is_single_label else []
            label = None if prediction.label is None else to_text(prediction.label)
            other = [_to_cell(prediction.columns.get(name)) for name in layout.others]
            texts = prediction.texts(layout.n_texts)
            table.writerow([*other, *texts, label, *highest, *(row or [None] * len(names))])


def _write_parquet(file: IO[bytes], chunks: Iterable[list[Prediction]], layout: Layout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_single_label, n_texts = layout.task is SINGLE_LABEL, layout.n_texts
    label_type = pa.string() if is_single_label else pa.list_(pa.string())
    types = [*layout.others.values(), *[pa.string()] * n_texts, label_type]
    types += [pa.float32()] * (is_single_label + len(layout.names))
    schema = pa.schema(list(zip(_header(layout), types, strict=True)))

    def to_arrow(values: list[Any], dtype: pa.DataType) -> pa.Array:
        if pa.types.is_string(dtype) or pa.types.is_floating(dtype):
            convert = str if pa.types.is_string(dtype) else float
            values = [None if cell is None else convert(cell) for cell in map(_to_cell, values)]
        return pa.array(values, dtype, from_pandas=True)

    with pq.ParquetWriter(file, schema) as table:
        for chunk in chunks:
            _, labels, rows, others = zip(*chunk, strict=True)
            texts = zip(*(prediction.texts(n_texts) for prediction in chunk), strict=True)
            probabilities = np.array(rows)
            values = [probabilities.max(axis=1)] * is_single_label + [*probabilities.T]
            other = [to_arrow([row.get(name) for row in others], dtype) for name, dtype in layout.others.items()]
            answers = [*(pa.array(column, pa.string()) for column in texts), pa.array(labels, label_type)]
            answers += [pa.array(column, pa.float32(), from_pandas=True) for column in values]
            table.write_batch(pa.record_batch([*other, *answers], schema=schema))


_FORMATS: dict[str, Callable[[IO[bytes], Iterable[list[Prediction]], Layout], None]] = {
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
    path: Path | None,
    chunks: Iterable[list[Prediction]],
    classifier: TorchClassifier | Classifier,
    columns: Columns | None = None,
    *,
    file: IO[bytes] | None = None,
    embeddings: bool = False,
) -> None:
    """Write predictions of a classifier to a file, whose extension selects the format, or as JSON lines to stdout.

    A file appears only if everything was written; with ``file``, they are written there instead. ``columns`` are the
    other columns of a table, which come first. The extension must be one that `check_output` accepts. ``embeddings``
    is as in `classify`.

    Raises:
        OutputError: If the file cannot be written.
    """
    columns, extension = columns or {}, ".jsonl" if path is None else path.suffix.lower()
    if embeddings and extension == ".parquet":
        import pyarrow as pa

        columns = {**columns, "embedding": pa.list_(pa.float32())}
    layout = Layout(classifier.labels, columns, TASKS[classifier.task], 2 if classifier.takes_pairs else 1)
    with nullcontext(file or sys.stdout.buffer) if file or path is None else atomic_file(path) as target:
        _FORMATS[extension](target, chunks, layout)
