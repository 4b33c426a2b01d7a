"""From whatever a user names or holds to rows of text, and of label where there is one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from setfit_kd import hub
from setfit_kd.data.files import LINE_NUMBERED, READERS, Record, read_records
from setfit_kd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Source: TypeAlias = Union[str, Path, "Dataset", Mapping[str, Sequence[Any]], Sequence[Any]]
"""A path, a hub name, a ``datasets.Dataset``, a mapping of columns, or a list of texts, pairs or mappings."""

BUNDLED = Path(__file__).parent
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w.-]+)\])?")
_SHOWN = 3


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
    declared: tuple[str, ...] = ()


def read(
    source: Source,
    *,
    text_column: Sequence[str] = ("text",),
    label_column: str | None = None,
    role: str = "train",
) -> Rows:
    """Read a source whole.

    Args:
        source: See `Source`. Names are tried as ``bundled:NAME``, then as a path, then as a hub name, which may carry
            a configuration and a split: ``NAME:CONFIG[SPLIT]``.
        text_column: Columns that make up the text, joined by a space.
        label_column: Column of the label; None reads texts alone.
        role: ``train`` or ``test``; decides the split where the source has several and none is named.

    Raises:
        DataError: Something is missing, broken or empty; with the file and row.
        UnavailableError: The hub cannot be reached.
    """
    table = _open(source, role, text_column, label_column)
    texts: list[str] = []
    labels: list[str] = []
    problems: list[str] = []
    for number, record in table.records:
        if not texts and not problems:
            _require_columns(record, [*text_column, *([label_column] if label_column else [])], table.origin)
        text, problem = _text(record, text_column)
        if label_column and problem is None:
            label, problem = _label(record.get(label_column), table.declared)
            labels.append(label)
        if problem:
            problems.append(f"{table.unit} {number}: {problem}")
        texts.append(text)
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{table.origin}, {'; '.join(problems[:_SHOWN])}{more}.", hint="Mend or remove those rows and try again."
        )
    if not texts:
        raise DataError(f"{table.origin} holds no rows.", hint="Give at least two rows.")
    names = table.declared or tuple(sorted(set(labels), key=_numbers_first))
    return Rows(texts, labels if label_column else None, names, table.origin)


def _numbers_first(name: str) -> tuple[bool, int, str]:
    is_number = re.fullmatch(r"[+-]?\d+", name) is not None
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


def _text(record: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str | None]:
    parts = [record.get(column) for column in columns]
    for part in parts:
        if _is_missing(part):
            return "", "no text (a missing value)"
        if not isinstance(part, str):
            return "", f"the text is a {type(part).__name__}, not a string"
    text = " ".join(part for part in parts if isinstance(part, str) and part.strip())
    return text, None if text.strip() else "the text is empty"


def _label(value: object, declared: tuple[str, ...]) -> tuple[str, str | None]:
    if _is_missing(value) or value == "":
        return "", "no label"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        name = value.strip()
        return name, None if name else "no label"
    if not isinstance(value, int):
        return "", f"the label is a {type(value).__name__}, not a string or an integer"
    if declared:
        if not 0 <= value < len(declared):
            return "", f"the label {value} is not one of 0 to {len(declared) - 1}"
        return declared[value], None
    return str(value), None


def _open(source: Source, role: str, text_column: Sequence[str], label_column: str | None) -> _Table:
    if isinstance(source, str | Path):
        return _open_named(str(source), role)
    if hasattr(source, "column_names"):
        return _open_dataset(source, role, "the given data set")
    if isinstance(source, Mapping):
        lengths = {len(values) for values in source.values()}
        if len(lengths) > 1:
            raise DataError("The given columns differ in length.", hint="Give as many labels as texts.")
        columns = list(source)
        rows = zip(*source.values(), strict=True)
        records: Iterable[Record] = ((n, dict(zip(columns, row, strict=True))) for n, row in enumerate(rows, 1))
        return _Table(records, "the given columns")
    if len(text_column) != 1:
        raise DataError("A plain list has one text column.", hint="Leave text_column as it is.")
    return _Table(_items(source, text_column[0], label_column), "the given list")


def _items(items: Sequence[Any], text_column: str, label_column: str | None) -> Iterator[Record]:
    for number, item in enumerate(items, 1):
        if isinstance(item, Mapping):
            yield number, item
        elif label_column is None:
            yield number, {text_column: item}
        elif isinstance(item, tuple | list) and len(item) == 2:
            yield number, {text_column: item[0], label_column: item[1]}
        else:
            raise DataError(
                f"The given list, row {number}: {item!r:.60} is not a (text, label) pair.",
                hint="Give pairs, mappings, or a mapping of columns.",
            )


def _open_named(name: str, role: str) -> _Table:
    if name.startswith("bundled:"):
        path = BUNDLED / name.removeprefix("bundled:") / ("eval.jsonl" if role == "test" else "train.jsonl")
        if not path.is_file():
            raise DataError(f"There is no bundled corpus {name!r}.", hint="There is bundled:newswire.")
        return _Table(read_records(path), name, unit="line")
    path = Path(name)
    if path.suffix.lower() in READERS:
        if not path.is_file():
            raise DataError(f"There is no file {name}.", hint="Check the path.")
        unit = "line" if path.suffix.lower() in LINE_NUMBERED else "row"
        return _Table(read_records(path), str(path), unit=unit)
    match = _HUB_NAME.fullmatch(name)
    folder, split = (path, None)
    if not path.exists() and name.endswith("]"):
        head, _, split = name[:-1].rpartition("[")
        folder = Path(head)
    if folder.is_dir():
        return _open_folder(folder, split, role)
    if path.is_file():
        raise DataError(
            f"{name}: files ending in {path.suffix or 'nothing'!r} cannot be read.",
            hint=f"Known endings: {', '.join(READERS)}.",
        )
    if match is None or name.startswith((".", "~")) or not match["name"].strip("."):
        raise DataError(f"There is no file or folder {name}.", hint="Check the path.")
    return _open_hub(match["name"], match["config"], match["split"], role)


def _open_folder(folder: Path, split: str | None, role: str) -> _Table:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"{folder} is not a whole data set folder ({type(error).__name__}: {error}).",
            hint="Give a folder that `Dataset.save_to_disk` wrote, or a CSV, TSV, JSONL or Parquet file.",
        ) from None
    return _open_dataset(loaded, role, str(folder), split)


def _open_hub(name: str, config: str | None, split: str | None, role: str) -> _Table:
    import datasets

    folder = hub.snapshot(name, "dataset")
    # The Arrow copy that `datasets` makes lives as long as this call: a cache of its own could be left half-written.
    with TemporaryDirectory(prefix="setfit-kd-") as scratch:
        try:
            loaded = datasets.load_dataset(str(folder), name=config, cache_dir=scratch, keep_in_memory=True)
        except Exception as error:
            raise DataError(
                f"The hub's data set {name} cannot be read ({type(error).__name__}: {error}).",
                hint="Name its configuration as NAME:CONFIG, or download it and give the file.",
            ) from error
    return _open_dataset(loaded, role, f"hub data set {name}", split)


def _open_dataset(data: Any, role: str, origin: str, split: str | None = None) -> _Table:
    if isinstance(data, Mapping):
        wanted = [split] if split else {"train": ["train"], "test": ["test", "validation"]}[role]
        found = next((name for name in wanted if name in data), None)
        if found is None:
            raise DataError(
                f"{origin} has no split {' or '.join(map(repr, wanted))}; it has {', '.join(map(repr, data))}.",
                hint="Name the split in square brackets, as in NAME[validation].",
            )
        data, origin = data[found], f"{origin} [{found}]"
    elif split:
        raise DataError(f"{origin} has no splits.", hint="Leave out the square brackets.")
    declared = ()
    features = getattr(data, "features", None) or {}
    class_labels = [feature for feature in features.values() if hasattr(feature, "names")]
    if len(class_labels) == 1:
        declared = tuple(class_labels[0].names)
    return _Table(enumerate(data, 1), origin, declared=declared)
