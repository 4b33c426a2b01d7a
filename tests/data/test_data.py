"""Tests of reading data sources, drawing samples, and the leak guard."""

from __future__ import annotations

import csv
import json
import logging
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from setfit_kd.config.stages import DataConfig
from setfit_kd.data.labeled_set import LabeledSet, draw_shots, encode_labels
from setfit_kd.data.sources import Source, read, stream_texts
from setfit_kd.data.splits import DataSplits, normalize, split_data
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.run.data import load_run_data

TEXTS = ["Rain stops play", 'She said: "no,\tnever"', "Two lines\nof café", "x" * 200_000]
LABELS = ["Sports", "World", "World", "Sports"]
COLUMNS = {"text": TEXTS, "label": LABELS}
RECORDS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)


def class_label_dataset(texts: Sequence[str], labels: Sequence[int], names: Sequence[str]) -> Any:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
    return datasets.Dataset.from_dict({"text": list(texts), "label": list(labels)}, features=features)


def write_delimited(name: str, delimiter: str) -> str:
    with Path(name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("label", "text"), *zip(LABELS, TEXTS, strict=True)])
    return name


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
    "ndjson": lambda: write_jsonl("a.ndjson"),
    "parquet": lambda: write_parquet("a.parquet"),
    "path object": lambda: Path(write_delimited("a.csv", ",")),
    "folder": lambda: save_dataset("folder", datasets.Dataset.from_dict(COLUMNS)),
    "folder with splits": lambda: save_dataset(
        "folder", datasets.DatasetDict(train=datasets.Dataset.from_dict(COLUMNS))
    ),
    "folder[split]": lambda: save_splits() + "[dev]",
    "dataset": lambda: datasets.Dataset.from_dict(COLUMNS),
    "dataset with class labels": lambda: class_label_dataset(TEXTS, [0, 1, 1, 0], ["Sports", "World"]),
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
def test_read_source_without_labels(name: str) -> None:
    rows = read(SOURCES[name]())
    assert rows.texts == TEXTS
    assert rows.labels is None


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "pairs"])
def test_stream_source(name: str) -> None:
    assert list(stream_texts(SOURCES[name]())) == TEXTS


class FailingList(Sequence[str]):
    """A list that fails at its fourth text."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, row: Any) -> Any:
        if row >= 3:
            raise RuntimeError(f"cannot read row {row}")
        return f"text {row}"


class FailingDataset:
    """A data set that fails at its fourth row."""

    column_names = ("text",)

    def __iter__(self) -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in FailingList())


@pytest.mark.parametrize(
    "source",
    [FailingList(), {"text": FailingList()}, FailingDataset()],
    ids=["list", "columns", "data set"],
)
def test_stream_yields_the_texts_before_a_failure(source: Any) -> None:
    texts = stream_texts(source)
    assert list(islice(texts, 3)) == ["text 0", "text 1", "text 2"]
    with pytest.raises(RuntimeError, match="row 3"):
        next(texts)


@pytest.mark.parametrize(
    ("name", "head", "line"),
    [
        ("a.jsonl", "", '{"text": "text"}\n'),
        ("a.csv", "text,label\n", "text,x\n"),
        ("a.tsv", "text\tlabel\n", "text\tx\n"),
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
        pytest.param({"text": ["a", "\ud800", " "]}, id="columns"),
        pytest.param([""] * 10, id="many"),
        pytest.param([], id="empty"),
        pytest.param({"body": ["a"]}, id="missing column"),
        pytest.param("a.jsonl", id="rows of a file"),
        pytest.param("nowhere.csv", id="missing file"),
        pytest.param("notes.md", id="unsupported extension"),
    ],
)
def test_streaming_raises_the_same_errors_as_reading(source: Source) -> None:
    Path("a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n{"text": null}\n')
    Path("notes.md").write_text("notes")
    with pytest.raises(DataError) as read_error:
        read(source)
    with pytest.raises(DataError) as stream_error:
        list(stream_texts(source))
    assert str(stream_error.value) == str(read_error.value)


def test_stream_reports_unusable_rows_at_the_end() -> None:
    texts = stream_texts(["a", "", "b", None, "c"])
    assert list(islice(texts, 3)) == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"row 2: the text is empty; row 4: no text"):
        next(texts)


def test_text_file_has_one_text_per_line() -> None:
    Path("pool.txt").write_bytes('\ufeffone, "two"\r\nthree\u2028four\r\nfive'.encode())
    assert read("pool.txt").texts == ['one, "two"', "three\u2028four", "five"]


def test_list_of_texts_is_a_pool() -> None:
    assert read(["a", "b"]).texts == ["a", "b"]


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


def two_class_label_columns() -> Any:
    features = datasets.Features(
        text=datasets.Value("string"),
        lang=datasets.ClassLabel(names=["en", "de"]),
        label=datasets.ClassLabel(names=["poor", "good"]),
    )
    return datasets.Dataset.from_dict({"text": ["a", "b"], "lang": [0, 0], "label": [1, 0]}, features=features)


def class_labels_in_other_column() -> Any:
    features = datasets.Features(
        text=datasets.Value("string"), lang=datasets.ClassLabel(names=["en", "de"]), label=datasets.Value("string")
    )
    return datasets.Dataset.from_dict({"text": ["a", "b"], "lang": [0, 1], "label": ["y", "x"]}, features=features)


@pytest.mark.parametrize(
    ("source", "labels", "names"),
    [
        pytest.param([("a", "zebra"), ("b", "ant")], ["zebra", "ant"], ("ant", "zebra"), id="strings sorted"),
        pytest.param([("a", " ant "), ("b", "bee")], ["ant", "bee"], ("ant", "bee"), id="strings stripped"),
        pytest.param([("a", 10), ("b", 2), ("c", -1)], ["10", "2", "-1"], ("-1", "2", "10"), id="integers"),
        pytest.param([("a", "10"), ("b", "2")], ["10", "2"], ("2", "10"), id="integers as strings"),
        pytest.param([("a", "b"), ("b", "10"), ("c", "9")], ["b", "10", "9"], ("9", "10", "b"), id="numbers first"),
        pytest.param({"text": ["a", "b"], "label": [1.0, 0.0]}, ["1", "0"], ("0", "1"), id="integers as floats"),
        pytest.param({"text": ["a", "b"], "label": np.array([1, 0])}, ["1", "0"], ("0", "1"), id="array of integers"),
        pytest.param(
            class_label_dataset(["a", "b"], [1, 0], ["poor", "good"]),
            ["good", "poor"],
            ("poor", "good"),
            id="class labels",
        ),
        pytest.param(two_class_label_columns(), ["good", "poor"], ("poor", "good"), id="two columns of class labels"),
        pytest.param(class_labels_in_other_column(), ["y", "x"], ("x", "y"), id="class labels in another column"),
    ],
)
def test_label_names_and_their_order(source: Source, labels: list[str], names: tuple[str, ...]) -> None:
    rows = read(source, label_column="label")
    encoded = encode_labels(rows)
    assert rows.labels == labels
    assert encoded.label_names == names
    assert [names[label] for label in encoded.labels] == labels


def test_declared_labels_without_texts_are_ignored() -> None:
    rows = read(class_label_dataset(["a", "b"], [2, 0], ["poor", "fair", "good"]), label_column="label")
    assert encode_labels(rows).label_names == ("poor", "good")


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


def test_bundled_corpus_has_train_and_test_splits() -> None:
    train = read("bundled:newswire", label_column="label")
    test = read("bundled:newswire", label_column="label", role="test")
    assert Counter(train.labels) == dict.fromkeys(train.label_names, 150)
    assert Counter(test.labels) == dict.fromkeys(train.label_names, 50)
    assert not {normalize(text) for text in train.texts} & {normalize(text) for text in test.texts}


MULTILINE_CSV = 'text,label\n"one\ntwo\nthree",x\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.csv", MULTILINE_CSV + '" ",y\n', "a.csv, line 5: the text is empty", id="empty text"),
        pytest.param("a.csv", MULTILINE_CSV + "\nfour,\n", "a.csv, line 6: no label", id="missing label"),
        pytest.param("a.csv", MULTILINE_CSV + "a,b,c\n", "a.csv, line 5: expected 2 fields, got 3", id="fields"),
        pytest.param("a.csv", MULTILINE_CSV + 'ok,x\n"four,x\nfive,y\n', "a.csv, line 6: ", id="unclosed quote"),
        pytest.param(
            "a.csv", MULTILINE_CSV.replace("\n", "\r\n") + ",x\r\n", "a.csv, line 5: ", id="windows line endings"
        ),
        pytest.param("a.csv", 'text,"label\nname"\n,x\n', "a.csv, line 3: ", id="line break in header"),
        pytest.param(
            "a.jsonl",
            '{"text": "a", "label": 1}\n\n{"text": "", "label": 1}\n',
            "a.jsonl, line 3",
            id="empty text in jsonl",
        ),
        pytest.param(
            "a.jsonl", '{"text": "a", "label": 1}\n{"text": "a" 1}\n', "a.jsonl, line 2: not valid", id="invalid json"
        ),
    ],
)
def test_errors_in_files_name_the_line(name: str, content: str, message: str) -> None:
    Path(name).write_bytes(content.encode())
    with pytest.raises(DataError) as error:
        read(name, label_column="label\nname" if "name" in content else "label")
    assert error.value.message.startswith(message)


def test_errors_in_objects_name_the_row() -> None:
    with pytest.raises(DataError, match="the list, row 2: the text is empty"):
        read(["a", ""])
    with pytest.raises(DataError, match=r"the mapping of columns, row 2: no text.*; row 3: no label"):
        read({"text": ["a", None, "c"], "label": ["x", "y", float("nan")]}, label_column="label")


def test_at_most_three_errors_are_shown() -> None:
    with pytest.raises(DataError, match=r"row 1: .*; row 2: .*; row 3: .* and 7 more"):
        read([""] * 10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param({"text": ["a"], "label": ["x", "y"]}, "differ in length", id="lengths"),
        pytest.param([("a", "x"), "b"], "row 2: expected a (text, label) pair, got 'b'", id="not a pair"),
        pytest.param(
            [("a", "x"), ("b", 1.5)], "row 2: expected a string or an integer as label, got float", id="fraction"
        ),
        pytest.param([("a", "x"), (3, "y")], "row 2: expected a string as text, got int", id="number as text"),
        pytest.param({"body": ["a"], "label": ["x"]}, "no column 'text'; it has 'body', 'label'", id="column"),
        pytest.param([], "the list has no rows", id="empty"),
        pytest.param(
            class_label_dataset(["a"], [-1], ["n", "p"]),
            "row 1: the label must be between 0 and 1, got -1",
            id="negative class label",
        ),
    ],
)
def test_unusable_objects_are_rejected(source: Source, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(source, label_column="label")
    assert message in error.value.message
    assert error.value.hint


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
def test_leak_guard_cleans_labeled_texts_and_pool(variant: str) -> None:
    evaluation = encode_labels(read([("Straße 2 fin", "a")], label_column="label"), ["a", "b"])
    data = split_data(labeled_set(*BASE, (variant, "b")), ["pool one", variant, variant], evaluation, DataConfig.of())
    assert data.labeled.texts == [text for text, _ in BASE]
    assert data.pool == ["pool one"]
    assert data.evaluation is evaluation
    assert data.report.as_dict() == {
        "labeled": 4,
        "pool": 1,
        "evaluation": 1,
        "labeled_duplicates": 0,
        "labeled_conflicts": 0,
        "labeled_leaks": 1,
        "pool_duplicates": 0,
        "pool_labeled": 0,
        "pool_leaks": 2,
    }


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


def test_leak_guard_logs_the_number_of_texts(caplog: pytest.LogCaptureFixture) -> None:
    evaluation = labeled_set(("alpha one", "a"), ("other", "b"))
    split_data(labeled_set(*BASE, ("alpha three", "a")), ["ALPHA ONE", "pool", "other"], evaluation, DataConfig.of())
    assert "Leak guard: removed 1 labeled texts that are also in the evaluation set" in caplog.text
    assert "Leak guard: removed 2 pool texts that are also in the evaluation set" in caplog.text


def test_leak_guard_logs_if_no_labeled_text_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="label 'a', got 0"):
        split_data(labeled_set(*BASE), ["pool"], labeled_set(*BASE), DataConfig.of())
    assert f"Leak guard: removed {len(BASE)} labeled texts that are also in the evaluation set" in caplog.text


def test_conflicting_labels_and_duplicates_are_removed(caplog: pytest.LogCaptureFixture) -> None:
    rows = (*BASE, ("Alpha  ONE", "a"), ("torn", "a"), ("TORN", "b"), ("torn ", "a"))
    data = split_data(labeled_set(*rows), ["pool", "torn", "POOL"], None, DataConfig.of())
    assert data.labeled.texts == [text for text, _ in BASE]
    assert data.pool == ["pool", "torn"]
    report = data.report
    assert (report.labeled_duplicates, report.labeled_conflicts, report.pool_duplicates) == (1, 3, 1)
    assert "Removed 3 labeled texts that occur with different labels" in caplog.text


def test_drawn_labeled_texts_are_removed_from_the_pool() -> None:
    labeled = numbered({"a": 6, "b": 6})
    data = split_data(labeled, [text.upper() for text in labeled.texts], None, DataConfig.of(shots=2))
    assert data.report.pool_labeled == len(data.labeled) == 4
    remaining = set(labeled.texts) - set(data.labeled.texts)
    assert {text.lower() for text in data.pool} == remaining


def training_texts(data: DataSplits) -> tuple[list[str], list[str]]:
    return data.labeled.texts, data.pool


def test_draw_depends_on_the_seed() -> None:
    labeled = numbered({"a": 30, "b": 30})
    pool = [f"pool {i}" for i in range(100)]

    def draw(seed: int) -> DataSplits:
        return split_data(labeled, pool, None, DataConfig.of(shots=4, pool_size=20, seed=seed))

    assert training_texts(draw(5)) == training_texts(draw(5))
    for texts, other_texts in zip(training_texts(draw(5)), training_texts(draw(6)), strict=True):
        assert texts != other_texts
        assert len(texts) == len(other_texts)
    assert draw(5).report.labeled == 8
    assert draw(5).report.pool == len(set(draw(5).pool)) == 20


def draw_pool(pool: Sequence[str], pool_size: int | None, *, seed: int = 0) -> list[str]:
    return split_data(labeled_set(*BASE), pool, None, DataConfig.of(pool_size=pool_size, seed=seed)).pool


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


def test_draw_is_stable_if_texts_are_added_or_removed() -> None:
    draw = set(draw_pool(POOL, 20))
    assert set(draw_pool([text for text in POOL if text in draw], 20)) == draw
    from_larger_pool = set(draw_pool([*POOL, *(f"more {i}" for i in range(30))], 20))
    assert from_larger_pool & set(POOL) <= draw


def test_all_texts_are_drawn_equally_often() -> None:
    counts = Counter(text for seed in range(400) for text in draw_pool(POOL[:20], 5, seed=seed))
    assert set(counts) == set(POOL[:20])
    assert counts.total() == 2000
    assert 65 < min(counts.values()) <= max(counts.values()) < 135  # 100 ± four standard deviations


def test_texts_are_drawn_independently() -> None:
    together = sum(set(POOL[:2]) <= set(draw_pool(POOL[:4], 2, seed=seed)) for seed in range(300))
    assert 25 < together < 75  # expected: 300 / 6


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


def test_pool_may_be_an_iterator() -> None:
    data = split_data(labeled_set(*BASE), iter(POOL), None, DataConfig.of(pool_size=10))
    assert data.pool == draw_pool(POOL, 10)


def test_warning_if_a_class_has_too_few_texts(caplog: pytest.LogCaptureFixture) -> None:
    data = split_data(numbered({"large": 9, "small": 3}), ["pool"], None, DataConfig.of(shots=5))
    assert data.labeled.counts.tolist() == [5, 3]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "'small'" in warning
    assert "3" in warning
    assert "5" in warning


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


def test_unknown_evaluation_labels_are_rejected() -> None:
    with pytest.raises(DataError, match=r"not in the training set: 'c', 'd'; expected one of 'a', 'b'"):
        load_run_data(DataConfig.of(), labeled=BASE, unlabeled=["pool"], eval=[("x", "d"), ("y", "c"), ("z", "a")])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param(BASE[:2], "only one class: 'a'", id="one class"),
        pytest.param(BASE[:3], "label 'b', got 1", id="one text"),
        pytest.param((*BASE[:3], ("BETA ONE", "b")), "label 'b', got 1", id="one text and a duplicate"),
        pytest.param((*BASE[:3], ("leak", "b")), "label 'b', got 1", id="one text and a leak"),
        pytest.param((*BASE[:2], ("leak", "b"), ("LEAK", "b")), "label 'b', got 0", id="only leaks"),
    ],
)
def test_too_few_labeled_texts_are_rejected(rows: Sequence[tuple[str, str]], message: str) -> None:
    with pytest.raises(DataError) as error:
        load_run_data(DataConfig.of(), labeled=list(rows), unlabeled=["pool"], eval=[("leak", "a")])
    assert message in error.value.message


def test_pool_without_new_texts_is_rejected() -> None:
    with pytest.raises(DataError, match="The pool is empty"):
        load_run_data(DataConfig.of(), labeled=BASE, unlabeled=["ALPHA ONE", "held out"], eval=[("held out", "a")])


def test_labeled_texts_are_required() -> None:
    with pytest.raises(ConfigError, match="Labeled texts are required"):
        load_run_data(DataConfig.of())


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
