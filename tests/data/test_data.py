"""Tests of reading data sources, drawing samples, and the leak guard."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
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
from setfit_kd.data.labeled_set import LabeledSet, draw_shots, encode_labels
from setfit_kd.data.sources import Source, read, stream_texts
from setfit_kd.data.splits import DataReport, normalize, split_data
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.run.inputs import load_run_data

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


def compress(name: str) -> str:
    Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    return f"{name}.gz"


def write_jsonl(name: str) -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n\n" for record in RECORDS), encoding="utf-8")
    return name


def write_parquet(name: str) -> str:
    pq.write_table(pa.table(COLUMNS), name)
    return name


def save_dataset(name: str, data: Any) -> str:
    data.save_to_disk(name)
    return name


def save_splits() -> str:
    train = datasets.Dataset.from_dict({"text": ["other text"], "label": ["World"]})
    return save_dataset("folder", datasets.DatasetDict(train=train, dev=datasets.Dataset.from_dict(COLUMNS)))


SOURCES: dict[str, Callable[[], Source]] = {
    "csv": lambda: write_delimited("a.csv", ","),
    "tsv": lambda: write_delimited("a.tsv", "\t"),
    "upper-case extension": lambda: write_delimited("A.CSV", ","),
    "jsonl": lambda: write_jsonl("a.jsonl"),
    "compressed csv": lambda: compress(write_delimited("a.csv", ",")),
    "compressed jsonl": lambda: compress(write_jsonl("a.ndjson")),
    "parquet": lambda: write_parquet("a.parquet"),
    "path object": lambda: Path(write_delimited("a.csv", ",")),
    "folder": lambda: save_dataset("folder", datasets.Dataset.from_dict(COLUMNS)),
    "folder with splits": lambda: save_dataset(
        "folder", datasets.DatasetDict(train=datasets.Dataset.from_dict(COLUMNS))
    ),
    "folder[split]": lambda: save_splits() + "[dev]",
    "dataset": lambda: datasets.Dataset.from_dict(COLUMNS),
    "dataset with class labels": lambda: class_label_dataset(TEXTS, [0, 1, 1, 0], ["Sports", "World"]),
    "data frame": lambda: pd.DataFrame(COLUMNS, index=[3, 3, 1, 0]),
    "columns": lambda: COLUMNS,
    "columns of arrays": lambda: {"text": np.array(TEXTS), "label": np.array(LABELS)},
    "pairs": lambda: list(zip(TEXTS, LABELS, strict=True)),
    "mappings": lambda: RECORDS,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_read_source_with_labels(source: Callable[[], Source]) -> None:
    rows = read(source(), label_column="label")
    assert rows.texts == TEXTS
    assert rows.labels == LABELS
    assert rows.label_names == ("Sports", "World")


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "pairs"])
def test_read_or_stream_texts(name: str) -> None:
    rows = read(SOURCES[name]())
    assert (rows.texts, rows.labels) == (TEXTS, None)
    assert list(stream_texts(SOURCES[name]())) == TEXTS


@pytest.mark.parametrize(
    ("name", "head", "line"),
    [
        ("a.jsonl", "", '{"text": "text"}\n'),
        ("a.csv", "text,label\n", "text,x\n"),
        ("a.txt", "", "text\n"),
    ],
)
def test_files_are_read_lazily(name: str, head: str, line: str) -> None:
    Path(name).write_bytes((head + line * 100_000).encode() + b"\xff\n")
    texts = stream_texts(name)
    assert list(islice(texts, 1000)) == ["text"] * 1000
    with pytest.raises(DataError, match="not UTF-8"):
        list(texts)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(["a", "", "b", None, 3, float("nan")], id="list"),
        pytest.param([], id="empty"),
        pytest.param({"body": ["a"]}, id="missing column"),
        pytest.param("a.jsonl", id="rows of a file"),
    ],
)
def test_streaming_raises_the_same_errors_as_reading(source: Source) -> None:
    Path("a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n{"text": null}\n')
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
        ("a.tsv", 'text\tlabel\r\none\tx\r\n"two\r\nlines"\ty\r\n'),
        ("a.jsonl", '{"text": "one", "label": "x"}\r\n{"text": "two\\r\\nlines", "label": "y"}\r\n'),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no byte order mark", "byte order mark"])
def test_windows_line_endings_and_byte_order_mark(name: str, content: str, mark: str) -> None:
    Path(name).write_bytes((mark + content).encode())
    rows = read(name, label_column="label")
    assert rows.texts == ["one", "two\r\nlines"]
    assert rows.labels == ["x", "y"]


def test_text_columns_are_joined_by_a_space() -> None:
    columns = {"title": ["Storm", "", "Cup"], "body": ["Roofs gone", "Untitled", " "], "label": ["w", "w", "s"]}
    rows = read(columns, text_column=("title", "body"), label_column="label")
    assert rows.texts == ["Storm Roofs gone", "Untitled", "Cup"]
    assert read(columns, text_column=("body", "title")).texts[0] == "Roofs gone Storm"


def class_labels_in_two_columns(label: str) -> Any:
    names = datasets.ClassLabel(names=["poor", "good"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "lang": datasets.ClassLabel(names=["en"]), label: names}
    )
    return datasets.Dataset.from_dict({"text": ["a", "b"], "lang": [0, 0], label: [1, 0]}, features=features)


@pytest.mark.parametrize(
    ("source", "labels", "names"),
    [
        pytest.param([("a", "zebra"), ("b", "ant")], ["zebra", "ant"], ("ant", "zebra"), id="strings sorted"),
        pytest.param([("a", " ant "), ("b", "bee")], ["ant", "bee"], ("ant", "bee"), id="strings stripped"),
        pytest.param([("a", 10), ("b", 2), ("c", -1)], ["10", "2", "-1"], ("-1", "2", "10"), id="integers"),
        pytest.param([("a", "b"), ("b", "10"), ("c", "9")], ["b", "10", "9"], ("9", "10", "b"), id="numbers first"),
        pytest.param({"text": ["a", "b"], "label": [1.0, 0.0]}, ["1", "0"], ("0", "1"), id="integers as floats"),
        pytest.param({"text": ["a", "b"], "label": np.array([1, 0])}, ["1", "0"], ("0", "1"), id="array of integers"),
        pytest.param(class_labels_in_two_columns("label"), ["good", "poor"], ("poor", "good"), id="class labels"),
        pytest.param(class_labels_in_two_columns("labels"), ["good", "poor"], ("poor", "good"), id="column labels"),
    ],
)
def test_label_names_and_their_order(source: Source, labels: list[str], names: tuple[str, ...]) -> None:
    rows = read(source, label_column="label")
    encoded = encode_labels(rows)
    assert rows.labels == labels
    assert encoded.label_names == names
    assert [names[label] for label in encoded.labels] == labels


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
    save_dataset(
        "folder", datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": [split]}) for split in splits})
    )
    assert read(name, role=role).texts == [expected]


def test_bundled_corpus_has_disjoint_splits() -> None:
    train, test = read("bundled:newswire"), read("bundled:newswire", role="test")
    assert not {normalize(text) for text in train.texts} & {normalize(text) for text in test.texts}


MULTILINE_CSV = 'text,label\n"one\ntwo\nthree",x\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", MULTILINE_CSV + '" ",y\n', "a.csv, line 5: the text is empty"),
        ("a.csv", MULTILINE_CSV + "\nfour,\n", "a.csv, line 6: no label"),
        ("a.csv", MULTILINE_CSV + "a,b,c\n", "a.csv, line 5: expected 2 fields, got 3"),
        ("a.csv", MULTILINE_CSV + 'ok,x\n"four,x\nfive,y\n', "a.csv, line 6: "),
        ("a.csv", MULTILINE_CSV.replace("\n", "\r\n") + ",x\r\n", "a.csv, line 5: "),
        ("a.csv", 'text,label,"a\nb"\n,x,y\n', "a.csv, line 3: "),
        ("a.csv", "text,text\n", "a.csv: column 'text' occurs twice"),
        ("a.csv", "text;label\n", "a.csv: expected columns separated by ',', got ';' in the header"),
        ("a.csv", "\n\n", "a.csv is empty"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.csv", "body,label\na,b\n", "a.csv has no column 'text'; it has 'body', 'label'"),
        ("a.csv", b"text,label\n\xc3\xa4,x\n\xff,x\n", "a.csv, line 3: byte 0xff is not UTF-8"),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "", "label": 1}\n', "a.jsonl, line 3"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a" 1}\n', "a.jsonl, line 2: not valid"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", "[1]", "a.jsonl, line 1: expected a JSON object, got list"),
        ("a.parquet", "text", "a.parquet is not a valid Parquet file"),
        ("a.txt[train]", "text", "a.txt is a file and has no splits"),
        ("a.md", "text", "Cannot read a.md: extension '.md' is not supported"),
        ("a", "text", "Cannot read a: the file name has no extension"),
        ("a.parquet.gz", "text", "Cannot read a.parquet.gz: extension '.gz' is not supported"),
        ("a.csv.gz", "text,label\n", "Cannot read a.csv.gz: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(MULTILINE_CSV.encode())[:-9], "Cannot read a.csv.gz: Compressed file ended"),
        ("a.csv.gz", gzip.compress(b"text,label\na,b,c\n"), "a.csv.gz, line 2: expected 2 fields, got 3"),
        ("a.txt.gz", gzip.compress(bytes(70 << 20)), "Cannot read a.txt.gz: it expands to more than 67,108,864"),
        (
            "a.txt.gz",
            gzip.compress((b"a" * (1 << 20) + b"\n") * 65),
            "Cannot read a.txt.gz: it expands to more than 67,108,864",
        ),
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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"text": ["a"], "label": ["x", "y"]}, "differ in length"),
        ([("a", "x"), "b"], "row 2: expected a (text, label) pair, got 'b'"),
        ([("a", "x"), ("b", 1.5)], "row 2: expected a string or an integer as label, got float"),
        ([("a", "x"), (3, "y")], "row 2: expected a string as text, got int"),
        ([("a", "x"), ("b\ud800", "y")], "row 2: character 2 is an unpaired surrogate"),
        ([("a", " ")], "row 1: no label"),
        ([("", "x")] * 10, "row 1: the text is empty; row 2: the text is empty; row 3: the text is empty and 7 more"),
        ({"body": ["a"], "label": ["x"]}, "no column 'text'; it has 'body', 'label'"),
        (
            {"text": ["a", None, "c"], "label": ["x", "y", NAN]},
            "mapping of columns, row 2: no text (a missing value); row 3",
        ),
        ([], "the list has no rows"),
        (class_label_dataset(["a"], [-1], ["n", "p"]), "row 1: the label must be between 0 and 1, got -1"),
        (
            pd.DataFrame({"text": ["a", None, NAN], "label": [1, 2, 3]}),
            "the data frame, row 2: no text (a missing value); row 3",
        ),
        (pd.DataFrame({"text": ["a", "b"], "label": [1, None]}), "the data frame, row 2: no label"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "data frame has two columns with the same name"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "the data set has no column 'label'; it has 'text'"),
        (datasets.DatasetDict(x=datasets.Dataset.from_dict({"text": ["a"]})), "has no split 'train'; it has 'x'"),
    ],
    ids=count(),
)
def test_unusable_objects_are_rejected(source: Source, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(source, label_column="label")
    assert message in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table([["a"], ["b"]], names=["text", "text"]), "has two columns with the same name"),
        (pa.table({"text": ["a"], "date": pa.array([2**60], pa.timestamp("us"))}), "a date or time is out of range"),
    ],
)
def test_unusable_parquet_files_are_rejected(table: Any, message: str) -> None:
    pq.write_table(table, "a.parquet")
    with pytest.raises(DataError, match=message):
        read("a.parquet")
    with pytest.raises(DataError, match="the list has no labels"):
        encode_labels(read(["a"]))


def test_files_are_checked_without_heavy_libraries() -> None:
    Path("a.csv").write_text("text,label\na,b\n")
    code = (
        "import sys; from setfit_kd.data.sources import read; read('a.csv', label_column='label'); print(*sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "datasets", "pandas", "pyarrow", "numpy"} & set(process.stdout.split())


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


def numbered(counts: dict[str, int]) -> LabeledSet:
    """Create a labeled set with ``counts`` texts per class, the classes alternating."""
    rows = [(f"{name} text {i}", name) for name, count in counts.items() for i in range(count)]
    return labeled_set(*sorted(rows, key=lambda row: int(row[0].rsplit(" ", 1)[1])))


BASE = (("alpha one", "a"), ("alpha two", "a"), ("beta one", "b"), ("beta two", "b"))
VARIANTS = {
    "exact": "Straße 2 fin",
    "case": "STRASSE 2 Fin",
    "white space": "\n Straße \t 2\u00a0 fin ",
    "compatibility forms": "Straße \uff12 \ufb01n",
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_leak_guard_cleans_labeled_texts_and_pool(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    evaluation = encode_labels(read([("Straße 2 fin", "a")], label_column="label"), ["a", "b"])
    data = split_data(labeled_set(*BASE, (variant, "b")), ["pool one", variant, variant], evaluation, DataConfig.of())
    assert data.labeled.texts == [text for text, _ in BASE]
    assert data.pool == ["pool one"]
    assert data.evaluation is evaluation
    removed = {"labeled_leaks": 1, "pool_leaks": 2}
    assert data.report == DataReport(labeled=4, pool=1, evaluation=1, **removed)
    assert "Leak guard: removed 1 labeled texts that are also in the evaluation set" in caplog.text
    assert "Leak guard: removed 2 pool texts that are also in the evaluation set" in caplog.text


INVISIBLE = "\u00ad\u034f\u061c\u180b\u180e\u200b\u200e\u202e\u2060\u206f\u3164\ufe0f\ufeff\U000e0041\U000e01ef"


@pytest.mark.parametrize("character", INVISIBLE, ids=ascii)
def test_invisible_characters_are_ignored(character: str) -> None:
    assert normalize(f"{character}a caf{character}e{character}\u0301") == normalize("a caf\u00e9")
    with pytest.raises(DataError, match="row 2: the text is empty"):
        read(["a", character * 2])


@pytest.mark.parametrize("quote", "‘’‚‛‹›ʼ＇")
def test_normalize_replaces_typographic_quotes(quote: str) -> None:
    assert normalize(f"Don{quote}t «say» “so” „now‟") == 'don\'t "say" "so" "now"'


@pytest.mark.parametrize("text", ["μαΐου", "weiß", "café", "ὑπνώδης", "ﬂood", "ij ǆ"])
@pytest.mark.parametrize("change", [str.upper, str.title, lambda text: unicodedata.normalize("NFD", text)])
def test_normalize_ignores_case_and_composition(text: str, change: Callable[[str], str]) -> None:
    assert normalize(change(text)) == normalize(text)


def test_conflicting_labels_and_duplicates_are_removed(caplog: pytest.LogCaptureFixture) -> None:
    rows = (*BASE, ("Alpha  ONE", "a"), ("torn", "a"), ("TORN", "b"), ("torn ", "a"))
    data = split_data(labeled_set(*rows), ["pool", "torn", "POOL"], None, DataConfig.of())
    assert data.labeled.texts == [text for text, _ in BASE]
    assert data.pool == ["pool", "torn"]
    report = data.report
    assert (report.labeled_duplicates, report.labeled_conflicts, report.pool_duplicates) == (1, 3, 1)
    assert "Removed 3 labeled texts that occur with different labels" in caplog.text


def test_draw_depends_on_the_seed() -> None:
    labeled = numbered({"a": 30, "b": 30})
    pool = [*(f"pool {i}" for i in range(100)), *map(str.upper, labeled.texts)]

    def draw(seed: int) -> tuple[list[str], list[str]]:
        data = split_data(labeled, pool, None, DataConfig.of(shots=4, pool_size=20, seed=seed))
        assert (data.report.labeled, data.report.pool, data.report.pool_labeled) == (8, 20, 8)
        return data.labeled.texts, data.pool

    assert draw(5) == draw(5)
    assert all(texts != other_texts for texts, other_texts in zip(draw(5), draw(6), strict=True))


def draw_pool(pool: Sequence[str], pool_size: int | None, *, seed: int = 0) -> list[str]:
    return split_data(labeled_set(*BASE), iter(pool), None, DataConfig.of(pool_size=pool_size, seed=seed)).pool


POOL = [f"pool {i}" for i in range(60)]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_smaller_draw_is_a_subset_of_larger_draw(seed: int) -> None:
    draws = [draw_pool(POOL, size, seed=seed) for size in (2, 7, 30, 59, 60, None)]
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


@pytest.mark.parametrize("pool_size", [None, 2])
def test_variants_of_a_text_count_as_duplicates(pool_size: int | None) -> None:
    pool = ["Caf\u00e9 one", "CAFE\u0301 ONE", " caf\u00e9\u200b  one", "two", "TWO", "two\t", "\uff54wo", "three"]
    config = DataConfig.of(pool_size=pool_size)
    data = split_data(labeled_set(*BASE), pool, None, config)
    assert data.report.pool_duplicates == 5
    first_variants = ["Caf\u00e9 one", "two", "three"]
    assert data.pool == first_variants if pool_size is None else len(data.pool) == 2
    assert set(data.pool) <= set(first_variants)
    assert data.pool == split_data(labeled_set(*BASE), first_variants, None, config).pool


def test_warning_if_a_class_has_too_few_texts(caplog: pytest.LogCaptureFixture) -> None:
    data = split_data(numbered({"large": 9, "small": 3}), ["pool"], None, DataConfig.of(shots=5))
    assert data.labeled.counts.tolist() == [5, 3]
    assert caplog.messages[0] == "Class 'small' has only 3 labeled texts, expected 5: using all of them."


def test_warning_if_the_pool_is_too_small(caplog: pytest.LogCaptureFixture) -> None:
    data = split_data(numbered({"a": 2, "b": 2}), ["p", "q"], None, DataConfig.of(pool_size=7))
    assert data.pool == ["p", "q"]
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
        pytest.param(BASE[:2], "only one class: 'a'", id="one class"),
        pytest.param(BASE[:3], "label 'b', got 1", id="one text"),
        pytest.param((*BASE[:3], ("BETA ONE", "b")), "label 'b', got 1", id="one text and a duplicate"),
        pytest.param((*BASE[:2], ("leak", "b"), ("LEAK", "b")), "label 'b', got 0", id="only leaks"),
    ],
)
def test_too_few_labeled_texts_are_rejected(rows: Sequence[tuple[str, str]], message: str) -> None:
    with pytest.raises(DataError) as error:
        load_run_data(DataConfig.of(), labeled=list(rows), unlabeled=["pool"], eval=[("leak", "a")])
    assert message in error.value.message


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (
            {"labeled": BASE, "unlabeled": ["ALPHA ONE", "held out"], "eval": [("held out", "a")]},
            DataError,
            "pool is empty",
        ),
        (
            {"labeled": BASE, "eval": [("x", "d"), ("y", "c"), ("z", "a")]},
            DataError,
            "training set: 'c', 'd'; expected one of 'a', 'b'",
        ),
        ({}, ConfigError, "Labeled texts are required"),
        ({"labeled": "a.csv", "eval": "a.csv"}, ConfigError, "cannot be both the labeled texts and the evaluation set"),
    ],
)
def test_unusable_combinations_are_rejected(sources: dict[str, Any], error: type[Exception], message: str) -> None:
    write_delimited("a.csv", ",")
    with pytest.raises(error, match=message):
        load_run_data(DataConfig.of(), **sources)


def test_pool_is_optional(caplog: pytest.LogCaptureFixture) -> None:
    data = load_run_data(DataConfig.of(), labeled=BASE)
    assert data.pool == []
    assert data.labeled.texts == [text for text, _ in BASE]
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


REWRITES: tuple[Callable[[str], str], ...] = (
    str,
    str.upper,
    lambda text: f"  {text}\t",
    lambda text: text.replace(" ", " \n "),
    lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
)
SOME_TEXT = st.builds(lambda number, rewrite: rewrite(f"text {number}"), st.integers(0, 12), st.sampled_from(REWRITES))


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
    data = split_data(source, pool, held_out, DataConfig.of(shots=shots, pool_size=pool_size))

    eval_keys = {normalize(text) for text in held_out.texts}
    shot_keys = [normalize(text) for text in data.labeled.texts]
    pool_keys = [normalize(text) for text in data.pool]
    assert len(set(shot_keys)) == len(shot_keys)
    assert len(set(pool_keys)) == len(pool_keys)
    assert not eval_keys & set(shot_keys)
    assert not set(pool_keys) & (eval_keys | set(shot_keys))
    assert set(data.pool) <= set(pool)
    rest = {normalize(text) for text in pool} - eval_keys - set(shot_keys)
    assert len(data.pool) == min(len(rest), pool_size or len(rest))
    report = data.report
    assert len(rest) + report.pool_leaks + report.pool_labeled + report.pool_duplicates == len(pool)
