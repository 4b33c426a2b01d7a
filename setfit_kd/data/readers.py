"""Readers of data files that yield one record at a time, with its line or row number for error messages."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from setfit_kd.errors import DataError

Record = tuple[int, Mapping[str, Any]]

# By default the csv module rejects fields longer than 131,072 characters; news articles can be longer.
csv.field_size_limit(2**31 - 1)


def read_records(path: Path) -> Iterator[Record]:
    """Yield ``(line or row number, record)`` from a data file.

    Raises:
        DataError: If the file is missing, empty or damaged, or its format is not supported.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise unsupported_format(path)
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty.", hint="Use a file with a header and at least two rows.")
        yield from reader(path)
    except UnicodeDecodeError:
        line, byte = _find_invalid_byte(path)
        raise DataError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8.", hint="Save the file as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", hint="Check the path.") from None


def unsupported_format(path: Path) -> DataError:
    """Create the error for a file whose extension is not supported."""
    extension = f"extension {path.suffix!r} is not supported" if path.suffix else "the file name has no extension"
    return DataError(f"Cannot read {path}: {extension}.", hint=f"Use one of {', '.join(READERS)}.")


def _find_invalid_byte(path: Path) -> tuple[int, int]:
    """Return the line number and the value of the first byte that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, line[error.start]
    raise AssertionError("only called for files that are not UTF-8")


def _delimited_reader(delimiter: str) -> Callable[[Path], Iterator[Record]]:
    def read(path: Path) -> Iterator[Record]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            start = 1
            try:
                header = next((fields for fields in reader if fields), None)
                if header is None:
                    raise DataError(f"{path} is empty.", hint="Use a file with a header and at least two rows.")
                duplicates = sorted({name for name in header if header.count(name) > 1})
                if duplicates:
                    raise DataError(f"{path}: column {duplicates[0]!r} occurs twice.", hint="Rename one of them.")
                other = re.search(r"[,;\t|]", header[0]) if len(header) == 1 else None
                if other is not None:
                    raise DataError(
                        f"{path}: expected columns separated by {delimiter!r}, got {other[0]!r} in the header.",
                        hint="Separate the columns by commas, or by tabs in a .tsv file.",
                    )
                start = reader.line_num + 1
                for fields in reader:
                    if fields:
                        if len(fields) != len(header):
                            raise DataError(
                                f"{path}, line {start}: expected {len(header)} fields, got {len(fields)}.",
                                hint="Quote texts that contain the delimiter, a quote or a line break.",
                            )
                        yield start, dict(zip(header, fields, strict=True))
                    start = reader.line_num + 1
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {start}: {error}.", hint="Check the quotes in this row; double those inside a text."
                ) from None

    return read


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at character {error.pos + 1}).",
                    hint="Write one JSON object per line.",
                ) from None
            except (ValueError, RecursionError) as error:  # a number with thousands of digits, or very deep nesting
                raise DataError(
                    f"{path}, line {number}: cannot parse the JSON ({error}).", hint="Write one JSON object per line."
                ) from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, line {number}: expected a JSON object, got {type(record).__name__}.",
                    hint='Write one JSON object per line, such as {"text": "...", "label": "..."}.',
                )
            yield number, record


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise DataError(f"{path} has two columns with the same name.", hint="Rename one of them.")
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a valid Parquet file: {error}", hint="Write the file again.") from None
    except OverflowError as error:
        raise DataError(f"{path}: a date or time is out of range ({error}).", hint="Write the file again.") from None


def _text_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            yield number, {"text": line.rstrip("\r\n")}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".csv": _delimited_reader(","),
    ".tsv": _delimited_reader("\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".txt": _text_lines,
}
"""Reader for each supported file extension."""
LINE_NUMBERED = frozenset(READERS) - {".parquet"}
"""Extensions of the files whose records are numbered by line; all others are numbered by row."""


def column_types(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the columns of several files in order of appearance, each with an Arrow type that fits all its values.

    JSONL files are read to the end, since any row may add a column. Values without a common type become strings, as do
    lists and objects in JSONL files. Text files have no columns.

    Raises:
        DataError: See `read_records`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, Any] = {}
    json_types = {type(None): pa.null(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}

    def add(name: str, new_type: pa.DataType) -> None:
        known_type = types.setdefault(name, new_type)
        if known_type not in (new_type, pa.string()):
            schemas = [pa.schema([("", column_type)]) for column_type in (known_type, new_type)]
            try:
                types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
            except pa.ArrowTypeError:
                types[name] = pa.string()

    for path in paths:
        extension, records = path.suffix.lower(), read_records(path)
        n_records = 0 if extension == ".txt" else None if "json" in extension else 1
        for _, record in islice(records, n_records):
            for name, value in record.items():
                is_long = isinstance(value, int) and value.bit_length() > 63
                if extension != ".parquet" and value == value:  # skips NaN
                    add(name, pa.string() if is_long else json_types.get(type(value), pa.string()))
        for field in pq.read_schema(path) if extension == ".parquet" else ():
            add(field.name, field.type)
    return types
