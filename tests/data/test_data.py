"""Reading every kind of source, drawing shots, and the leak guard."""

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

from setfit_kd.config import DataConfig
from setfit_kd.data import (
    DataSplits,
    LabeledSet,
    Source,
    draw_shots,
    encode_labels,
    normalise,
    read,
    split_data,
    stream_texts,
)
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.run.data import load_run_data

TEXTS = ["Rain stops play", 'She said: "no,\tnever"', "Two lines\nof café", "x" * 200_000]
LABELS = ["Sports", "World", "World", "Sports"]
COLUMNS = {"text": TEXTS, "label": LABELS}
RECORDS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)


def class_labels(texts: Sequence[str], labels: Sequence[int], names: Sequence[str]) -> Any:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
    return datasets.Dataset.from_dict({"text": list(texts), "label": list(labels)}, features=features)


def delimited(name: str, delimiter: str) -> str:
    with Path(name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("label", "text"), *zip(LABELS, TEXTS, strict=True)])
    return name


def json_lines(name: str) -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n\n" for record in RECORDS), encoding="utf-8")
    return name


def parquet(name: str) -> str:
    pq.write_table(pa.table(COLUMNS), name)
    return name


def saved(name: str, data: Any) -> str:
    data.save_to_disk(name)
    return name


def split_folder() -> str:
    other = datasets.Dataset.from_dict({"text": ["elsewhere"], "label": ["World"]})
    return saved("folder", datasets.DatasetDict(train=other, dev=datasets.Dataset.from_dict(COLUMNS)))


SOURCES: dict[str, Callable[[], Source]] = {
    "csv": lambda: delimited("a.csv", ","),
    "tsv": lambda: delimited("a.tsv", "\t"),
    "upper-case ending": lambda: delimited("A.CSV", ","),
    "jsonl": lambda: json_lines("a.jsonl"),
    "ndjson": lambda: json_lines("a.ndjson"),
    "parquet": lambda: parquet("a.parquet"),
    "path object": lambda: Path(delimited("a.csv", ",")),
    "folder": lambda: saved("folder", datasets.Dataset.from_dict(COLUMNS)),
    "folder with splits": lambda: saved("folder", datasets.DatasetDict(train=datasets.Dataset.from_dict(COLUMNS))),
    "folder[split]": lambda: split_folder() + "[dev]",
    "dataset": lambda: datasets.Dataset.from_dict(COLUMNS),
    "dataset with class labels": lambda: class_labels(TEXTS, [0, 1, 1, 0], ["Sports", "World"]),
    "columns": lambda: COLUMNS,
    "columns of arrays": lambda: {"text": np.array(TEXTS), "label": np.array(LABELS)},
    "pairs": lambda: list(zip(TEXTS, LABELS, strict=True)),
    "mappings": lambda: RECORDS,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_reads_alike(source: Callable[[], Source]) -> None:
    rows = read(source(), label_column="label")
    assert rows.texts == TEXTS
    assert rows.labels == LABELS
    assert rows.label_names == ("Sports", "World")


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "pairs"])
def test_every_source_reads_as_a_pool(name: str) -> None:
    rows = read(SOURCES[name]())
    assert rows.texts == TEXTS
    assert rows.labels is None


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "pairs"])
def test_every_source_streams_what_it_reads(name: str) -> None:
    assert list(stream_texts(SOURCES[name]())) == TEXTS


class Breaking(Sequence[str]):
    """A list whose end cannot be had."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, place: Any) -> Any:
        if place >= 3:
            raise RuntimeError(f"row {place} was asked for")
        return f"text {place}"


class BreakingDataset:
    """A data set whose end cannot be had."""

    column_names = ("text",)

    def __iter__(self) -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in Breaking())


@pytest.mark.parametrize(
    "source", [Breaking(), {"text": Breaking()}, BreakingDataset()], ids=["list", "columns", "set"]
)
def test_a_source_that_breaks_off_has_given_what_came_before(source: Any) -> None:
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
def test_a_file_is_read_no_further_than_asked(name: str, head: str, line: str) -> None:
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
        pytest.param([], id="nothing"),
        pytest.param({"body": ["a"]}, id="no such column"),
        pytest.param("a.jsonl", id="line"),
        pytest.param("nowhere.csv", id="no file"),
        pytest.param("notes.md", id="ending"),
    ],
)
def test_streaming_says_what_reading_says(source: Source) -> None:
    Path("a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n{"text": null}\n')
    Path("notes.md").write_text("notes")
    with pytest.raises(DataError) as reading:
        read(source)
    with pytest.raises(DataError) as streaming:
        list(stream_texts(source))
    assert str(streaming.value) == str(reading.value)


def test_rows_that_cannot_be_used_are_told_after_those_that_can() -> None:
    texts = stream_texts(["a", "", "b", None, "c"])
    assert list(islice(texts, 3)) == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"row 2: the text is empty; row 4: no text"):
        next(texts)


def test_text_file_holds_a_text_a_line() -> None:
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
def test_windows_line_ends_and_byte_order_mark(name: str, content: str, mark: str) -> None:
    Path(name).write_bytes((mark + content).encode())
    rows = read(name, label_column="label")
    assert rows.texts == ["one", "two\r\nlines"]
    assert rows.labels == ["x", "y"]


def test_text_columns_are_joined_by_a_space() -> None:
    columns = {"title": ["Storm", "", "Cup"], "body": ["Roofs gone", "Untitled", " "], "label": ["w", "w", "s"]}
    rows = read(columns, text_column=("title", "body"), label_column="label")
    assert rows.texts == ["Storm Roofs gone", "Untitled", "Cup"]
    assert read(columns, text_column=("body", "title")).texts[0] == "Roofs gone Storm"


def two_class_labels() -> Any:
    features = datasets.Features(
        text=datasets.Value("string"),
        lang=datasets.ClassLabel(names=["en", "de"]),
        label=datasets.ClassLabel(names=["poor", "good"]),
    )
    return datasets.Dataset.from_dict({"text": ["a", "b"], "lang": [0, 0], "label": [1, 0]}, features=features)


def foreign_class_label() -> Any:
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
            class_labels(["a", "b"], [1, 0], ["poor", "good"]), ["good", "poor"], ("poor", "good"), id="class labels"
        ),
        pytest.param(two_class_labels(), ["good", "poor"], ("poor", "good"), id="class labels of two columns"),
        pytest.param(foreign_class_label(), ["y", "x"], ("x", "y"), id="class labels of another column"),
    ],
)
def test_label_names_and_their_order(source: Source, labels: list[str], names: tuple[str, ...]) -> None:
    rows = read(source, label_column="label")
    encoded = encode_labels(rows)
    assert rows.labels == labels
    assert encoded.label_names == names
    assert [names[label] for label in encoded.labels] == labels


def test_declared_names_without_texts_are_no_classes() -> None:
    rows = read(class_labels(["a", "b"], [2, 0], ["poor", "fair", "good"]), label_column="label")
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
def test_role_decides_the_split(splits: tuple[str, ...], name: str, role: str, expected: str) -> None:
    saved("folder", datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": [split]}) for split in splits}))
    assert read(name, role=role).texts == [expected]


def test_bundled_corpus_has_its_splits() -> None:
    train = read("bundled:newswire", label_column="label")
    test = read("bundled:newswire", label_column="label", role="test")
    assert Counter(train.labels) == dict.fromkeys(train.label_names, 150)
    assert Counter(test.labels) == dict.fromkeys(train.label_names, 50)
    assert not {normalise(text) for text in train.texts} & {normalise(text) for text in test.texts}


BROKEN_CSV = 'text,label\n"one\ntwo\nthree",x\n'


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        pytest.param("a.csv", BROKEN_CSV + '" ",y\n', "a.csv, line 5: the text is empty", id="empty text"),
        pytest.param("a.csv", BROKEN_CSV + "\nfour,\n", "a.csv, line 6: no label", id="missing label"),
        pytest.param("a.csv", BROKEN_CSV + "a,b,c\n", "a.csv, line 5: 3 fields", id="fields"),
        pytest.param("a.csv", BROKEN_CSV + 'ok,x\n"four,x\nfive,y\n', "a.csv, line 6: ", id="open quote"),
        pytest.param("a.csv", BROKEN_CSV.replace("\n", "\r\n") + ",x\r\n", "a.csv, line 5: ", id="windows"),
        pytest.param("a.csv", 'text,"label\nname"\n,x\n', "a.csv, line 3: ", id="line break in the header"),
        pytest.param(
            "a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "", "label": 1}\n', "a.jsonl, line 3", id="json"
        ),
        pytest.param(
            "a.jsonl", '{"text": "a", "label": 1}\n{"text": "a" 1}\n', "a.jsonl, line 2: not valid", id="jsonl"
        ),
    ],
)
def test_problems_are_named_by_their_line(name: str, content: str, where: str) -> None:
    Path(name).write_bytes(content.encode())
    with pytest.raises(DataError) as error:
        read(name, label_column="label\nname" if "name" in content else "label")
    assert error.value.message.startswith(where)


def test_rows_of_objects_are_named_by_their_number() -> None:
    with pytest.raises(DataError, match="the given list, row 2: the text is empty"):
        read(["a", ""])
    with pytest.raises(DataError, match=r"the given columns, row 2: no text.*; row 3: no label"):
        read({"text": ["a", None, "c"], "label": ["x", "y", float("nan")]}, label_column="label")


def test_many_bad_rows_are_counted() -> None:
    with pytest.raises(DataError, match=r"row 1: .*; row 2: .*; row 3: .* and 7 more"):
        read([""] * 10)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        pytest.param({"text": ["a"], "label": ["x", "y"]}, "differ in length", id="lengths"),
        pytest.param([("a", "x"), "b"], "row 2: 'b' is not a (text, label) pair", id="not a pair"),
        pytest.param([("a", "x"), ("b", 1.5)], "row 2: the label is of type float", id="fraction"),
        pytest.param([("a", "x"), (3, "y")], "row 2: the text is of type int", id="text is a number"),
        pytest.param({"body": ["a"], "label": ["x"]}, "no column 'text'; it has 'body', 'label'", id="column"),
        pytest.param([], "There are no rows", id="nothing"),
        pytest.param(class_labels(["a"], [-1], ["n", "p"]), "row 1: the label -1 is not one of 0 to 1", id="hidden"),
    ],
)
def test_objects_that_cannot_be_used(source: Source, says: str) -> None:
    with pytest.raises(DataError) as error:
        read(source, label_column="label")
    assert says in error.value.message
    assert error.value.hint


def labeled_set(*rows: tuple[str, str]) -> LabeledSet:
    return encode_labels(read(list(rows), label_column="label"))


def numbered(counts: dict[str, int]) -> LabeledSet:
    """As many texts of each class as asked for, the classes taking turns."""
    rows = [(f"{name} text {i}", name) for name, count in counts.items() for i in range(count)]
    return labeled_set(*sorted(rows, key=lambda row: int(row[0].rsplit(" ", 1)[1])))


BASE = (("alpha one", "a"), ("alpha two", "a"), ("beta one", "b"), ("beta two", "b"))
WRITTEN_OTHERWISE = {
    "exact": "Straße 2 fin",
    "case": "STRASSE 2 Fin",
    "white space": "\n Straße \t 2\u00a0 fin ",
    "compatibility forms": "Straße \uff12 \ufb01n",
}


@pytest.mark.parametrize("variant", WRITTEN_OTHERWISE.values(), ids=WRITTEN_OTHERWISE)
def test_leak_guard_takes_eval_texts_out_of_both(variant: str) -> None:
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
def test_invisible_characters_neither_hide_a_text_nor_make_one(character: str) -> None:
    assert normalise(f"{character}a caf{character}e{character}\u0301") == normalise("a caf\u00e9")
    with pytest.raises(DataError, match="row 2: the text is empty"):
        read(["a", character * 2])


@pytest.mark.parametrize("quote", "‘’‚‛‹›ʼ＇")
def test_typographic_quotes_count_as_ascii(quote: str) -> None:
    assert normalise(f"Don{quote}t «say» “so” „now‟") == 'don\'t "say" "so" "now"'


@pytest.mark.parametrize("text", ["μαΐου", "weiß", "café", "ὑπνώδης", "ﬂood", "ij ǆ"])
@pytest.mark.parametrize("change", [str.upper, str.title, lambda text: unicodedata.normalize("NFD", text)])
def test_case_and_composition_do_not_hide_a_text(text: str, change: Callable[[str], str]) -> None:
    assert normalise(change(text)) == normalise(text)


def test_leak_guard_tells(caplog: pytest.LogCaptureFixture) -> None:
    evaluation = labeled_set(("alpha one", "a"), ("other", "b"))
    split_data(labeled_set(*BASE, ("alpha three", "a")), ["ALPHA ONE", "pool", "other"], evaluation, DataConfig.of())
    assert "Leak guard: 1 labeled texts are in the evaluation set" in caplog.text
    assert "Leak guard: 2 pool texts are in the evaluation set" in caplog.text


def test_leak_guard_tells_even_where_it_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="occurs in no text"):
        split_data(labeled_set(*BASE), ["pool"], labeled_set(*BASE), DataConfig.of())
    assert f"Leak guard: {len(BASE)} labeled texts are in the evaluation set" in caplog.text


def test_texts_with_several_labels_and_duplicates_go(caplog: pytest.LogCaptureFixture) -> None:
    rows = (*BASE, ("Alpha  ONE", "a"), ("torn", "a"), ("TORN", "b"), ("torn ", "a"))
    data = split_data(labeled_set(*rows), ["pool", "torn", "POOL"], None, DataConfig.of())
    assert data.labeled.texts == [text for text, _ in BASE]
    assert data.pool == ["pool", "torn"]
    report = data.report
    assert (report.labeled_duplicates, report.labeled_conflicts, report.pool_duplicates) == (1, 3, 1)
    assert "3 labeled texts occur with different labels" in caplog.text


def test_shots_leave_the_pool_and_the_rest_stays() -> None:
    labeled = numbered({"a": 6, "b": 6})
    data = split_data(labeled, [text.upper() for text in labeled.texts], None, DataConfig.of(shots=2))
    assert data.report.pool_labeled == len(data.labeled) == 4
    left = set(labeled.texts) - set(data.labeled.texts)
    assert {text.lower() for text in data.pool} == left


def drawn(data: DataSplits) -> tuple[list[str], list[str]]:
    return data.labeled.texts, data.pool


def test_same_seed_draws_the_same_and_another_seed_another() -> None:
    labeled = numbered({"a": 30, "b": 30})
    pool = [f"pool {i}" for i in range(100)]

    def draw(seed: int) -> DataSplits:
        return split_data(labeled, pool, None, DataConfig.of(shots=4, pool_size=20, seed=seed))

    assert drawn(draw(5)) == drawn(draw(5))
    for one, other in zip(drawn(draw(5)), drawn(draw(6)), strict=True):
        assert one != other
        assert len(one) == len(other)
    assert draw(5).report.labeled == 8
    assert draw(5).report.pool == len(set(draw(5).pool)) == 20


def pool_drawn(pool: Sequence[str], pool_size: int | None, *, seed: int = 0) -> list[str]:
    return split_data(labeled_set(*BASE), pool, None, DataConfig.of(pool_size=pool_size, seed=seed)).pool


MANY = [f"pool {i}" for i in range(60)]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_a_smaller_draw_is_part_of_a_larger_one(seed: int) -> None:
    draws = [pool_drawn(MANY, size, seed=seed) for size in (2, 7, 30, 59, 60, None)]
    assert [len(draw) for draw in draws] == [2, 7, 30, 59, 60, 60]
    for smaller, larger in pairwise(draws):
        assert set(smaller) <= set(larger)
        assert smaller == [text for text in larger if text in smaller]
    assert draws[-1] == MANY


def test_the_draw_does_not_depend_on_the_order_of_the_source() -> None:
    expected = set(pool_drawn(MANY, 20))
    for seed in range(5):
        shuffled = random.Random(seed).sample(MANY, len(MANY))
        draw = pool_drawn(shuffled, 20)
        assert set(draw) == expected
        assert draw == [text for text in shuffled if text in expected]


def test_texts_that_come_or_go_leave_the_rest_of_the_draw() -> None:
    draw = set(pool_drawn(MANY, 20))
    assert set(pool_drawn([text for text in MANY if text in draw], 20)) == draw
    more = set(pool_drawn([*MANY, *(f"more {i}" for i in range(30))], 20))
    assert more & set(MANY) <= draw


def test_every_text_is_drawn_as_often() -> None:
    drawn = Counter(text for seed in range(400) for text in pool_drawn(MANY[:20], 5, seed=seed))
    assert set(drawn) == set(MANY[:20])
    assert drawn.total() == 2000
    assert 65 < min(drawn.values()) <= max(drawn.values()) < 135  # four standard deviations about 100


def test_texts_are_drawn_independently_of_each_other() -> None:
    together = sum(set(MANY[:2]) <= set(pool_drawn(MANY[:4], 2, seed=seed)) for seed in range(300))
    assert 25 < together < 75  # a sixth of all


@pytest.mark.parametrize("pool_size", [None, 2])
def test_a_text_counts_once_however_it_is_written(pool_size: int | None) -> None:
    pool = ["Caf\u00e9 one", "CAFE\u0301 ONE", " caf\u00e9\u200b  one", "two", "TWO", "two\t", "\uff54wo", "three"]
    config = DataConfig.of(pool_size=pool_size)
    data = split_data(labeled_set(*BASE), pool, None, config)
    assert data.report.pool_duplicates == 5
    firsts = ["Caf\u00e9 one", "two", "three"]
    assert data.pool == firsts if pool_size is None else len(data.pool) == 2
    assert set(data.pool) <= set(firsts)
    alone = split_data(labeled_set(*BASE), firsts, None, config)
    assert data.pool == alone.pool


def test_a_pool_may_be_gone_through_once_only() -> None:
    data = split_data(labeled_set(*BASE), iter(MANY), None, DataConfig.of(pool_size=10))
    assert data.pool == pool_drawn(MANY, 10)


def test_small_class_is_named_and_used_whole(caplog: pytest.LogCaptureFixture) -> None:
    data = split_data(numbered({"large": 9, "small": 3}), ["pool"], None, DataConfig.of(shots=5))
    assert data.labeled.counts.tolist() == [5, 3]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "'small'" in warning
    assert "3" in warning
    assert "5" in warning


def test_small_pool_is_told_and_used_whole(caplog: pytest.LogCaptureFixture) -> None:
    data = split_data(numbered({"a": 2, "b": 2}), ["p", "q"], None, DataConfig.of(pool_size=7))
    assert data.pool == ["p", "q"]
    assert "The pool holds 2 texts, fewer than the 7 asked for" in caplog.text


def test_eval_labels_are_mapped_by_name() -> None:
    labeled = class_labels(["a1", "a2", "b1", "b2"], [0, 0, 1, 1], ["poor", "good"])
    evaluation = class_labels(["e1", "e2", "e3"], [0, 1, 1], ["good", "poor"])
    data = load_run_data(DataConfig.of(), labeled=labeled, unlabeled=["pool"], eval=evaluation)
    assert data.labeled.label_names == ("poor", "good")
    assert data.evaluation is not None
    assert data.evaluation.label_names == ("poor", "good")
    assert data.evaluation.labels.tolist() == [1, 0, 0]


def test_eval_labels_that_training_lacks_are_named() -> None:
    with pytest.raises(DataError, match=r"the training set lacks: 'c', 'd'; known: 'a', 'b'"):
        load_run_data(DataConfig.of(), labeled=BASE, unlabeled=["pool"], eval=[("x", "d"), ("y", "c"), ("z", "a")])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        pytest.param(BASE[:2], "one class only: 'a'", id="one class"),
        pytest.param(BASE[:3], "label 'b' occurs once", id="one text"),
        pytest.param((*BASE[:3], ("BETA ONE", "b")), "label 'b' occurs once", id="one text twice"),
        pytest.param((*BASE[:3], ("gone", "b")), "label 'b' occurs once", id="one text and a leak"),
        pytest.param((*BASE[:2], ("gone", "b"), ("GONE", "b")), "label 'b' occurs in no text", id="leaks only"),
    ],
)
def test_too_little_to_train_on(rows: Sequence[tuple[str, str]], says: str) -> None:
    with pytest.raises(DataError) as error:
        load_run_data(DataConfig.of(), labeled=list(rows), unlabeled=["pool"], eval=[("gone", "a")])
    assert says in error.value.message


def test_pool_of_nothing_new_is_refused() -> None:
    with pytest.raises(DataError, match="No pool text is left"):
        load_run_data(DataConfig.of(), labeled=BASE, unlabeled=["ALPHA ONE", "held out"], eval=[("held out", "a")])


def test_labeled_texts_must_be_named() -> None:
    with pytest.raises(ConfigError, match="No labeled"):
        load_run_data(DataConfig.of())


def test_without_a_pool_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
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
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@PROPERTY
@given(st.text(st.characters(max_codepoint=127)))
@example("A\tB\r\n\x1c c\x00 ")
def test_plain_texts_are_normalised_like_all_others(text: str) -> None:
    assert normalise(text) == normalise(text + " \u00e9").removesuffix("\u00e9").rstrip(" ")


@PROPERTY
@given(
    labels=st.lists(st.integers(0, 3), max_size=30), shots=st.none() | st.integers(2, 6), seed=st.integers(0, 2**32 - 1)
)
def test_draw_shots_gives_the_smaller_of_k_and_the_class(labels: list[int], shots: int | None, seed: int) -> None:
    labels = labels + [0, 1, 2, 3] * 2
    texts = [f"text {i}" for i in range(len(labels))]
    source = LabeledSet(texts, np.array(labels, np.int64), ("a", "b", "c", "d"))
    draw = draw_shots(source, shots, seed=seed)
    wanted = len(source) if shots is None else shots
    assert draw.counts.tolist() == [min(wanted, count) for count in source.counts.tolist()]
    rows = [texts.index(text) for text in draw.texts]
    assert rows == sorted(set(rows))
    assert draw.labels.tolist() == [labels[row] for row in rows]


WRITINGS: tuple[Callable[[str], str], ...] = (
    str,
    str.upper,
    lambda text: f"  {text}\t",
    lambda text: text.replace(" ", " \n "),
    lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
)
SOME_TEXT = st.builds(lambda base, write: write(f"text {base}"), st.integers(0, 12), st.sampled_from(WRITINGS))


@PROPERTY
@given(
    labeled=st.lists(st.tuples(SOME_TEXT, st.sampled_from("ab"))),
    pool=st.lists(SOME_TEXT),
    evaluation=st.lists(st.tuples(SOME_TEXT, st.sampled_from("ab"))),
    shots=st.none() | st.integers(2, 4),
    pool_size=st.none() | st.integers(2, 10),
)
def test_prepare_keeps_eval_shots_and_pool_apart(
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

    eval_keys = {normalise(text) for text in held_out.texts}
    shot_keys = [normalise(text) for text in data.labeled.texts]
    pool_keys = [normalise(text) for text in data.pool]
    assert len(set(shot_keys)) == len(shot_keys)
    assert len(set(pool_keys)) == len(pool_keys)
    assert not eval_keys & set(shot_keys)
    assert not set(pool_keys) & (eval_keys | set(shot_keys))
    assert set(data.pool) <= set(pool)
    rest = {normalise(text) for text in pool} - eval_keys - set(shot_keys)
    assert len(data.pool) == min(len(rest), pool_size or len(rest))
    report = data.report
    assert len(rest) + report.pool_leaks + report.pool_labeled + report.pool_duplicates == len(pool)
