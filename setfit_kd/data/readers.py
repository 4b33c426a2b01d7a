"""Reading text files a record at a time, so that every problem can be named by its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from setfit_kd.errors import DataError

Record = tuple[int, Mapping[str, Any]]

# The csv module refuses fields past 131,072 characters unless told otherwise; news articles get there.
csv.field_size_limit(2**31 - 1)


def read_records(path: Path) -> Iterator[Record]:
    """Yield ``(line or row number, record)`` from a data file.

    Raises:
        DataError: The file is missing, of an unknown kind, or broken; with the line where there is one.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise unknown_ending(path)
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty.", hint="Give a file with at least a header and two rows.")
        yield from reader(path)
    except UnicodeDecodeError:
        line, byte = _undecodable(path)
        raise DataError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8.", hint="Save the file as UTF-8 and try again."
        ) from None
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", hint="Check the path.") from None


def unknown_ending(path: Path) -> DataError:
    """The error for a file whose ending says nothing about how to read it."""
    ending = f"ending in {path.suffix!r}" if path.suffix else "without an ending"
    return DataError(f"{path}: files {ending} cannot be read.", hint=f"Known endings: {', '.join(READERS)}.")


def _undecodable(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, line[error.start]
    raise AssertionError("only called on files that do not decode")


def _delimited(delimiter: str) -> Callable[[Path], Iterator[Record]]:
    def read(path: Path) -> Iterator[Record]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            start = 1
            try:
                header = next((fields for fields in reader if fields), None)
                if header is None:
                    raise DataError(f"{path} is empty.", hint="Give a file with a header and at least two rows.")
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise DataError(f"{path}: the header has {twice[0]!r} twice.", hint="Rename one of them.")
                start = reader.line_num + 1
                for fields in reader:
                    if fields:
                        if len(fields) != len(header):
                            raise DataError(
                                f"{path}, line {start}: {len(fields)} fields where the header has {len(header)}.",
                                hint="Quote texts that hold the delimiter, a quote or a line break.",
                            )
                        yield start, dict(zip(header, fields, strict=True))
                    start = reader.line_num + 1
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {start}: {error}.", hint="Check the quotes of that row; double those inside a text."
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
                    hint="Write one JSON object a line.",
                ) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or bottomless nesting
                raise DataError(
                    f"{path}, line {number}: JSON that cannot be read ({error}).", hint="Write one JSON object a line."
                ) from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, line {number}: a {type(record).__name__}, not an object.",
                    hint='Write one JSON object a line, such as {"text": "...", "label": "..."}.',
                )
            yield number, record


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise DataError(f"{path} has two columns of the same name.", hint="Rename one of them.")
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}", hint="Write the file again.") from None
    except OverflowError as error:
        raise DataError(f"{path}: a date or time is out of range ({error}).", hint="Write the file again.") from None


def _text_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            yield number, {"text": line.rstrip("\r\n")}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".txt": _text_lines,
}
LINE_NUMBERED = frozenset(READERS) - {".parquet"}


def column_types(paths: Iterable[Path]) -> dict[str, Any]:
    """Columns of several files, in the order in which they appear, with an Arrow type that holds all their values.

    JSON lines are read to their end: any row may add a column. Values without a common type are strings, and so are
    lists and objects of JSON lines. Text files have no columns.

    Raises:
        DataError: As `read_records`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, Any] = {}
    of_json = {type(None): pa.null(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}

    def add(name: str, found: pa.DataType) -> None:
        known = types.setdefault(name, found)
        if known not in (found, pa.string()):
            fields = [pa.schema([("", one)]) for one in (known, found)]
            try:
                types[name] = pa.unify_schemas(fields, promote_options="permissive").field(0).type
            except pa.ArrowTypeError:
                types[name] = pa.string()

    for path in paths:
        ending, records = path.suffix.lower(), read_records(path)
        for _, record in islice(records, 0 if ending == ".txt" else None if "json" in ending else 1):
            for name, value in record.items():
                is_long = isinstance(value, int) and value.bit_length() > 63
                if ending != ".parquet" and value == value:
                    add(name, pa.string() if is_long else of_json.get(type(value), pa.string()))
        for field in pq.read_schema(path) if ending == ".parquet" else ():
            add(field.name, field.type)
    return types
