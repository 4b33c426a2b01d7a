"""Read texts and labels from files, folders, the hub or Python objects."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from setfit_kd import hub
from setfit_kd.data.readers import LINE_NUMBERED, READERS, Record, read_records, unsupported_format
from setfit_kd.errors import DataError, SetFitKDError
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.files import MAX_JSON_BYTES, check_regular_file

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Source: TypeAlias = Union[str, Path, "Dataset", Mapping[str, Sequence[Any]], Sequence[Any]]
"""A path, a hub name, a ``datasets.Dataset``, a mapping of columns, or a list of texts, pairs or mappings."""

Decode: TypeAlias = Callable[[Sequence[int]], str]
"""Converts token ids to text."""

TextRow: TypeAlias = tuple[str | None, Mapping[str, Any]]
"""A pair: the text of a row (None if unusable), and its other columns."""

_TOKEN_IDS = "input_ids"
BUNDLED_FOLDER = Path(__file__).parent
_HUB_SOURCE = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?(?:@[\w./-]+)?)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w.-]+)\])?"
)
_FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet", ".xlsx", ".xls", ".gz", ".zip", ".bz2", ".xz")
_MAX_SHOWN_ERRORS = 3
_SPLITS = {"train": ["train"], "validation": ["validation", "dev"], "test": ["test", "validation"]}
"""Names of the splits to try for each role; the first one that exists is used."""
_IGNORABLE = (
    "00AD 034F 061C 115F-1160 17B4-17B5 180B-180F 200B-200F 202A-202E 2060-206F 3164 FE00-FE0F FEFF FFA0 FFF0-FFFB "
    "1BCA0-1BCA3 1D173-1D17A E0000-E0FFF"
)
_SPANS = ([int(end, 16) for end in span.split("-")] for span in _IGNORABLE.split())
INVISIBLE: dict[int, None] = dict.fromkeys(code for span in _SPANS for code in range(span[0], span[-1] + 1))
"""Table for `str.translate` that removes Unicode's Default_Ignorable_Code_Point (zero-width characters, direction
marks, variation selectors, tags, ...) and interlinear annotation marks."""


@dataclass(frozen=True)
class Rows:
    """Texts and label names of a source.

    Attributes:
        texts: n texts, none of them empty.
        labels: n label names, or None if only texts were read.
        label_names: The distinct names, in the order declared by the source, otherwise sorted.
        origin: Name of the source in messages.
    """

    texts: list[str]
    labels: list[str] | None
    label_names: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class _Table:
    """Records of a source, and how to read and name them."""

    records: Iterable[Record]
    origin: str
    unit: str = "row"
    has_columns: bool = True
    may_be_empty: bool = False
    declared_labels: tuple[str, ...] = ()


def read(
    source: Source,
    *,
    text_column: Sequence[str] = ("text",),
    label_column: str | None = None,
    role: str = "train",
    decode: Decode | None = None,
) -> Rows:
    """Read all rows of a source.

    Args:
        source: See `Source`. A name is tried as ``bundled:NAME``, then as a path, then as a hub name, optionally with
            a configuration and a split: ``NAME@REVISION:CONFIG[SPLIT]``.
        text_column: Columns that make up the text, joined by a space.
        label_column: Column of the label; None reads only texts.
        role: ``train``, ``validation`` or ``test``; selects the split if the source has several and none is named.
        decode: Converts token ids to text, for tokenized sources: if there is no text column, ``input_ids`` is decoded.

    Raises:
        DataError: If something is missing, damaged or empty. The message names the file and row.
        UnavailableError: If the hub cannot be reached.
    """
    table = _open(source, role, label_column)
    if decode is not None:
        table = replace(table, records=_decode_records(table.records, text_column[0], decode))
    texts: list[str] = []
    labels: list[str] = []
    for text, label, _ in _rows(table, text_column, label_column):
        texts.append(text)
        labels.append(label)
    names = table.declared_labels or tuple(sorted(set(labels), key=_label_sort_key))
    return Rows(texts, labels if label_column else None, names, table.origin)


def _decode_records(records: Iterable[Record], text_column: str, decode: Decode) -> Iterator[Record]:
    for number, record in records:
        ids = record.get(_TOKEN_IDS)
        if text_column in record or ids is None:
            yield number, record
        else:
            yield number, {**record, text_column: decode(list(ids))}


def stream_texts(source: Source, *, text_column: Sequence[str] = ("text",)) -> Iterator[str]:
    """Yield the texts of a source one by one, without loading a whole file into memory.

    Unusable rows are skipped.

    Raises:
        DataError: See `read`; for unusable rows, after the last row.
        UnavailableError: If the hub cannot be reached.
    """
    for text, _, _ in _rows(_open(source, "train"), text_column):
        yield text


def stream_rows(source: Source, *, text_column: Sequence[str] = ("text",)) -> Iterator[TextRow]:
    """Yield the text of each row, or None if it is unusable, and the row's other columns.

    The other columns include those named in ``text_column``; only the default column ``text`` is left out. Files are
    not loaded into memory as a whole. After the last row, a warning lists the rows without a usable text.

    Raises:
        DataError: If the source cannot be read or lacks a text column.
        UnavailableError: If the hub cannot be reached.
    """
    table = _open(source, "train")
    drop_text = not table.has_columns or tuple(text_column) == ("text",)
    for text, _, record in _rows(table, text_column, strict=False):
        yield text or None, {name: value for name, value in record.items() if not (drop_text and name == "text")}


def check_texts(texts: Iterable[str], *, origin: str, unit: str) -> Iterator[TextRow]:
    """Yield each text, or None if it is unusable, as a `TextRow` without other columns.

    After the last text, a warning lists the unusable ones.

    Args:
        texts: Texts to check.
        origin: Name of the source in the warning.
        unit: Name of an item in the warning, such as ``line``.
    """
    records: Iterator[Record] = ((number, {"text": text}) for number, text in enumerate(texts, 1))
    table = _Table(records, origin, unit=unit, may_be_empty=True)
    yield from ((text or None, {}) for text, _, _ in _rows(table, ("text",), strict=False))


def _rows(
    table: _Table, text_column: Sequence[str], label_column: str | None = None, *, strict: bool = True
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the text, the label ("" without a label column) and the record of each row.

    If ``strict``, unusable rows are skipped, and an error that lists them is raised after the last row. Otherwise
    their text is "", and a warning lists them after the last row.
    """
    columns = text_column if table.has_columns else ("text",)
    errors = RowErrors(table.origin, table.unit)
    n_rows = 0
    for number, record in table.records:
        if not n_rows:
            _require_columns(record, [*columns, *([label_column] if label_column else [])], table.origin)
        n_rows += 1
        label = ""
        text, problem = get_text(record, columns)
        if label_column and problem is None:
            label, problem = _get_label(record.get(label_column), table.declared_labels)
        if problem is None:
            yield text, label, record
            continue
        errors.add(number, problem)
        if not strict:
            yield "", "", record
    if not n_rows and not table.may_be_empty:
        raise DataError(f"{table.origin} has no rows.", hint="Add rows to it, or choose another source.")
    if errors.total and strict:
        raise DataError(f"{errors}.", hint="Fix or remove these rows.")
    if errors.total:
        logger.warning("Rows without a usable text get no prediction: %s.", errors)


class RowErrors:
    """Collector of unusable rows, with messages for the first three."""

    def __init__(self, origin: str, unit: str) -> None:
        self.origin = origin
        self.unit = unit
        self.shown: list[str] = []
        self.total = 0

    def add(self, number: int, problem: str) -> None:
        """Record the problem of a row."""
        self.total += 1
        if len(self.shown) < _MAX_SHOWN_ERRORS:
            self.shown.append(f"{self.unit} {number}: {problem}")

    def __str__(self) -> str:
        more = f" and {self.total - _MAX_SHOWN_ERRORS} more" if self.total > _MAX_SHOWN_ERRORS else ""
        return f"{self.origin}, {'; '.join(self.shown)}{more}"


def _label_sort_key(name: str) -> tuple[bool, int, str]:
    """Sort integers by value, before all other names."""
    is_number = re.fullmatch(r"[+-]?[0-9]{1,18}", name) is not None
    return (not is_number, int(name) if is_number else 0, name)


def _require_columns(record: Mapping[str, Any], columns: Sequence[str], origin: str) -> None:
    missing = [column for column in columns if column not in record]
    if missing:
        raise DataError(
            f"{origin} has no column {missing[0]!r}; it has {', '.join(map(repr, record))}.",
            hint="Name the columns with --text-column and --label-column.",
        )


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def get_text(record: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str | None]:
    """Return the text of a record, and the reason if it is unusable."""
    parts = [record.get(column) for column in columns]
    for part in parts:
        if _is_missing(part):
            return "", "no text (a missing value)"
        if not isinstance(part, str):
            return "", f"expected a string as text, got {type(part).__name__}"
    text = " ".join(part for part in parts if isinstance(part, str) and part.strip())
    if not text.translate(INVISIBLE).strip():
        return text, "the text is empty"
    return text, _unicode_error(text)


def _unicode_error(text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is an unpaired surrogate, which is not valid Unicode"
    return None


def _get_label(value: object, declared_labels: tuple[str, ...]) -> tuple[str, str | None]:
    """Return the name of a label, and the reason if it is unusable."""
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    if _is_missing(value) or value == "":
        return "", "no label"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        name = value.strip()
        problem = _unicode_error(name) if name else "no label"
        return name, problem
    if not isinstance(value, int):
        return "", f"expected a string or an integer as label, got {type(value).__name__}"
    if declared_labels:
        if not 0 <= value < len(declared_labels):
            return "", f"the label must be between 0 and {len(declared_labels) - 1}, got {value}"
        return declared_labels[value], None
    return str(value), None


def _open(source: Source, role: str, label_column: str | None = None) -> _Table:
    if isinstance(source, str | Path):
        try:
            return _open_named(str(source), role, label_column)
        except SetFitKDError:  # some are OSErrors too
            raise
        except OSError as error:
            message = f"Cannot read {source!r:.200}: {error.strerror or error}."
            raise DataError(message, hint="Check the path.") from None
    if hasattr(source, "column_names"):
        return _open_dataset(source, role, "the data set", label_column)
    if isinstance(source, Mapping):
        lengths = {len(values) for values in source.values()}
        if len(lengths) > 1:
            raise DataError("The columns differ in length.", hint="Pass one label per text.")
        columns = list(source)
        rows = zip(*source.values(), strict=True)
        records: Iterable[Record] = ((n, dict(zip(columns, row, strict=True))) for n, row in enumerate(rows, 1))
        return _Table(records, "the mapping of columns")
    has_columns = len(source) > 0 and isinstance(source[0], Mapping)
    return _Table(_list_records(source, label_column), "the list", has_columns=has_columns)


def _list_records(items: Sequence[Any], label_column: str | None) -> Iterator[Record]:
    for number, item in enumerate(items, 1):
        if isinstance(item, Mapping):
            yield number, item
        elif label_column is None:
            yield number, {"text": item}
        elif isinstance(item, tuple | list) and len(item) == 2:
            yield number, {"text": item[0], label_column: item[1]}
        else:
            raise DataError(
                f"The list, row {number}: expected a (text, label) pair, got {item!r:.60}.",
                hint="Pass pairs, mappings, or a mapping of columns.",
            )


def _open_named(name: str, role: str, label_column: str | None) -> _Table:
    if name.startswith("bundled:"):
        path = BUNDLED_FOLDER / name.removeprefix("bundled:") / ("eval.jsonl" if role == "test" else "train.jsonl")
        if not path.is_file():
            raise DataError(f"No such bundled corpus: {name!r}.", hint="Use bundled:newswire.")
        return _Table(read_records(path), name, unit="line")
    path = Path(name)
    if path.suffix.lower() in READERS and not path.is_dir():
        if not path.is_file():
            raise DataError(f"No such file: {name}.", hint="Check the path.")
        unit = "line" if path.suffix.lower() in LINE_NUMBERED else "row"
        return _Table(read_records(path), str(path), unit=unit, has_columns=path.suffix.lower() != ".txt")
    folder, split = path, None
    if not path.exists() and name.endswith("]"):
        folder_name, _, split = name[:-1].rpartition("[")
        folder = Path(folder_name)
        if folder.is_file():
            raise DataError(f"{folder_name} is a file and has no splits.", hint="Remove the square brackets.")
    if folder.is_dir():
        return _open_folder(folder, split, role, label_column)
    if path.is_file():
        raise unsupported_format(path)
    match = _HUB_SOURCE.fullmatch(name)
    if match is None or name.startswith((".", "~")) or name.lower().endswith(_FILE_SUFFIXES):
        raise DataError(f"No such file or folder: {name}.", hint="Check the path.")
    return _open_hub(match["name"], match["config"], match["split"], role, label_column)


def _open_folder(folder: Path, split: str | None, role: str, label_column: str | None) -> _Table:
    import datasets

    try:
        for path in folder.rglob("*"):
            if not path.is_dir():
                check_regular_file(path, limit=MAX_JSON_BYTES if path.suffix == ".json" else math.inf)
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"Cannot load {folder} as a data set ({type(error).__name__}: {error}).",
            hint="Use a folder written by `Dataset.save_to_disk`, or a CSV, TSV, JSONL or Parquet file.",
        ) from None
    return _open_dataset(loaded, role, str(folder), label_column, split)


def _open_hub(name: str, config: str | None, split: str | None, role: str, label_column: str | None) -> _Table:
    import datasets

    folder = hub.snapshot(name, "dataset")
    # `datasets` writes an Arrow copy. An interrupted run could leave it damaged in a cache, hence a temporary folder.
    with TemporaryDirectory(prefix="setfit-kd-") as cache_dir:
        try:
            with quiet_libraries():
                loaded = datasets.load_dataset(str(folder), name=config, cache_dir=cache_dir, keep_in_memory=True)
        except Exception as error:
            raise DataError(
                f"Cannot read the hub data set {name} ({type(error).__name__}: {error}).",
                hint="Name its configuration as NAME:CONFIG, or download it and use the file.",
            ) from error
    return _open_dataset(loaded, role, f"hub data set {name}", label_column, split)


def _open_dataset(data: Any, role: str, origin: str, label_column: str | None, split: str | None = None) -> _Table:
    if isinstance(data, Mapping):
        candidates = [split] if split else _SPLITS[role]
        split_name = next((name for name in candidates if name in data), None)
        if split_name is None:
            raise DataError(
                f"{origin} has no split {' or '.join(map(repr, candidates))}; it has {', '.join(map(repr, data))}.",
                hint="Name a split in square brackets, as in NAME[validation], or in Python pass one split.",
            )
        data, origin = data[split_name], f"{origin} [{split_name}]"
    elif split:
        raise DataError(f"{origin} has no splits.", hint="Remove the square brackets.")
    feature = (getattr(data, "features", None) or {}).get(label_column)
    return _Table(enumerate(data, 1), origin, declared_labels=tuple(getattr(feature, "names", None) or ()))
