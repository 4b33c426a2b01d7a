"""From a stream of texts to a stream of predictions, and to files of them, in step: a row out for each row in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.classifiers import AnyClassifier
from setfit_kd.errors import ConfigError
from setfit_kd.files import whole_file
from setfit_kd.quiet import without_warnings
from setfit_kd.runtime import in_windows

AT_ONCE = 1024
"""Most texts held in memory."""


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of the next m texts.

    Attributes:
        texts: m texts, None where a row has none.
        labels: m labels; None where there is no text, or no class is probable enough.
        probabilities: (m, n_classes) float32, NaN where there is no text.
    """

    texts: list[str | None]
    labels: list[str | None]
    probabilities: npt.NDArray[np.float32]


Write = Callable[[Predictions], None]


def classify(
    classifier: AnyClassifier, texts: Iterable[str | None], *, threshold: float = 0.0, at_once: int = AT_ONCE
) -> Iterator[Predictions]:
    """Classify texts as they come; at most ``at_once`` of them are held in memory.

    Args:
        classifier: Any.
        texts: However many; None stands for a row without text.
        threshold: Least probability of a label, from 0 to 1; below it there is none.
        at_once: Most texts classified together.
    """
    names = classifier.labels
    for part in in_windows(texts, at_once):
        rows = [row for row, text in enumerate(part) if text is not None]
        probabilities = np.full((len(part), len(names)), np.nan, np.float32)
        with without_warnings("setfit_kd.runtime"):  # `in_windows` warns of all parts together
            probabilities[rows] = classifier.predict_proba([text for text in part if text is not None])
        labels: list[str | None] = [None] * len(part)
        for row in rows:
            column = int(probabilities[row].argmax())
            if probabilities[row, column] >= threshold:
                labels[row] = names[column]
        yield Predictions(part, labels, probabilities)


def _json_lines(file: IO[bytes], names: list[str]) -> Iterator[Write]:
    def write(part: Predictions) -> None:
        for text, label, row in zip(part.texts, part.labels, part.probabilities.tolist(), strict=True):
            known = None if text is None else {name: round(p, 6) for name, p in zip(names, row, strict=True)}
            record = {"text": text, "label": label, "probabilities": known}
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        file.flush()

    yield write


def _columns(names: list[str]) -> list[str]:
    return ["text", "label", "probability", *(f"probability_{name}" for name in names)]


def _delimited(delimiter: str) -> Callable[[IO[bytes], list[str]], Iterator[Write]]:
    def writing(file: IO[bytes], names: list[str]) -> Iterator[Write]:
        text_file = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        plain = csv.writer(text_file, delimiter=delimiter, lineterminator="\n")
        # The csv module forgets that a carriage return needs quotes.
        quoted = csv.writer(text_file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        plain.writerow(_columns(names))

        def write(part: Predictions) -> None:
            for text, label, row in zip(part.texts, part.labels, part.probabilities.tolist(), strict=True):
                known = [""] * (1 + len(names)) if text is None else [round(p, 6) for p in (max(row), *row)]
                rows = quoted if "\r" in (text or "") else plain
                rows.writerow([text or "", label or "", *known])
            text_file.flush()

        try:
            yield write
        finally:
            text_file.detach()

    return writing


def _parquet(file: IO[bytes], names: list[str]) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [pa.string(), pa.string(), *[pa.float32()] * (1 + len(names))]
    schema = pa.schema(list(zip(_columns(names), kinds, strict=True)))
    with pq.ParquetWriter(file, schema) as table:

        def write(part: Predictions) -> None:
            missing = np.array([text is None for text in part.texts])
            best = part.probabilities.max(axis=1)
            numbers = [pa.array(column, pa.float32(), mask=missing) for column in (best, *part.probabilities.T)]
            columns = [pa.array(part.texts, pa.string()), pa.array(part.labels, pa.string()), *numbers]
            table.write_batch(pa.record_batch(columns, schema=schema))

        yield write


_FORMATS: dict[str, Callable[[IO[bytes], list[str]], Iterator[Write]]] = {
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
def predictions_file(path: Path, names: list[str]) -> Iterator[Write]:
    """Within this block, predictions are written to a file of the kind that its ending says: whole, or not at all.

    Yields a function that takes the next of them.

    Raises:
        ConfigError: The ending is not known.
        OutputError: The file cannot be written.
    """
    check_output(path)
    with whole_file(path) as file, _writing(path.suffix.lower(), file, names) as write:
        yield write


def predictions_stream(file: IO[bytes], names: list[str]) -> AbstractContextManager[Write]:
    """Within this block, predictions go to a binary stream as JSON lines.

    Yields a function that takes the next of them.
    """
    return _writing(".jsonl", file, names)


def _writing(ending: str, file: IO[bytes], names: list[str]) -> AbstractContextManager[Write]:
    writing: Any = contextmanager(_FORMATS[ending])
    opened: AbstractContextManager[Write] = writing(file, names)
    return opened
