"""From whatever a user names or holds to rows of text, and of label where there is one."""

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
from setfit_kd.data.readers import LINE_NUMBERED, READERS, Record, read_records, unknown_ending
from setfit_kd.errors import DataError, SetFitKDError
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.files import MAX_JSON_BYTES, check_regular_file

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Source: TypeAlias = Union[str, Path, "Dataset", Mapping[str, Sequence[Any]], Sequence[Any]]
"""A path, a hub name, a ``datasets.Dataset``, a mapping of columns, or a list of texts, pairs or mappings."""

Decode: TypeAlias = Callable[[Sequence[int]], str]
TextRow: TypeAlias = tuple[str | None, Mapping[str, Any]]
_TOKENS = "input_ids"
BUNDLED = Path(__file__).parent
_HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?(?:@[\w./-]+)?)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w.-]+)\])?"
)
_FILE_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet", ".xlsx", ".xls", ".gz", ".zip", ".bz2", ".xz")
_MAX_SHOWN = 3
_SPLITS = {"train": ["train"], "validation": ["validation", "dev"], "test": ["test", "validation"]}
"""Names of the splits that are meant for something, the first that there is being taken."""
_IGNORABLE = (
    "00AD 034F 061C 115F-1160 17B4-17B5 180B-180F 200B-200F 202A-202E 2060-206F 3164 FE00-FE0F FEFF FFA0 FFF0-FFFB "
    "1BCA0-1BCA3 1D173-1D17A E0000-E0FFF"
)
_SPANS = ([int(end, 16) for end in span.split("-")] for span in _IGNORABLE.split())
INVISIBLE: dict[int, None] = dict.fromkeys(code for span in _SPANS for code in range(span[0], span[-1] + 1))
"""Unicode's Default_Ignorable_Code_Point (zero-width characters, direction marks, variation selectors, tags, ...) and
interlinear annotation marks, for `str.translate`."""


@dataclass(frozen=True)
class Rows:
    """Texts as read, n of them, with the names of their labels.

    Attributes:
        texts: n texts, none of them empty.
        labels: n label names, or None for a pool.
        label_names: The names in the order that the source declares or, failing that, in sorted order.
        origin: What to call the source in a message.
    """

    texts: list[str]
    labels: list[str] | None
    label_names: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class _Table:
    records: Iterable[Record]
    origin: str
    unit: str = "row"
    has_columns: bool = True
    may_be_empty: bool = False
    declared: tuple[str, ...] = ()


def read(
    source: Source,
    *,
    text_column: Sequence[str] = ("text",),
    label_column: str | None = None,
    role: str = "train",
    decode: Decode | None = None,
) -> Rows:
    """Read a source whole.

    Args:
        source: See `Source`. Names are tried as ``bundled:NAME``, then as a path, then as a hub name, which may carry
            a configuration and a split: ``NAME:CONFIG[SPLIT]``.
        text_column: Columns that make up the text, joined by a space.
        label_column: Column of the label; None reads texts alone.
        role: ``train``, ``validation`` or ``test``; decides the split where the source has several and none is named.

        decode: From token ids to the text they came from, for a source that is tokenised already: where it has no text
            column, its ``input_ids`` are read.

    Raises:
        DataError: Something is missing, broken or empty; with the file and row.
        UnavailableError: The hub cannot be reached.
    """
    table = _open(source, role, label_column)
    if decode is not None:
        table = replace(table, records=_decoded(table.records, text_column[0], decode))
    texts: list[str] = []
    labels: list[str] = []
    for text, label, _ in _rows(table, text_column, label_column):
        texts.append(text)
        labels.append(label)
    names = table.declared or tuple(sorted(set(labels), key=_numbers_first))
    return Rows(texts, labels if label_column else None, names, table.origin)


def _decoded(records: Iterable[Record], text_column: str, decode: Decode) -> Iterator[Record]:
    for number, record in records:
        ids = record.get(_TOKENS)
        if text_column in record or ids is None:
            yield number, record
        else:
            yield number, {**record, text_column: decode(list(ids))}


def stream_texts(source: Source, *, text_column: Sequence[str] = ("text",)) -> Iterator[str]:
    """The texts of a source, one after the other: a file of any length is never held whole.

    What is wrong with rows is told once all have been read.

    Raises:
        DataError: As `read`.
        UnavailableError: The hub cannot be reached.
    """
    for text, _, _ in _rows(_open(source, "train"), text_column):
        yield text


def stream_rows(source: Source, *, text_column: Sequence[str] = ("text",)) -> Iterator[TextRow]:
    """The text of each row of a source, None where a row has none that can be used, with the row's other columns.

    The single text column ``text`` is not among those. A file is never held whole. Rows without text are told of by a
    warning at the end.

    Raises:
        DataError: The source cannot be read, or has no such column.
        UnavailableError: The hub cannot be reached.
    """
    table = _open(source, "train")
    is_text = not table.has_columns or tuple(text_column) == ("text",)
    for text, _, record in _rows(table, text_column, strict=False):
        yield text or None, {name: value for name, value in record.items() if not (is_text and name == "text")}


def checked_texts(texts: Iterable[str], *, origin: str, unit: str) -> Iterator[TextRow]:
    """Each of the texts, None where one cannot be used; such ones are told of by a warning at the end.

    Args:
        texts: However many.
        origin: What to call them in the warning.
        unit: What to call one of them.
    """
    records: Iterator[Record] = ((number, {"text": text}) for number, text in enumerate(texts, 1))
    table = _Table(records, origin, unit=unit, may_be_empty=True)
    yield from ((text or None, {}) for text, _, _ in _rows(table, ("text",), strict=False))


def _rows(
    table: _Table, text_column: Sequence[str], label_column: str | None = None, *, strict: bool = True
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each row's text, label ("" without a label column), and record.

    With ``strict``, rows that cannot be used are left out and raise an error at the end. Otherwise their text is "",
    and a warning names them.
    """
    columns = text_column if table.has_columns else ("text",)
    problems = RowErrors(table.origin, table.unit)
    n_rows = 0
    for number, record in table.records:
        if not n_rows:
            _require_columns(record, [*columns, *([label_column] if label_column else [])], table.origin)
        n_rows += 1
        label = ""
        text, problem = get_text(record, columns)
        if label_column and problem is None:
            label, problem = _label(record.get(label_column), table.declared)
        if problem is None:
            yield text, label, record
            continue
        problems.add(number, problem)
        if not strict:
            yield "", "", record
    if not n_rows and not table.may_be_empty:
        raise DataError(f"There are no rows in {table.origin}.", hint="Give at least two rows.")
    if problems.total and strict:
        raise DataError(f"{problems}.", hint="Mend or remove those rows and try again.")
    if problems.total:
        logger.warning("%s: no label was given.", problems)


class RowErrors:
    """Rows that cannot be used, the first of them in words."""

    def __init__(self, origin: str, unit: str) -> None:
        self.origin = origin
        self.unit = unit
        self.shown: list[str] = []
        self.total = 0

    def add(self, number: int, problem: str) -> None:
        """Keep account of one more."""
        self.total += 1
        if len(self.shown) < _MAX_SHOWN:
            self.shown.append(f"{self.unit} {number}: {problem}")

    def __str__(self) -> str:
        more = f" and {self.total - _MAX_SHOWN} more" if self.total > _MAX_SHOWN else ""
        return f"{self.origin}, {'; '.join(self.shown)}{more}"


def _numbers_first(name: str) -> tuple[bool, int, str]:
    is_number = re.fullmatch(r"[+-]?[0-9]{1,18}", name) is not None
    return (not is_number, int(name) if is_number else 0, name)


def _require_columns(record: Mapping[str, Any], columns: Sequence[str], origin: str) -> None:
    missing = [column for column in columns if column not in record]
    if missing:
        raise DataError(
            f"{origin} has no column {missing[0]!r}; it has {', '.join(map(repr, record))}.",
            hint="Name the right ones by --text-column and --label-column.",
        )


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def get_text(record: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str | None]:
    """A record's text, and what keeps it from being used."""
    parts = [record.get(column) for column in columns]
    for part in parts:
        if _is_missing(part):
            return "", "no text (a missing value)"
        if not isinstance(part, str):
            return "", f"the text is of type {type(part).__name__}, not a string"
    text = " ".join(part for part in parts if isinstance(part, str) and part.strip())
    if not text.translate(INVISIBLE).strip():
        return text, "the text is empty"
    return text, _not_unicode(text)


def _not_unicode(text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half a surrogate pair, which is no valid text"
    return None


def _label(value: object, declared: tuple[str, ...]) -> tuple[str, str | None]:
    if hasattr(value, "item"):  # a scalar of numpy's or torch's
        value = value.item()
    if _is_missing(value) or value == "":
        return "", "no label"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        name = value.strip()
        return name, _not_unicode(name) if name else "no label"
    if not isinstance(value, int):
        return "", f"the label is of type {type(value).__name__}, not a string or an integer"
    if declared:
        if not 0 <= value < len(declared):
            return "", f"the label {value} is not one of 0 to {len(declared) - 1}"
        return declared[value], None
    return str(value), None


def _open(source: Source, role: str, label_column: str | None = None) -> _Table:
    if isinstance(source, str | Path):
        try:
            return _open_named(str(source), role, label_column)
        except SetFitKDError:
            raise
        except OSError as error:
            message = f"Cannot read {source!r:.200}: {error.strerror or error}."
            raise DataError(message, hint="Check the path.") from None
    if hasattr(source, "column_names"):
        return _open_dataset(source, role, "the given data set", label_column)
    if isinstance(source, Mapping):
        lengths = {len(values) for values in source.values()}
        if len(lengths) > 1:
            raise DataError("The given columns differ in length.", hint="Give as many labels as texts.")
        columns = list(source)
        rows = zip(*source.values(), strict=True)
        records: Iterable[Record] = ((n, dict(zip(columns, row, strict=True))) for n, row in enumerate(rows, 1))
        return _Table(records, "the given columns")
    has_columns = len(source) > 0 and isinstance(source[0], Mapping)
    return _Table(_items(source, label_column), "the given list", has_columns=has_columns)


def _items(items: Sequence[Any], label_column: str | None) -> Iterator[Record]:
    for number, item in enumerate(items, 1):
        if isinstance(item, Mapping):
            yield number, item
        elif label_column is None:
            yield number, {"text": item}
        elif isinstance(item, tuple | list) and len(item) == 2:
            yield number, {"text": item[0], label_column: item[1]}
        else:
            raise DataError(
                f"The given list, row {number}: {item!r:.60} is not a (text, label) pair.",
                hint="Give pairs, mappings, or a mapping of columns.",
            )


def _open_named(name: str, role: str, label_column: str | None) -> _Table:
    if name.startswith("bundled:"):
        path = BUNDLED / name.removeprefix("bundled:") / ("eval.jsonl" if role == "test" else "train.jsonl")
        if not path.is_file():
            raise DataError(f"There is no bundled corpus {name!r}.", hint="There is bundled:newswire.")
        return _Table(read_records(path), name, unit="line")
    path = Path(name)
    if path.suffix.lower() in READERS and not path.is_dir():
        if not path.is_file():
            raise DataError(f"There is no file {name}.", hint="Check the path.")
        unit = "line" if path.suffix.lower() in LINE_NUMBERED else "row"
        return _Table(read_records(path), str(path), unit=unit, has_columns=path.suffix.lower() != ".txt")
    match = _HUB_NAME.fullmatch(name)
    folder, split = (path, None)
    if not path.exists() and name.endswith("]"):
        head, _, split = name[:-1].rpartition("[")
        folder = Path(head)
        if folder.is_file():
            raise DataError(f"{head} is a file, which has no splits.", hint="Leave out the square brackets.")
    if folder.is_dir():
        return _open_folder(folder, split, role, label_column)
    if path.is_file():
        raise unknown_ending(path)
    if match is None or name.startswith((".", "~")) or name.lower().endswith(_FILE_ENDINGS):
        raise DataError(f"There is no file or folder {name}.", hint="Check the path.")
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
            f"{folder} is not a whole data set folder ({type(error).__name__}: {error}).",
            hint="Give a folder that `Dataset.save_to_disk` wrote, or a CSV, TSV, JSONL or Parquet file.",
        ) from None
    return _open_dataset(loaded, role, str(folder), label_column, split)


def _open_hub(name: str, config: str | None, split: str | None, role: str, label_column: str | None) -> _Table:
    import datasets

    folder = hub.snapshot(name, "dataset")
    # The Arrow copy that `datasets` makes lives as long as this call: a cache of its own could be left half-written.
    with TemporaryDirectory(prefix="setfit-kd-") as scratch:
        try:
            with quiet_libraries():
                loaded = datasets.load_dataset(str(folder), name=config, cache_dir=scratch, keep_in_memory=True)
        except Exception as error:
            raise DataError(
                f"The hub's data set {name} cannot be read ({type(error).__name__}: {error}).",
                hint="Name its configuration as NAME:CONFIG, or download it and give the file.",
            ) from error
    return _open_dataset(loaded, role, f"hub data set {name}", label_column, split)


def _open_dataset(data: Any, role: str, origin: str, label_column: str | None, split: str | None = None) -> _Table:
    if isinstance(data, Mapping):
        wanted = [split] if split else _SPLITS[role]
        found = next((name for name in wanted if name in data), None)
        if found is None:
            raise DataError(
                f"{origin} has no split {' or '.join(map(repr, wanted))}; it has {', '.join(map(repr, data))}.",
                hint="Name a split in square brackets, as in NAME[validation], or give one split of the object.",
            )
        data, origin = data[found], f"{origin} [{found}]"
    elif split:
        raise DataError(f"{origin} has no splits.", hint="Leave out the square brackets.")
    feature = (getattr(data, "features", None) or {}).get(label_column)
    return _Table(enumerate(data, 1), origin, declared=tuple(getattr(feature, "names", None) or ()))
