"""Tests of reading data sources, drawing samples, and the leak guard."""

from __future__ import annotations

import csv
import gzip
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from setfit_kd.config.stages import DataConfig
from setfit_kd.data.labeled_set import LabeledSet, check_classes, draw_shots, encode_labels
from setfit_kd.data.sources import Source, read, read_pairs, stream_texts
from setfit_kd.data.splits import DataReport, normalize, split_data
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.run.inputs import load_run_data
from setfit_kd.tasks.classification import MULTI_LABEL

TEXTS = ["Rain stops play", 'She said: "no,\tnever"', "Two lines\nof café", "x" * 200_000]
LABELS = ["Sports", "World", "World", "Sports"]
COLUMNS = {"text": TEXTS, "label": LABELS}
RECORDS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
PROPERTY = settings(max_examples=200)
NAN = float("nan")


def class_label_dataset(texts: Sequence[str], labels: Sequence[int], names: Sequence[str]) -> Any:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
    return datasets.Dataset.from_dict({"text": list(texts), "label": list(labels)}, features=features)


def write_delimited(name: str, delimiter: str) -> str:
    with Path(name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("label", "text"), *zip(LABELS, TEXTS, strict=True)])
    return name


def write_compressed_jsonl(name: str) -> str:
    Path(name).write_bytes(gzip.compress("".join(json.dumps(record) + "\n\n" for record in RECORDS).encode()))
    return name


def write_parquet(name: str, columns: Any = COLUMNS) -> str:
    pq.write_table(pa.table(columns), name)
    return name


def save_dataset(name: str, data: Any) -> str:
    data.save_to_disk(name)
    return name


SOURCES: dict[str, Callable[[], Source]] = {
    "tsv": lambda: write_delimited("a.tsv", "\t"),
    "compressed jsonl": lambda: write_compressed_jsonl("a.ndjson.gz"),
    "parquet": lambda: write_parquet("a.parquet"),
    "path of a csv": lambda: Path(write_delimited("A.CSV", ",")),
    "folder": lambda: save_dataset("folder", datasets.Dataset.from_dict(COLUMNS)),
    "split": lambda: save_dataset("folder", datasets.DatasetDict(dev=datasets.Dataset.from_dict(COLUMNS))) + "[dev]",
    "dataset": lambda: datasets.Dataset.from_dict(COLUMNS),
    "dataset with class labels": lambda: class_label_dataset(TEXTS, [0, 1, 1, 0], ["Sports", "World"]),
    "data frame": lambda: pd.DataFrame(COLUMNS, index=[3, 3, 1, 0]),
    "columns": lambda: COLUMNS,
    "pairs": lambda: list(zip(TEXTS, LABELS, strict=True)),
    "mappings": lambda: RECORDS,
}


@pytest.mark.parametrize("name", SOURCES)
def test_read_or_stream_a_source(name: str) -> None:
    source = SOURCES[name]()
    rows = read(source, label_column="label")
    assert (rows.texts, rows.labels, rows.label_names) == (TEXTS, LABELS, ("Sports", "World"))
    if name != "pairs":
        rows = read(source)
        assert (rows.texts, rows.labels) == (TEXTS, None)
        assert list(stream_texts(source)) == TEXTS


def test_streams_and_series_are_read() -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter(RECORDS))
    assert read(stream, label_column="label").labels == LABELS
    assert list(stream_texts(pd.Series(TEXTS, index=[3, 3, 1, 0]))) == TEXTS


@pytest.mark.parametrize(
    ("name", "head", "line"),
    [("a.jsonl", "", '{"text": "text"}\n'), ("a.csv", "text,label\n", "text,x\n"), ("a.txt", "", "text\n")],
)
def test_files_are_read_lazily(name: str, head: str, line: str) -> None:
    Path(name).write_bytes((head + line * 100_000).encode() + b"\xff\n")
    texts = stream_texts(name)
    assert list(islice(texts, 1000)) == ["text"] * 1000
    with pytest.raises(DataError, match="not UTF-8"):
        list(texts)


@pytest.mark.parametrize(
    "source", [["a", "", "b", None, 3, NAN], [], {"body": ["a"]}], ids=["texts", "empty", "missing column"]
)
def test_streaming_raises_the_same_errors_as_reading(source: Source) -> None:
    with pytest.raises(DataError) as read_error:
        read(source)
    with pytest.raises(DataError) as stream_error:
        list(stream_texts(source))
    assert str(stream_error.value) == str(read_error.value)


def test_text_file_has_one_text_per_line() -> None:
    Path("pool.txt").write_bytes('\ufeffone, "two"\r\nthree\u2028four\r\nfive'.encode())
    assert read("pool.txt").texts == ['one, "two"', "three\u2028four", "five"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\r\none,x\r\n\r\n"two\r\nlines",y\r\n'),
        ("a.jsonl", '{"text": "one", "label": "x"}\r\n{"text": "two\\r\\nlines", "label": "y"}\r\n'),
    ],
)
def test_windows_line_endings_and_byte_order_mark(name: str, content: str) -> None:
    Path(name).write_bytes(f"\ufeff{content}".encode())
    rows = read(name, label_column="label")
    assert rows.texts == ["one", "two\r\nlines"]
    assert rows.labels == ["x", "y"]


def test_text_columns_are_joined_by_a_space() -> None:
    columns = {"title": ["Storm", "", "Cup"], "body": ["Roofs gone", "Untitled", " "], "label": ["w", "w", "s"]}
    rows = read(columns, text_column=("title", "body"), label_column="label")
    assert rows.texts == ["Storm Roofs gone", "Untitled", "Cup"]
    assert read(columns, text_column=("body", "title")).texts[0] == "Roofs gone Storm"


def class_labels_in_two_columns() -> Any:
    columns = {"text": datasets.Value("string"), "lang": datasets.ClassLabel(names=["en"])}
    features = datasets.Features({**columns, "labels": datasets.ClassLabel(names=["poor", "good"])})
    return datasets.Dataset.from_dict({"text": ["a", "b"], "lang": [0, 0], "labels": [1, 0]}, features=features)


@pytest.mark.parametrize(
    ("source", "labels", "names"),
    [
        pytest.param([("a", " zebra "), ("b", "ant")], ["zebra", "ant"], ("ant", "zebra"), id="strings"),
        pytest.param([("a", 10), ("b", 2), ("c", -1)], ["10", "2", "-1"], ("-1", "2", "10"), id="integers"),
        pytest.param([("a", "b"), ("b", "10"), ("c", "9")], ["b", "10", "9"], ("9", "10", "b"), id="numbers first"),
        pytest.param({"text": ["a", "b"], "label": [1.0, 0.0]}, ["1", "0"], ("0", "1"), id="integers as floats"),
        pytest.param({"text": ["a", "b"], "label": np.array([1, 0])}, ["1", "0"], ("0", "1"), id="array of integers"),
        pytest.param(class_labels_in_two_columns(), ["good", "poor"], ("poor", "good"), id="column labels"),
    ],
)
def test_label_names_and_their_order(source: Source, labels: list[str], names: tuple[str, ...]) -> None:
    rows = read(source, label_column="label")
    encoded = encode_labels(rows)
    assert rows.labels == labels
    assert encoded.label_names == names
    assert [names[label] for label in encoded.labels] == labels


LABEL_LISTS = [["b", "a"], [" a ", "a"], [], ["c"]]
NAMED = {"text": TEXTS, "labels": LABEL_LISTS}
JOINED = {"text": TEXTS, "label": ["b|a", " a|a ", None, "c"]}
FLAGS = {"text": TEXTS, "b": [1, 0, 0, 0], "a": ["1", " True", "false", "0"], "c": [False, 0.0, np.int64(0), True]}
CHOSEN = {"label_columns": ("b", "a", "c")}


def write_json_lists(name: str) -> str:
    records = [{"text": text, "label": labels} for text, labels in zip(TEXTS, LABEL_LISTS, strict=True)]
    Path(name).write_text("\n".join(map(json.dumps, records)))
    return name


def write_frame(name: str, columns: Any) -> str:
    pd.DataFrame(columns).to_csv(name, index=False)
    return name


def lists_of_class_labels() -> Any:
    labels = datasets.Sequence(datasets.ClassLabel(names=["b", "a", "unused", "c"]))
    features = datasets.Features(text=datasets.Value("string"), labels=labels)
    return datasets.Dataset.from_dict({"text": TEXTS, "labels": [[0, 1], [1, 1], [], [3]]}, features=features)


MULTI_LABEL_SOURCES: dict[str, tuple[Callable[[], Source], dict[str, Any], str]] = {
    "lists in jsonl": (lambda: write_json_lists("a.jsonl"), {}, "abc"),
    "lists in parquet": (lambda: write_parquet("a.parquet", NAMED), {}, "abc"),
    "lists in a data frame": (lambda: pd.DataFrame({**NAMED, "labels": map(np.array, LABEL_LISTS)}), {}, "abc"),
    "pairs": (lambda: list(zip(TEXTS, LABEL_LISTS, strict=True)), {}, "abc"),
    "lists of class labels": (lists_of_class_labels, {}, "bac"),
    "separator": (lambda: JOINED, {"label_separator": "|"}, "abc"),
    "separator in csv": (lambda: write_frame("a.csv", JOINED), {"label_separator": "|"}, "abc"),
    "columns": (lambda: FLAGS, CHOSEN, "bac"),
    "columns in csv": (lambda: write_frame("a.csv", FLAGS), CHOSEN, "bac"),
}


@pytest.mark.parametrize("name", MULTI_LABEL_SOURCES)
def test_read_multi_label_source(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source, options, names = MULTI_LABEL_SOURCES[name]
    data = encode_labels(read(source(), label_column="label", **options))
    assert (data.texts, data.label_names, data.task) == (TEXTS, tuple(names), MULTI_LABEL)
    assert [{names[i] for i in np.flatnonzero(row)} for row in data.labels] == [{"a", "b"}, {"a"}, set(), {"c"}]
    assert f"3 labels ({', '.join(names)}), 1.0 per text, 1 texts without labels in " in caplog.text


@pytest.mark.parametrize(
    ("labels", "separator", "names"),
    [([[10], [2], [-1]], None, ("-1", "2", "10")), (["x", "y", "z"], "|", ("x", "y", "z")), ([1, "2", 3], ", ", "123")],
    ids=["lists", "separator that never occurs", "separator and integers"],
)
def test_one_label_in_each_row_of_a_multi_label_source(labels: Any, separator: str | None, names: Any) -> None:
    rows = read({"text": ["a", "b", "c"], "label": labels}, label_column="label", label_separator=separator)
    data = encode_labels(rows)
    assert (data.label_names, data.task) == (tuple(names), MULTI_LABEL)
    assert data.counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["x", ["x"]], {}, "row 2: expected one label as in the rows before, got a list of labels"),
        ([["x"], "x"], {}, "row 2: expected a list of labels as in the rows before, got one label"),
        ([["x"], None], {}, "row 2: no label"),
        ([["x"], ["x", 1.5]], {}, "row 2: expected a string or an integer as label, got float"),
        ([["x"], ["y", " "]], {}, "row 2: no label"),
        ([["x"], [["y"]]], {}, "row 2: expected a string or an integer as label, got list"),
        (["x|y", "x||y"], {"label_separator": "|"}, "row 2: an empty label in 'x||y'"),
        (["x", "|y"], {"label_separator": "|"}, "use another --label-separator"),
        (["x", 1.5], {"label_separator": "|"}, "row 2: expected a string or an integer as label, got float"),
        (["x", ["y"]], {"label_separator": "|"}, "row 2: expected labels separated by '|' in a string, got a list"),
        ([0, 2], {"label_columns": ["label"]}, "row 2: expected 0 or 1 in 'label', got 2"),
        ([0, None], {"label_columns": ["label"]}, "row 2: expected 0 or 1 in 'label', got None"),
        ([0, 1], {"label_columns": ["label", "other"]}, "the mapping of columns has no column 'other'"),
        ([[1, 0], [0, 0]], {}, "has vectors of 0 and 1 instead of labels"),
        ([[True, False], [False, True]], {}, "has vectors of 0 and 1 instead of labels"),
    ],
    ids=count(),
)
def test_unusable_multi_label_sources_are_rejected(labels: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        read({"text": ["a", "b"], "label": labels}, label_column="label", **options)
    assert message in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("splits", "name", "role", "expected"),
    [
        (("train", "test"), "folder", "train", "train"),
        (("train", "validation", "test"), "folder", "test", "test"),
        (("train", "validation"), "folder", "test", "validation"),
        (("train", "validation"), "folder[train]", "test", "train"),
    ],
)
def test_role_selects_the_split(splits: tuple[str, ...], name: str, role: str, expected: str) -> None:
    datasets.DatasetDict({s: datasets.Dataset.from_dict({"text": [s]}) for s in splits}).save_to_disk("folder")
    assert read(name, role=role).texts == [expected]


MULTILINE_CSV = 'text,label\n"one\ntwo\nthree",x\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", MULTILINE_CSV + '" ",y\n', "a.csv, line 5: the text is empty"),
        ("a.csv", MULTILINE_CSV + "a,b,c\n", "a.csv, line 5: expected 2 fields, got 3"),
        ("a.csv", MULTILINE_CSV + 'ok,x\n"four,x\nfive,y\n', "a.csv, line 6: "),
        ("a.csv", "text,text\n", "a.csv: column 'text' occurs twice"),
        ("a.csv", "text;label\n", "a.csv: expected columns separated by ',', got ';' in the header"),
        ("a.csv", "\n\n", "a.csv is empty"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.csv", "body,label\na,b\n", "a.csv has no column 'text'; it has 'body', 'label'"),
        ("a.csv", b"text,label\n\xc3\xa4,x\n\xff,x\n", "a.csv, line 3: byte 0xff is not UTF-8"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a" 1}\n', "a.jsonl, line 2: not valid"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", "[1]", "a.jsonl, line 1: expected a JSON object, got list"),
        ("a.parquet", "text", "a.parquet is not a valid Parquet file"),
        ("a.txt[train]", "text", "a.txt is a file and has no splits"),
        ("a.md", "text", "Cannot read a.md: extension '.md' is not supported"),
        ("a", "text", "Cannot read a: the file name has no extension"),
        ("a.csv.gz", "text,label\n", "Cannot read a.csv.gz: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(MULTILINE_CSV.encode())[:-9], "Cannot read a.csv.gz: Compressed file ended"),
        ("a.txt.gz", gzip.compress(bytes(70 << 20)), "Cannot read a.txt.gz: it expands to more than 67,108,864"),
        ("a.txt.gz", gzip.compress((b"a" * (1 << 20) + b"\n") * 65), "Cannot read a.txt.gz: it expands to more than"),
        ("missing.csv", None, "No such file: missing.csv"),
        ("./missing", None, "No such file or folder: ./missing"),
        ("x" * 5000, None, "Cannot read 'xxx"),
        ("bundled:x", None, "No such bundled corpus: 'bundled:x'"),
    ],
    ids=count(),
)
def test_errors_in_files_name_file_and_line(name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        Path(name.removesuffix("[train]")).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as error:
        read(name, label_column=None if ".txt" in name else "label")
    assert error.value.message.startswith(message)
    assert error.value.hint


def test_rows_with_label_minus_one_of_declared_labels_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    source = class_label_dataset(["a", "b", "c", "d"], [-1, 1, -1, 0], ["n", "p"])
    rows = read(source, label_column="label")
    assert (rows.texts, rows.labels) == (["b", "d"], ["p", "n"])
    assert "left out 2 rows with the label -1" in caplog.text
    assert read(source).texts == ["a", "b", "c", "d"]
    pairs = read_pairs(source, "text", "text", "label")
    assert (pairs.first, pairs.values) == (["b", "d"], ["p", "n"])
    pair = {"text": ["a"], "label": [["x", "y"]]}
    with pytest.raises(DataError, match="row 1: expected one label, got a list of labels"):
        read_pairs(pair, "text", "text", "label")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"text": ["a"], "label": ["x", "y"]}, "differ in length"),
        ([("a", "x"), "b"], "row 2: expected a (text, label) pair, got 'b'"),
        ([("a", "x"), ("b", 1.5)], "row 2: expected a string or an integer as label, got float"),
        ([("a", "x"), (3, "y")], "row 2: expected a string as text, got int"),
        ([("a", "x"), ("b\ud800", "y")], "row 2: character 2 is an unpaired surrogate"),
        ([("a", " ")], "row 1: no label"),
        ({"text": ["", None, "c", "d", "e"], "label": [NAN] * 5}, "row 3: no label and 2 more"),
        (class_label_dataset(["a"], [-1], ["n", "p"]), "the data set has no labels: all are -1"),
        (pd.DataFrame({"text": [None, NAN], "label": [1, 2]}), "row 1: no text (a missing value); row 2: no text"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "data frame has two columns with the same name"),
        (pd.Series([None]), "row 1: expected a (text, label) pair"),
        (datasets.DatasetDict(x=datasets.Dataset.from_dict({"text": ["a"]})), "has no split 'train'; it has 'x'"),
    ],
    ids=count(),
)
def test_unusable_objects_are_rejected(source: Source, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(source, label_column="label")
    assert message in error.value.message
    assert error.value.hint


def test_unusable_parquet_files_are_rejected() -> None:
    times = pa.array([2**60], pa.timestamp("us"))
    for names, message in ((["text", "text"], "two columns with the same name"), (["text", "time"], "is out of range")):
        pq.write_table(pa.table([["a"], times], names=names), "a.parquet")
        with pytest.raises(DataError, match=message):
            read("a.parquet")


def test_texts_without_labels_are_rejected() -> None:
    with pytest.raises(DataError, match="the list has no labels"):
        encode_labels(read(["a"]))


def test_folder_and_its_splits_are_checked() -> None:
    save_dataset("folder", datasets.Dataset.from_dict(COLUMNS))
    with pytest.raises(DataError, match="folder has no splits"):
        read("folder[train]")
    Path("folder/state.json").unlink()
    with pytest.raises(DataError, match="Cannot read folder "):
        read("folder")


def test_token_ids_are_decoded_unless_there_is_a_text() -> None:
    rows = {"input_ids": [[1, 2], [3]], "labels": ["x", "y"]}
    decoded = read(datasets.Dataset.from_dict(rows), label_column="label", decode=lambda ids: f"tokens {ids}")
    assert (decoded.texts, decoded.labels) == (["tokens [1, 2]", "tokens [3]"], ["x", "y"])
    assert read({**rows, "text": ["a", "b"]}, decode=lambda ids: "decoded").texts == ["a", "b"]


def labeled_set(*rows: tuple[str, str]) -> LabeledSet:
    return encode_labels(read(list(rows), label_column="label"))


def multi_label_set(*labels: str) -> LabeledSet:
    """Create a multi-label set with one text per string, whose characters are its labels."""
    return encode_labels(read([(f"text {i}", list(names)) for i, names in enumerate(labels)], label_column="label"))


def numbered(counts: dict[str, int]) -> LabeledSet:
    """Create a labeled set with ``counts`` texts per class, the classes alternating."""
    rows = [(f"{name} text {i}", name) for name, count in counts.items() for i in range(count)]
    return labeled_set(*sorted(rows, key=lambda row: int(row[0].rsplit(" ", 1)[1])))


BASE = (("alpha one", "a"), ("alpha two", "a"), ("beta one", "b"), ("beta two", "b"))
VARIANTS = ["Straße 2 fin", "STRASSE 2 Fin", "\n Straße \t 2\u00a0 fin ", "Straße \uff12 \ufb01n"]


def test_leak_guard_cleans_labeled_texts_and_pool(caplog: pytest.LogCaptureFixture) -> None:
    evaluation = encode_labels(read([(VARIANTS[0], "a")], label_column="label"), ["a", "b"])
    leaks = [(variant, "b") for variant in VARIANTS]
    data = split_data(labeled_set(*BASE, *leaks), ["pool one", *VARIANTS], {"": evaluation}, DataConfig.of())
    assert data.labeled.texts == [text for text, _ in BASE]
    assert data.pool == ["pool one"]
    assert data.evaluation is evaluation
    assert data.report == DataReport(labeled=4, pool=1, evaluation=1, labeled_leaks=4, pool_leaks=4)
    assert "Leak guard: removed 4 labeled texts that are also in the evaluation set" in caplog.text
    assert "Leak guard: removed 4 pool texts that are also in the evaluation set" in caplog.text


INVISIBLE = "\u00ad\u034f\u061c\u180b\u180e\u200b\u200e\u202e\u2060\u206f\u3164\ufe0f\ufeff\U000e0041\U000e01ef"


@pytest.mark.parametrize("character", INVISIBLE, ids=ascii)
def test_invisible_characters_are_ignored(character: str) -> None:
    assert normalize(f"{character}a caf{character}e{character}\u0301") == normalize("a caf\u00e9")
    with pytest.raises(DataError, match="row 2: the text is empty"):
        read(["a", character * 2])


def test_normalize_replaces_typographic_quotes() -> None:
    assert normalize("‘’‚‛‹›ʼ＇ «say» “so” „now‟") == "'" * 8 + ' "say" "so" "now"'


@pytest.mark.parametrize("text", ["μαΐου", "weiß", "café", "ὑπνώδης", "ﬂood", "ij ǆ"])
def test_normalize_ignores_case_and_composition(text: str) -> None:
    assert {normalize(text.upper()), normalize(text.title()), normalize(unicodedata.normalize("NFD", text))} == {
        normalize(text)
    }


def test_conflicting_labels_and_duplicates_are_removed(caplog: pytest.LogCaptureFixture) -> None:
    rows = (*BASE, ("Alpha  ONE", "a"), ("torn", "a"), ("TORN", "b"), ("torn ", "a"))
    data = split_data(labeled_set(*rows), ["pool", "torn", "POOL"], {}, DataConfig.of())
    assert data.labeled.texts == [text for text, _ in BASE]
    assert data.pool == ["pool", "torn"]
    report = data.report
    assert (report.labeled_duplicates, report.labeled_conflicts, report.pool_duplicates) == (1, 3, 1)
    assert "Removed 3 labeled texts that occur with different labels" in caplog.text


def test_labels_in_another_order_are_no_conflict() -> None:
    rows = [
        ("both", ["a", "b"]),
        ("Both", ["b", "a"]),
        ("torn", ["a"]),
        ("TORN", ["a", "b"]),
        ("none", []),
        ("x", ["a"]),
    ]
    labeled = encode_labels(read([*rows, ("y", ["b"])], label_column="label"))
    data = split_data(labeled, None, {}, DataConfig.of())
    assert data.labeled.texts == ["both", "none", "x", "y"]
    assert (data.report.labeled_duplicates, data.report.labeled_conflicts) == (1, 2)


def test_draw_depends_on_the_seed() -> None:
    labeled = numbered({"a": 30, "b": 30})
    pool = [*(f"pool {i}" for i in range(100)), *map(str.upper, labeled.texts)]

    def draw(seed: int) -> tuple[list[str], list[str]]:
        data = split_data(labeled, pool, {}, DataConfig.of(shots=4, pool_size=20, seed=seed))
        assert (data.report.labeled, data.report.pool, data.report.pool_labeled) == (8, 20, 8)
        return data.labeled.texts, data.pool

    assert draw(5) == draw(5)
    assert all(texts != other_texts for texts, other_texts in zip(draw(5), draw(6), strict=True))


def draw_pool(pool: Sequence[str], pool_size: int | None, *, seed: int = 0) -> list[str]:
    return split_data(labeled_set(*BASE), iter(pool), {}, DataConfig.of(pool_size=pool_size, seed=seed)).pool


POOL = [f"pool {i}" for i in range(60)]


def test_smaller_draw_is_a_subset_of_larger_draw() -> None:
    draws = [draw_pool(POOL, size, seed=2**32 - 1) for size in (2, 7, 30, 59, 60, None)]
    assert [len(draw) for draw in draws] == [2, 7, 30, 59, 60, 60]
    for smaller, larger in pairwise(draws):
        assert set(smaller) <= set(larger)
        assert smaller == [text for text in larger if text in smaller]
    assert draws[-1] == POOL


def test_draw_does_not_depend_on_the_order_of_the_pool() -> None:
    expected = set(draw_pool(POOL, 20))
    for seed in range(5):
        shuffled = random.Random(seed).sample(POOL, len(POOL))
        draw = draw_pool(shuffled, 20)
        assert set(draw) == expected
        assert draw == [text for text in shuffled if text in expected]


def test_all_texts_are_drawn_equally_often() -> None:
    counts = Counter(text for seed in range(400) for text in draw_pool(POOL[:20], 5, seed=seed))
    assert set(counts) == set(POOL[:20])
    assert counts.total() == 2000
    assert 65 < min(counts.values()) <= max(counts.values()) < 135  # 100 ± four standard deviations


def test_first_variant_of_a_text_is_kept() -> None:
    pool = ["Caf\u00e9 one", "CAFE\u0301 ONE", " caf\u00e9\u200b  one", "two", "TWO", "two\t", "\uff54wo", "three"]
    first_variants = ["Caf\u00e9 one", "two", "three"]
    assert draw_pool(pool, None) == first_variants
    assert draw_pool(pool, 2) == draw_pool(first_variants, 2)


def test_warning_if_a_class_or_the_pool_is_too_small(caplog: pytest.LogCaptureFixture) -> None:
    data = split_data(numbered({"large": 9, "small": 3}), ["p", "q"], {}, DataConfig.of(shots=5, pool_size=7))
    assert data.labeled.counts.tolist() == [5, 3]
    assert data.pool == ["p", "q"]
    assert "Class 'small' has only 3 labeled texts, expected 5: using all of them." in caplog.messages
    assert "The pool has only 2 texts, expected 7" in caplog.text


def test_evaluation_labels_are_mapped_by_name() -> None:
    labeled = class_label_dataset(["a1", "a2", "b1", "b2"], [0, 0, 1, 1], ["poor", "good"])
    evaluation = class_label_dataset(["e1", "e2", "e3"], [0, 1, 1], ["good", "poor"])
    data = load_run_data(DataConfig.of(), labeled=labeled, unlabeled=["pool"], eval=evaluation)
    assert data.labeled.label_names == ("poor", "good")
    assert data.evaluation is not None
    assert data.evaluation.label_names == ("poor", "good")
    assert data.evaluation.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (BASE[:2], "only one class: 'a'"),
        ((*BASE[:3], ("BETA ONE", "b")), "label 'b', got 1"),
        ((*BASE[:2], ("leak", "b"), ("LEAK", "b")), "label 'b', got 0"),
    ],
    ids=["one class", "one text and a duplicate", "only leaks"],
)
def test_too_few_labeled_texts_are_rejected(rows: Sequence[tuple[str, str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_run_data(DataConfig.of(), labeled=list(rows), unlabeled=["pool"], eval=[("leak", "a")])


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ({"labeled": BASE, "unlabeled": ["ALPHA ONE", "held"], "eval": [("held", "a")]}, DataError, "pool is empty"),
        ({"labeled": BASE, "eval": [("x", "d"), ("y", "c")]}, DataError, "set: 'c', 'd'; expected one of 'a', 'b'"),
        ({}, ConfigError, "Labeled texts are required"),
        ({"labeled": "a.csv", "eval": "a.csv"}, ConfigError, "cannot be both the labeled texts and the evaluation set"),
    ],
)
def test_unusable_combinations_are_rejected(sources: dict[str, Any], error: type[Exception], message: str) -> None:
    write_delimited("a.csv", ",")
    with pytest.raises(error, match=message):
        load_run_data(DataConfig.of(), **sources)


@pytest.mark.parametrize(
    ("labeled", "evaluation", "message"),
    [
        (list("abab"), [["a"]], "is multi-label; expected single-label"),
        ([["a"], ["b"], ["a", "b"], []], ["a"], "is single-label; expected multi-label"),
        ([["a"], ["b"], ["a", "b"], []], [["c"]], "set: 'c'; expected one of 'a', 'b'"),
    ],
)
def test_evaluation_set_must_have_the_labels_of_the_training_set(labeled: Any, evaluation: Any, message: str) -> None:
    train = [(f"text {i}", labels) for i, labels in enumerate(labeled)]
    with pytest.raises(DataError, match=message):
        load_run_data(DataConfig.of(), labeled=train, eval=[("held out", labels) for labels in evaluation])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("a", "a", ""), "has only one label: 'a'"),
        (("", "", ""), "no text has a label"),
        (("ab", "ab", "a"), "all texts have the label 'a'"),
        (("a", "ab", ""), "expected at least two texts with the label 'b', got 1"),
    ],
)
def test_labels_that_cannot_be_learned_are_rejected(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_classes(multi_label_set(*labels))


def test_label_columns_and_separator_cannot_be_combined() -> None:
    with pytest.raises(ConfigError, match="label_columns: cannot be combined with label_separator"):
        DataConfig.of(label_columns="a,b", label_separator="|")


def test_pool_is_optional(caplog: pytest.LogCaptureFixture) -> None:
    assert load_run_data(DataConfig.of(), labeled=BASE).pool == []
    assert "no unlabeled texts" in caplog.text


@PROPERTY
@given(st.text())
@example("\u03aa\u0301")
@example("\xdf\u0301")
@example("\u0130\u0327")
@example("\u0149")
@example("\ufffa\u1100\u3164\u1161")
def test_normalize_is_idempotent(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@PROPERTY
@given(st.text(st.characters(max_codepoint=127)))
@example("A\tB\r\n\x1c c\x00 ")
def test_ascii_shortcut_of_normalize_gives_the_same_result(text: str) -> None:
    assert normalize(text) == normalize(text + " \u00e9").removesuffix("\u00e9").rstrip(" ")


@PROPERTY
@given(
    labels=st.lists(st.integers(0, 3), max_size=30), shots=st.none() | st.integers(2, 6), seed=st.integers(0, 2**32 - 1)
)
def test_draw_shots_draws_at_most_shots_per_class(labels: list[int], shots: int | None, seed: int) -> None:
    labels = labels + [0, 1, 2, 3] * 2
    texts = [f"text {i}" for i in range(len(labels))]
    source = LabeledSet(texts, np.array(labels, np.int64), ("a", "b", "c", "d"))
    draw = draw_shots(source, shots, seed=seed)
    max_count = len(source) if shots is None else shots
    assert draw.counts.tolist() == [min(max_count, count) for count in source.counts.tolist()]
    rows = [texts.index(text) for text in draw.texts]
    assert rows == sorted(set(rows))
    assert draw.labels.tolist() == [labels[row] for row in rows]
    rng = np.random.default_rng([seed, 0])  # must not change, so that the same seed draws the same texts
    permutations = [rng.permutation(np.flatnonzero(source.labels == label)) for label in range(4)]
    assert rows == sorted(np.concatenate([permutation[:max_count] for permutation in permutations]).tolist())


@PROPERTY
@given(labels=st.lists(st.sets(st.sampled_from("abc")), max_size=30), shots=st.integers(2, 6), seed=st.integers(0, 9))
def test_draw_shots_of_a_multi_label_set(labels: list[set[str]], shots: int, seed: int) -> None:
    source = multi_label_set(*"aabbcc", *map("".join, labels), *[""] * 9)
    draw = draw_shots(source, shots, seed=seed)
    assert all(draw.counts >= np.minimum(source.counts, shots))
    assert (~draw.labels.any(axis=1)).sum() == shots
    assert len(draw) <= 4 * shots
    rows = [source.texts.index(text) for text in draw.texts]
    assert rows == sorted(set(rows))
    assert np.array_equal(draw.labels, source.labels[rows])
    assert draw.texts == draw_shots(source, shots, seed=seed).texts


def test_texts_drawn_for_a_rare_label_count_for_its_other_labels() -> None:
    source = multi_label_set(*["ab"] * 3, *["b"] * 9, *[""] * 9)
    assert draw_shots(source, 3, seed=0).texts[:3] == ["text 0", "text 1", "text 2"]
    assert draw_shots(source, 3, seed=0).counts.tolist() == [3, 3]
    assert draw_shots(source, 5, seed=0).counts.tolist() == [3, 5]


SOME_TEXT = st.builds(str.format, st.sampled_from(["text {}", "TEXT {}", "  text \n {}\t"]), st.integers(0, 12))


@PROPERTY
@given(
    labeled=st.lists(st.tuples(SOME_TEXT, st.sampled_from("ab"))),
    pool=st.lists(SOME_TEXT),
    evaluation=st.lists(st.tuples(SOME_TEXT, st.sampled_from("ab"))),
    shots=st.none() | st.integers(2, 4),
    pool_size=st.none() | st.integers(2, 10),
)
def test_labeled_texts_pool_and_evaluation_set_are_disjoint(
    labeled: list[tuple[str, str]],
    pool: list[str],
    evaluation: list[tuple[str, str]],
    shots: int | None,
    pool_size: int | None,
) -> None:
    pool = [*pool, "pool anchor"]
    held_out = labeled_set(*evaluation, ("eval anchor", "a"), ("eval anchor 2", "b"))
    source = labeled_set(*labeled, *BASE)
    data = split_data(source, pool, {"": held_out}, DataConfig.of(shots=shots, pool_size=pool_size))

    eval_keys = {normalize(text) for text in held_out.texts}
    shot_keys = [normalize(text) for text in data.labeled.texts]
    pool_keys = [normalize(text) for text in data.pool]
    keys = [*eval_keys, *shot_keys, *pool_keys]
    assert len(set(keys)) == len(keys)
    assert set(data.pool) <= set(pool)
    rest = {normalize(text) for text in pool} - eval_keys - set(shot_keys)
    assert len(data.pool) == min(len(rest), pool_size or len(rest))
    report = data.report
    assert len(rest) + report.pool_leaks + report.pool_labeled + report.pool_duplicates == len(pool)
