"""Read texts and labels from files, folders, the hub or Python objects."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

from setfit_kd.data.readers import READERS, Record, file_format, read_records, record_unit
from setfit_kd.errors import DataError, SetFitKDError
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.files import MAX_JSON_BYTES, check_regular_file, distinct_names

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

logger = logging.getLogger(__name__)

Source: TypeAlias = Union[str, Path, "Dataset", "DataFrame", Mapping[str, Sequence[Any]], Sequence[Any]]
"""A path, a hub name, a ``datasets.Dataset``, a ``pandas.DataFrame``, a mapping of columns, or a list of texts, pairs
or mappings."""

Decode: TypeAlias = Callable[[Sequence[int]], str]  # converts token ids to text
TextRow: TypeAlias = tuple[str | None, Mapping[str, Any]]  # the text of a row (None if unusable), and its other columns
Label: TypeAlias = str | tuple[str, ...] | float  # the label or score of a row, or all labels in a multi-label source
_HUB_SOURCE = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?(?:@[\w./-]+)?)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w.-]+)\])?"
)
# Names of the splits for each role; the first one that exists is used.
_SPLITS = {"train": ["train"], "validation": ["validation", "dev"], "test": ["test", "validation"]}
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""See `runtime.classify.INVISIBLE`; importing that would load numpy."""
PAIR_SEPARATOR = "\x1f"
"""See `runtime.classify.PAIR_SEPARATOR`."""
_NO_LABEL, _UNLABELED = "no label", "the label is -1"
_FLAGS = dict.fromkeys(("0", "0.0", "false"), False) | dict.fromkeys(("1", "1.0", "true"), True)
_KINDS: dict[type, str] = {str: "one label", tuple: "a list of labels", float: "a score"}


@dataclass(frozen=True)
class Rows:
    """Non-empty texts of a source, and their labels, or None if only texts were read.

    In a multi-label source, the labels of each text are a tuple. ``label_names`` are in the order declared by the
    source, otherwise sorted; ``origin`` names it in messages.
    """

    texts: list[str]
    labels: list[str] | list[tuple[str, ...]] | None
    label_names: tuple[str, ...]
    origin: str

    @property
    def used_labels(self) -> set[str]:
        """Names of the labels that occur."""
        return {name for label in self.labels or () for name in ((label,) if isinstance(label, str) else label)}


@dataclass(frozen=True)
class SentencePairs:
    """n pairs of sentences, and the label or the score of each; ``origin`` names their source in messages."""

    first: list[str]
    second: list[str]
    values: list[Any]
    origin: str


@dataclass(frozen=True)
class _Table:
    """Records of a source, and how to read and name them."""

    records: Iterable[Record]
    origin: str
    label_column: str | None = None
    label_separator: str | None = None
    label_columns: tuple[str, ...] = ()
    unit: str = "row"
    has_columns: bool = True
    may_be_empty: bool = False
    declared_labels: tuple[str, ...] = ()
    kind: type | None = None  # of the labels; None for that of the first row
    column_options: str = "--text-column, --pair-column, --label-column or --label-columns"


def read(
    source: Source,
    *,
    text_column: Sequence[str] = ("text",),
    pair_column: Sequence[str] | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    label_columns: Sequence[str] | None = None,
    role: str = "train",
    decode: Decode | None = None,
) -> Rows:
    """Read all rows of a source.

    Args:
        source: See `Source`. A name is tried as ``bundled:NAME``, then as a path, then as a hub name, optionally with
            a configuration and a split: ``NAME@REVISION:CONFIG[SPLIT]``.
        text_column: Columns that make up the text, joined by a space.
        pair_column: Columns of the second text of a pair, see `runtime.classify.join_pair`. [default: no pairs]
        label_column: Column of the label, or of a list of labels (multi-label); None reads only texts. If there is no
            column ``label``, it may be named ``labels``.
        label_separator: Separator of several labels in a string of the label column (multi-label).
        label_columns: Columns of 0 and 1, one per label (multi-label), instead of a label column.
        role: ``train``, ``validation`` or ``test``; selects the split if the source has several and none is named.
        decode: Converts token ids to text, for tokenized sources: if there is no text column, ``input_ids`` is decoded.

    Raises:
        DataError: If something is missing, damaged or empty. The message names the file and row.
        UnavailableError: If the hub cannot be reached.
    """
    columns = tuple(label_columns or ())
    table = _open(source, role, None if columns else label_column)
    table = replace(table, label_separator=label_separator, label_columns=columns)
    pairs = [(text, label) for text, label, _ in _rows(table, text_column, pair_column, decode=decode)]
    labels: Any = [label for _, label in pairs] if columns or label_column else None
    rows = Rows([text for text, _ in pairs], labels, columns or table.declared_labels, table.origin)
    if rows.label_names:
        return rows
    names = tuple(sorted(rows.used_labels, key=_label_sort_key))
    lengths = {len(label) for label in labels or () if isinstance(label, tuple)}
    if len(lengths) == 1 and min(lengths) > 1 and {name.casefold() for name in names} <= _FLAGS.keys():
        hint = "Use lists of the labels of each text, or one column of 0 and 1 per label, named with --label-columns."
        raise DataError(f"{rows.origin} has vectors of 0 and 1 instead of labels.", hint=hint)
    return replace(rows, label_names=names)


def are_names(source: object) -> TypeGuard[Sequence[str | Path]]:
    """Return whether a source is a list of paths or names of several sources."""
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(each, str | Path) for each in source)


def evaluation_sources(source: Any) -> dict[str, Source]:
    """Return the source of each evaluation set by a distinct name; none for None.

    Several sources are a list of paths or names, and named after the files, or a mapping of names to non-lists.
    """
    if source is None:
        return {}
    if are_names(source):
        return dict(zip(distinct_names(Path(name).stem for name in source), source, strict=True))
    if not isinstance(source, Mapping) or not source or hasattr(source, "column_names"):
        return {"": source}
    is_column = [not isinstance(v, str | Path | Mapping) and len(getattr(v, "shape", ())) < 2 for v in source.values()]
    return {"": source} if any(is_column) else dict(zip(distinct_names(source), source.values(), strict=True))


def stream_texts(
    source: Source, *, text_column: Sequence[str] = ("text",), pair_column: Sequence[str] | None = None
) -> Iterator[str]:
    """Yield the texts of a source one by one, without loading a whole file into memory; raises as `read`."""
    for text, _, _ in _rows(_open(source, "train"), text_column, pair_column):
        yield text


def stream_rows(
    source: Source | _Table, *, text_column: Sequence[str] = ("text",), pair_column: Sequence[str] | None = None
) -> Iterator[TextRow]:
    """Yield the text of each row, or None if it is unusable, and the row's other columns; raises as `read`.

    The other columns include those named in ``text_column``; only the default column ``text`` is left out. After the
    last row, a warning lists the rows without a usable text.
    """
    table = source if isinstance(source, _Table) else _open(source, "train")
    drop_text = not table.has_columns or tuple(text_column) == ("text",)
    for text, _, record in _rows(table, text_column, pair_column, strict=False):
        yield text or None, {name: value for name, value in record.items() if not (drop_text and name == "text")}


def stream_file(
    path: Path, records: Iterable[Record], origin: str, text_column: Sequence[str], pair_column: Sequence[str] | None
) -> Iterator[TextRow]:
    """Yield records of a file as `stream_rows` does; there may be none. ``origin`` names the file in messages."""
    has_columns = file_format(path) != ".txt"
    table = _Table(records, origin, unit=record_unit(path), has_columns=has_columns, may_be_empty=True)
    return stream_rows(table, text_column=text_column, pair_column=pair_column)


def check_texts(
    texts: Iterable[str] | Iterable[tuple[str, str]], *, origin: str, unit: str, pairs: bool = False
) -> Iterator[TextRow]:
    """Yield texts or pairs as `stream_rows` does, where ``unit`` is what an item is called, such as ``line``."""
    names = ("text", "text_pair")
    items = (text if pairs else (text,) for text in texts)
    records: Iterator[Record] = ((n, dict(zip(names, item, strict=False))) for n, item in enumerate(items, 1))
    table = _Table(records, origin, unit=unit, has_columns=False, may_be_empty=True)
    return ((text, {}) for text, _ in stream_rows(table, pair_column=names[1:] if pairs else None))


def read_table(source: Source, role: str) -> tuple[Iterable[Record], str, str]:
    """Open a source: return its records with their numbers, its name, and what the numbers count; raises as `read`."""
    table = _open(source, role)
    return table.records, table.origin, table.unit


def read_pairs(
    source: Source, first_column: str, second_column: str, value_column: str, *, scored: bool = False
) -> SentencePairs:
    """Read sentence pairs with labels for training or, if ``scored``, scores for an evaluation; raises as `read`."""
    options = f"--first-column, --second-column and {'--score-column' if scored else '--label-column'}"
    table = _open(source, "test" if scored else "train", value_column)
    table = replace(table, kind=float if scored else str, column_options=options)
    pairs, values = [], []
    for text, value, _ in _rows(table, [first_column], [second_column]):
        pairs.append(text.split(PAIR_SEPARATOR))
        values.append(value)
    if scored and len(set(values)) < 2:
        raise DataError(f"{table.origin}: all scores are {values[0]:g}.", hint="Use pairs with different scores.")
    first, second = map(list, zip(*pairs, strict=True))
    return SentencePairs(first, second, values, table.origin)


def _rows(
    table: _Table,
    text_column: Sequence[str],
    pair_column: Sequence[str] | None = None,
    *,
    strict: bool = True,
    decode: Decode | None = None,
) -> Iterator[tuple[str, Label, Mapping[str, Any]]]:
    """Yield the text, the label ("" without a label column) and the record of each row.

    Rows with the label -1 in a column with declared labels are left out with a warning. Unusable rows are skipped and
    listed in an error after the last row; if not ``strict``, their text is "", and a warning lists them.
    """
    columns, second_columns = text_column if table.has_columns else ("text",), pair_column or ()
    errors = RowErrors(table.origin, table.unit)
    is_first, label_column, kind, n_unlabeled, has_rows = True, table.label_column, table.kind, 0, False
    for number, record in table.records:
        if decode and columns[0] not in record and record.get("input_ids") is not None:
            record = {**record, columns[0]: decode(list(record["input_ids"]))}
        if is_first:
            label_column = _label_column(label_column, record)
        required = [*columns, *second_columns, *table.label_columns, *([label_column] if label_column else [])]
        missing = [column for column in required if is_first and column not in record]
        if missing:
            message = f"{table.origin} has no column {missing[0]!r}; it has {', '.join(map(repr, record))}."
            raise DataError(message, hint=f"Name the columns with {table.column_options}.")
        is_first = False
        label: Label = ""
        text, problem = get_pair(record, columns, second_columns)
        if table.label_columns and problem is None:
            label, problem = _get_flagged(record, table.label_columns)
        elif label_column and problem is None:
            label, problem = _get_label(record.get(label_column), table)
            if problem == _UNLABELED:
                n_unlabeled += 1
                continue
        has_rows = True
        if problem is None:
            kind = kind or type(label)
            if type(label) is not kind:
                before = "" if table.kind else " as in the rows before"
                problem = f"expected {_KINDS[kind]}{before}, got {_KINDS[type(label)]}"
        if problem is None:
            yield text, label, record
            continue
        errors.add(number, problem)
        if problem == _NO_LABEL and table.label_separator is None and table.kind is None:
            errors.hint = "Fix or remove these rows. For any number of labels, use lists, or pass --label-separator."
        if not strict:
            yield "", "", record
    if not has_rows and not table.may_be_empty:
        message = f"{table.origin} has no {'labels: all are -1' if n_unlabeled else 'rows'}."
        raise DataError(message, hint="Add rows to it, or choose another source.")
    if n_unlabeled:
        logger.warning("%s: left out %d rows with the label -1, which means no label.", table.origin, n_unlabeled)
    if strict:
        errors.check()
    if errors.total:
        logger.warning("Rows without a usable text get no prediction: %s.", errors)


@dataclass
class RowErrors:
    """Collector of unusable rows, with messages for the first three."""

    origin: str
    unit: str
    total: int = 0
    shown: list[str] = field(default_factory=list)
    hint: str = "Fix or remove these rows."

    def add(self, number: int, problem: str) -> None:
        """Record the problem of a row."""
        self.total += 1
        if self.total <= 3:
            self.shown.append(f"{self.unit} {number}: {problem}")

    def check(self) -> None:
        """Raise a `DataError` if there are unusable rows."""
        if self.total:
            raise DataError(f"{self}.", hint=self.hint)

    def __str__(self) -> str:
        more = f" and {self.total - 3} more" if self.total > 3 else ""
        return f"{self.origin}, {'; '.join(self.shown)}{more}"


def _label_column(name: str | None, columns: Container[str]) -> str | None:
    """Return the name of the label column: `label` may also be `labels`, as models of transformers expect."""
    return "labels" if name == "label" and name not in columns and "labels" in columns else name


def _label_sort_key(name: str) -> tuple[bool, int, str]:
    """Sort integers by value, before all other names."""
    is_number = re.fullmatch(r"[+-]?[0-9]{1,18}", name) is not None
    return (not is_number, int(name) if is_number else 0, name)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def get_pair(
    record: Mapping[str, Any], columns: Sequence[str], second_columns: Sequence[str]
) -> tuple[str, str | None]:
    """Return the text of a record, or the pair if there are columns of a second text; and why it is unusable."""
    text, problem = get_text(record, columns)
    if problem is None and second_columns:
        second, problem = get_text(record, second_columns)
        text, problem = text + PAIR_SEPARATOR + second, problem and f"second text: {problem}"
    return text, problem


def get_text(record: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str | None]:
    """Return the text of a record, and the reason if it is unusable."""
    parts = [record.get(column) for column in columns]
    for part in parts:
        if not isinstance(part, str):
            expected = f"expected a string as text, got {type(part).__name__}"
            return "", "no text (a missing value)" if _is_missing(part) else expected
    text = " ".join(part for part in parts if isinstance(part, str) and part.strip()).replace(PAIR_SEPARATOR, " ")
    if not INVISIBLE.sub("", text).strip():
        return text, "the text is empty"
    return text, _unicode_error(text)


def _unicode_error(text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is an unpaired surrogate, which is not valid Unicode"
    return None


def _get_flagged(record: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[Label, str | None]:
    """Return the names of the columns with the value 1, and the reason if a value is unusable."""
    flags = {column: _FLAGS.get(_get_name(record.get(column), ())[0].casefold()) for column in columns}
    problems = (f"expected 0 or 1 in {c!r}, got {record.get(c)!r:.60}" for c, flag in flags.items() if flag is None)
    return tuple(column for column, flag in flags.items() if flag), next(problems, None)


def _get_label(value: Any, table: _Table) -> tuple[Label, str | None]:
    """Return the label or labels (or the score) in a label column, and the reason if they are unusable."""
    if table.kind is float:
        return _get_score(value)
    if hasattr(value, "tolist"):  # a NumPy or torch array
        value = value.tolist()
    separator = table.label_separator
    if not isinstance(value, list | tuple):
        name, problem = _get_name(value, table.declared_labels)
        if separator is None or problem not in (None, _NO_LABEL):
            return name, problem
        value = name.split(separator) if name else []
        if not all(part.strip() for part in value):
            return (), f"an empty label in {name!r:.60}; if labels contain {separator!r}, use another --label-separator"
    elif separator is not None:
        return (), f"expected labels separated by {separator!r} in a string, got a list"
    names = [_get_name(item, table.declared_labels) for item in value]
    return tuple(name for name, _ in names), next((problem for _, problem in names if problem), None)


def _get_name(value: Any, declared_labels: tuple[str, ...]) -> tuple[str, str | None]:
    """Return the name of a label, and the reason if it is unusable."""
    if hasattr(value, "tolist"):  # a NumPy or torch scalar
        value = value.tolist()
    if isinstance(value, str):
        name = value.strip()
        return name, _unicode_error(name) if name else _NO_LABEL
    if _is_missing(value):
        return "", _NO_LABEL
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        return "", f"expected a string or an integer as label, got {type(value).__name__}"
    if not declared_labels:
        return str(value), None
    if value == -1:
        return "", _UNLABELED
    if not 0 <= value < len(declared_labels):
        return "", f"the label must be between 0 and {len(declared_labels) - 1}, got {value}"
    return declared_labels[value], None


def _get_score(value: Any) -> tuple[float, str | None]:
    """Return a finite number, and the reason if it is unusable."""
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    return score, None if math.isfinite(score) else f"expected a number as score, got {value!r:.60}"


def _open(source: Any, role: str, label_column: str | None = None) -> _Table:
    if isinstance(source, str | Path):
        try:
            return _open_named(str(source), role, label_column)
        except SetFitKDError:
            raise
        except OSError as error:
            message = f"Cannot read {str(source)!r:.200}: {error.strerror or error}."
            raise DataError(message, hint="Check the path.") from None
    if hasattr(source, "to_dict") and hasattr(source, "tolist"):
        source = source.tolist()  # a pandas Series
    if hasattr(source, "column_names"):
        return _open_dataset(source, role, "the data set", label_column)
    if not isinstance(source, Mapping) and not hasattr(source, "to_dict"):
        has_columns = len(source) > 0 and isinstance(source[0], Mapping)
        return _Table(_list_records(source, label_column), "the list", label_column, has_columns=has_columns)
    origin = "the mapping of columns"
    if not isinstance(source, Mapping):
        origin = "the data frame"
        if not source.columns.is_unique:
            raise DataError("The data frame has two columns with the same name.", hint="Rename one of them.")
        source = dict(source.astype(object).where(source.notna(), None).items())
    if len({len(values) for values in source.values()}) > 1:
        raise DataError("The columns differ in length.", hint="Pass one label per text.")
    rows = (dict(zip(source, row, strict=True)) for row in zip(*source.values(), strict=True))
    return _Table(enumerate(rows, 1), origin, label_column)


def _list_records(items: Sequence[Any], label_column: str | None) -> Iterator[Record]:
    for number, item in enumerate(items, 1):
        if isinstance(item, Mapping):
            yield number, item
        elif label_column is None:
            yield number, {"text": item}
        elif isinstance(item, tuple | list) and len(item) == 2:
            yield number, {"text": item[0], label_column: item[1]}
        else:
            message = f"The list, row {number}: expected a (text, label) pair, got {item!r:.60}."
            raise DataError(message, hint="Pass pairs, mappings, or a mapping of columns.")


def _find(name: str, role: str) -> tuple[Path | re.Match[str], str | None]:
    """Return the file or folder that a name means, or the parts of the name of a hub data set; and the split."""
    if name.startswith("bundled:"):
        corpus = Path(__file__).parent / name.removeprefix("bundled:")
        path = corpus / ("eval.jsonl" if role == "test" else "train.jsonl")
        if not path.is_file():
            raise DataError(f"No such bundled corpus: {name!r}.", hint="Use bundled:newswire.")
        return path, None
    path, split = Path(name), None
    if name.endswith("]") and not path.exists():
        folder, _, split = name[:-1].rpartition("[")
        path = Path(folder)
    if path.is_file() and split:
        raise DataError(f"{path} is a file and has no splits.", hint="Remove the square brackets.")
    if path.is_file() or path.is_dir():
        return path, split
    is_file_name = name.lower().endswith((*READERS, ".json", ".xlsx", ".xls", ".gz", ".zip", ".bz2", ".xz"))
    match = None if is_file_name or name.startswith((".", "~")) else _HUB_SOURCE.fullmatch(name)
    if match is None:
        raise DataError(f"No such file{'' if is_file_name else ' or folder'}: {name}.", hint="Check the path.")
    return match, match["split"]


def _open_named(name: str, role: str, label_column: str | None) -> _Table:
    path, split = _find(name, role)
    if isinstance(path, Path) and path.is_file():
        origin = name if name.startswith("bundled:") else str(path)
        has_columns = file_format(path) != ".txt"
        return _Table(read_records(path), origin, label_column, unit=record_unit(path), has_columns=has_columns)
    import datasets

    from setfit_kd.hub.client import snapshot

    folder, origin, config = path, str(path), None
    if isinstance(path, re.Match):
        folder, origin, config = snapshot(path["name"], "dataset"), f"hub data set {path['name']}", path["config"]
    # `datasets` writes an Arrow copy. An interrupted run could leave it damaged in a cache, hence a temporary folder.
    with TemporaryDirectory(prefix="setfit-kd-") as cache_dir, quiet_libraries():
        try:
            if isinstance(path, Path):
                for file in path.rglob("*"):
                    if not file.is_dir():
                        check_regular_file(file, limit=MAX_JSON_BYTES if file.suffix == ".json" else math.inf)
                data = datasets.load_from_disk(str(folder))
            else:
                data = datasets.load_dataset(str(folder), name=config, cache_dir=cache_dir, keep_in_memory=True)
        except Exception as error:
            hint = "Use a folder written by `Dataset.save_to_disk`, or a CSV, TSV, JSONL or Parquet file. "
            hint += "Name the configuration of a hub data set as NAME:CONFIG."
            raise DataError(f"Cannot read {origin} ({type(error).__name__}: {error}).", hint=hint) from error
    return _open_dataset(data, role, origin, label_column, split)


def _open_dataset(data: Any, role: str, origin: str, label_column: str | None, split: str | None = None) -> _Table:
    if isinstance(data, Mapping):
        candidates = [split] if split else _SPLITS[role]
        split_name = next((name for name in candidates if name in data), None)
        if split_name is None:
            wanted, present = " or ".join(map(repr, candidates)), ", ".join(map(repr, data))
            hint = "Name a split in square brackets, as in NAME[validation], or in Python pass one split."
            raise DataError(f"{origin} has no split {wanted}; it has {present}.", hint=hint)
        data, origin = data[split_name], f"{origin} [{split_name}]"
    elif split:
        raise DataError(f"{origin} has no splits.", hint="Remove the square brackets.")
    features = getattr(data, "features", None) or {}  # unknown for some streams
    feature = features.get(_label_column(label_column, features))
    feature = getattr(feature, "feature", feature)  # of the items of a list
    names = tuple(getattr(feature, "names", None) or ())
    return _Table(enumerate(data, 1), origin, label_column, declared_labels=names)
