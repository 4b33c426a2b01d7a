"""Readers of data files that yield one record at a time, with its line or row number for error messages."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from setfit_kd.errors import DataError

Record = tuple[int, Mapping[str, Any]]

# By default the csv module rejects fields longer than 131,072 characters; news articles can be longer.
csv.field_size_limit(2**31 - 1)
_INVALID_BYTE = re.compile("[\udc80-\udcff]")  # ``surrogateescape`` replaces bytes that are not UTF-8 by these


def file_format(path: Path) -> str:
    """Return the extension of a file in lower case; of a compressed text file, the one before ``.gz``."""
    extension, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return inner if extension == ".gz" and inner in READERS and inner != ".parquet" else extension


def record_unit(path: Path) -> str:
    """Return what the numbers of a file's records count: ``line`` or ``row``."""
    return "row" if file_format(path) == ".parquet" else "line"


def read_records(path: Path, file: IO[bytes] | None = None, **parquet: Any) -> Iterator[Record]:
    """Yield ``(line or row number, record)`` from a data file; raise a `DataError` if it is missing or damaged.

    With ``file``, the content is read there, and ``path`` only names it. For ``parquet``, see `_read_parquet`.
    """
    reader = READERS.get(file_format(path))
    if reader is None:
        extension = f"extension {path.suffix!r} is not supported" if path.suffix else "the file name has no extension"
        hint = f"Use one of {', '.join(READERS)}. All but .parquet may be compressed, as in .csv.gz."
        raise DataError(f"Cannot read {path}: {extension}.", hint=hint)
    try:
        with nullcontext(file) if file else path.open("rb") as content:
            if file is None and path.stat().st_size == 0:
                raise _empty_file(path)
            yield from reader(path, content, **parquet)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"Cannot read {path}: {reason}.", hint="Check the path and the file.") from None


def _empty_file(path: Path) -> DataError:
    return DataError(f"{path} is empty.", hint="Use a file with a header and at least two rows.")


def _read_lines(path: Path, file: IO[bytes], newline: str | None = None) -> Iterator[str]:
    """Yield the lines of a text file, with their line breaks; for ``newline`` see `open`."""
    content: Any = file
    n_characters, limit = 0, sys.maxsize
    if path.suffix.lower() == ".gz":
        content = gzip.GzipFile(fileobj=file)
        # A zip bomb must not fill the memory; text seldom shrinks to less than a tenth.
        limit = max(64 << 20, 100 * file.seek(0, os.SEEK_END))
        file.seek(0)
    with TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text:
        for number, line in enumerate(iter(partial(text.readline, limit), ""), 1):
            n_characters += len(line)
            if n_characters >= limit:
                raise OSError(f"it expands to more than {limit:,} characters")
            invalid = None if line.isascii() else _INVALID_BYTE.search(line)
            if invalid:
                message = f"{path}, line {number}: byte 0x{ord(invalid[0]) - 0xDC00:02x} is not UTF-8."
                raise DataError(message, hint="Save the file as UTF-8.")
            yield line


def _read_delimited(path: Path, file: IO[bytes], *, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(_read_lines(path, file, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1  # first line of the row; texts may contain line breaks
    try:
        for fields in reader:
            if fields and not header:
                header = fields
                duplicates = sorted(name for name in header if header.count(name) > 1)
                if duplicates:
                    raise DataError(f"{path}: column {duplicates[0]!r} occurs twice.", hint="Rename one of them.")
                other = re.search(r"[,;\t|]", header[0]) if len(header) == 1 else None
                if other:
                    message = f"{path}: expected columns separated by {delimiter!r}, got {other[0]!r} in the header."
                    raise DataError(message, hint="Separate the columns by commas, or by tabs in a .tsv file.")
            elif fields:
                if len(fields) != len(header):
                    message = f"{path}, line {line}: expected {len(header)} fields, got {len(fields)}."
                    raise DataError(message, hint="Quote texts that contain the delimiter, a quote or a line break.")
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: {error}.", hint="Check the quotes; double those in a text.") from None
    if not header:
        raise _empty_file(path)


def _read_json_lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(_read_lines(path, file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            problem = None if isinstance(record, dict) else f"expected a JSON object, got {type(record).__name__}"
        except (ValueError, RecursionError) as error:  # also a number with thousands of digits or very deep nesting
            reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            problem = f"not valid JSON ({reason})"
        if problem:
            hint = 'Write one JSON object per line, such as {"text": "...", "label": "..."}.'
            raise DataError(f"{path}, line {number}: {problem}.", hint=hint)
        yield number, record


def _read_parquet(
    path: Path, file: IO[bytes], *, row_groups: Iterable[int] | None = None, first_row: int = 1
) -> Iterator[Record]:
    """Yield the rows of some or all row groups, numbered from ``first_row``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        if len(set(table.schema_arrow.names)) < len(table.schema_arrow.names):
            raise DataError(f"{path} has two columns with the same name.", hint="Rename one of them.")
        batches = table.iter_batches(row_groups=row_groups)
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), first_row)
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a valid Parquet file: {error}", hint="Write the file again.") from None
    except OverflowError as error:
        raise DataError(f"{path}: a date or time is out of range ({error}).", hint="Write the file again.") from None


READERS: dict[str, Callable[..., Iterator[Record]]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": lambda *file: ((i, {"text": line.rstrip("\r\n")}) for i, line in enumerate(_read_lines(*file), 1)),
}


def column_types(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the columns of several files in order of appearance, each with an Arrow type that fits all its values.

    JSONL files are read to the end, since any row may add a column. Values without a common type become strings, as do
    lists and objects in JSONL files. Text files have no columns. Raises as `read_records`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    json_types = {type(None): pa.null(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}

    def fields(path: Path) -> Iterator[tuple[str, Any]]:
        extension = file_format(path)
        n_records = 0 if extension == ".txt" else None if "json" in extension else 1
        for _, record in islice(read_records(path), n_records):
            for name, value in record.items() if extension != ".parquet" else ():
                if value == value:  # not NaN
                    is_long = isinstance(value, int) and value.bit_length() > 63
                    yield name, pa.string() if is_long else json_types.get(type(value), pa.string())
        if extension == ".parquet":
            yield from ((field.name, field.type) for field in pq.read_schema(path))

    types: dict[str, Any] = {}
    for name, new_type in chain.from_iterable(map(fields, paths)):
        known_type = types.setdefault(name, new_type)
        if known_type not in (new_type, pa.string()):
            schemas = [pa.schema([("", column_type)]) for column_type in (known_type, new_type)]
            try:
                types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
            except pa.ArrowTypeError:
                types[name] = pa.string()
    return types
