"""Classifying files and streams: a row out for each row in, whole files or none, whatever the classifier is."""

from __future__ import annotations

import csv
import datetime as dt
import errno
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checks import assert_refused, halve, scribble, tree
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from predictions import DELIMITERS, LABELS, OURS, Row, predict, predicted, read_output, read_records
from synthetic import QUICK, few_labels, pool_signals, texts_and_labels

from setfit_kd import train_student
from setfit_kd.export import export_bundle
from setfit_kd.inference.classifier import open_classifier
from setfit_kd.inference.predict import CHUNK_SIZE, classify, predictions_file

TEXTS = [*texts_and_labels(4)[0], "something else"]
OUTPUTS = ("stdout", "jsonl", "csv", "tsv", "parquet")


# Files in and out


def write_delimited(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=DELIMITERS[path.suffix[1:]], quoting=csv.QUOTE_ALL).writerows(rows)


def given_as(kind: str, texts: Sequence[Any]) -> tuple[list[str], str | None]:
    """Arguments and stdin by which texts, None among them where the kind knows it, are handed over."""
    if kind == "arguments":
        return ["--", *texts], None
    if kind == "stdin":
        return [], "".join(f"{text}\n" for text in texts)
    file = Path(f"in.{kind}")
    if kind in DELIMITERS:
        write_delimited(file, [("number", "text"), *enumerate(texts)])
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), file)
    else:
        file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return ["--input", str(file)], None


def output_flags(kind: str) -> list[str]:
    return [] if kind == "stdout" else ["--output", f"out.{kind}"]


def probabilities_of(model: Path, texts: list[str]) -> npt.NDArray[np.float32]:
    return open_classifier(model, device="cpu").predict_proba(texts)


def assert_right(rows: list[Row], model: Path, texts: list[str | None]) -> None:
    """The rows are those of the texts, in their order, and what they say is the classifier's word."""
    assert [row.text for row in rows] == texts
    known = [row for row in rows if row.text is not None]
    expected = probabilities_of(model, [text for text in texts if text is not None])
    for row, probabilities in zip(known, expected, strict=True):
        assert row.probabilities is not None
        assert list(row.probabilities) == list(LABELS)
        np.testing.assert_allclose(list(row.probabilities.values()), probabilities, atol=2e-6)
        assert row.label == LABELS[probabilities.argmax()]
    for row in rows:
        assert row.text is not None or (row.label, row.probabilities) == (None, None)


INPUTS = ("arguments", "stdin", "txt", "csv", "tsv", "jsonl", "parquet")


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("model", ["bundle", "setfit"])
def test_whatever_goes_in_and_out_the_answers_are_the_classifiers(
    model: str, kind: str, out: str, models: dict[str, Path]
) -> None:
    arguments, stdin = given_as(kind, TEXTS)
    result = predicted(models[model], *output_flags(out), *arguments, stdin=stdin)
    assert_right(read_output(out, result), models[model], list(TEXTS))


@pytest.mark.parametrize("out", OUTPUTS)
def test_more_texts_than_are_held_at_once_come_out_in_order(out: str, bundle: Path) -> None:
    texts = [f"match {i} goal {i % 7} shares" for i in range(2 * CHUNK_SIZE + 5)]
    arguments, _ = given_as("jsonl", texts)
    result = predicted(bundle, *output_flags(out), *arguments)
    assert_right(read_output(out, result), bundle, list(texts))


def test_arguments_come_before_files_and_files_in_their_order(bundle: Path) -> None:
    Path("b.txt").write_text("from b\nagain from b\n", encoding="utf-8")
    write_delimited(Path("a.csv"), [("text",), ("from a",)])
    result = predicted(bundle, "--input", "b.txt", "an argument", "--input", "a.csv", "-i", "b.txt", stdin="unread\n")
    texts = ["an argument", "from b", "again from b", "from a", "from b", "again from b"]
    assert_right(read_output("stdout", result), bundle, list(texts))


def test_several_columns_make_up_a_text(bundle: Path) -> None:
    write_delimited(Path("in.csv"), [("title", "body"), ("match", "goal"), ("shares", ""), ("", "")])
    result = predicted(bundle, "--input", "in.csv", "--text-column", "body,title")
    assert_right(read_output("stdout", result), bundle, ["goal match", "shares", None])


def test_a_missing_column_is_told(bundle: Path, tmp_path: Path) -> None:
    write_delimited(Path("in.csv"), [("title",), ("a",)])
    result = predict(bundle, "--input", "in.csv", "--output", "out.csv")
    assert_refused(result, "in.csv", "no column 'text'", "'title'", "--text-column")
    assert set(tree(tmp_path)) == {"in.csv"}


# Rows without text


INVISIBLE = "\u200b\u2060\ufeff"
GAPS: list[tuple[str, Any]] = [
    *itertools.product(["txt", "stdin", "csv", "tsv", "jsonl", "parquet", "arguments"], ["", "  \t ", INVISIBLE]),
    *itertools.product(["jsonl"], [None, 7, 1.5, float("nan"), True, ["a text"], {"text": "a text"}, "half \ud83d"]),
    ("parquet", None),
]


@pytest.mark.parametrize(("kind", "gap"), GAPS, ids=repr)
def test_a_row_without_text_has_no_label(kind: str, gap: Any, bundle: Path) -> None:
    arguments, stdin = given_as(kind, [TEXTS[0], gap, TEXTS[1]])
    result = predicted(bundle, *arguments, stdin=stdin)
    assert_right(read_output("stdout", result), bundle, [TEXTS[0], None, TEXTS[1]])


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("txt", "in.txt, line 2"),
        ("csv", "in.csv, line 3"),
        ("tsv", "in.tsv, line 3"),
        ("jsonl", "in.jsonl, line 2"),
        ("parquet", "in.parquet, row 2"),
        ("stdin", "stdin, line 2"),
    ],
)
@pytest.mark.parametrize("out", ["stdout", "csv"])
def test_rows_without_text_are_told_of_once(kind: str, where: str, out: str, bundle: Path) -> None:
    arguments, stdin = given_as(kind, [TEXTS[0], "", TEXTS[1]])
    result = predicted(bundle, *output_flags(out), "-q", *arguments, stdin=stdin)
    assert result.stderr.count("Warning: ") == 1
    assert where in result.stderr
    assert "no label" in result.stderr


def test_many_rows_without_text_are_counted(bundle: Path) -> None:
    arguments, _ = given_as("jsonl", [TEXTS[0], *[None] * 12])
    result = predicted(bundle, "-q", *arguments)
    for fragment in ("in.jsonl", "line 2:", "line 3:", "line 4:", "and 9 more"):
        assert fragment in result.stderr
    assert_right(read_output("stdout", result), bundle, [TEXTS[0], *[None] * 12])


def test_each_file_with_rows_without_text_is_told_of(bundle: Path) -> None:
    first, _ = given_as("txt", ["", TEXTS[0]])
    second, _ = given_as("csv", [TEXTS[1]])
    third, _ = given_as("jsonl", [TEXTS[2], None])
    result = predicted(bundle, "-q", *first, *second, *third)
    assert_right(read_output("stdout", result), bundle, [None, TEXTS[0], TEXTS[1], TEXTS[2], None])
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert ["in.txt, line 1" in warnings[0], "in.jsonl, line 2" in warnings[1], len(warnings)] == [True, True, 2]


@pytest.mark.parametrize("out", OUTPUTS)
def test_null_is_written_in_every_output(out: str, bundle: Path) -> None:
    arguments, _ = given_as("parquet", pa.array([None, TEXTS[0], None], pa.string()))
    result = predicted(bundle, *output_flags(out), *arguments)
    assert_right(read_output(out, result), bundle, [None, TEXTS[0], None])


@pytest.mark.parametrize("out", OUTPUTS)
def test_a_file_of_numbers_has_no_labels(out: str, bundle: Path) -> None:
    arguments, _ = given_as("parquet", [1, 2, 3])
    result = predicted(bundle, "-q", *output_flags(out), *arguments)
    assert_right(read_output(out, result), bundle, [None, None, None])
    assert "in.parquet, row 1: the text is of type int" in result.stderr


def test_null_is_empty_in_delimited_files(bundle: Path) -> None:
    arguments, _ = given_as("jsonl", [None])
    predicted(bundle, "--output", "out.csv", *arguments)
    assert Path("out.csv").read_text(encoding="utf-8").splitlines()[1] == "," * (2 + len(LABELS))


# The input's other columns


def write_table(path: Path, columns: dict[str, Any]) -> list[str]:
    """Write columns as a file of the kind that its ending says; returns the flags that name it."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        write_delimited(path, [list(columns), *zip(*columns.values(), strict=True)])
    return ["--input", str(path)]


def kept(kind: str, result: Result) -> list[dict[str, Any]]:
    """The input's columns of each row of an output."""
    n_ours = 3 if kind in ("stdout", "jsonl") else len(OURS)
    return [dict(list(record.items())[:-n_ours]) for record in read_records(kind, result)]


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_other_columns_are_kept_in_their_order(kind: str, out: str, bundle: Path) -> None:
    n, texts = CHUNK_SIZE + 2, [TEXTS[0], " "]
    columns = {
        "id": [f"id {row}" for row in range(n)],
        "text": [texts[row % 2] for row in range(n)],
        "": ['=1,\t"\r\n\x1b'] * n,
        "label": ["gold"] * n,
    }
    result = predicted(bundle, *write_table(Path(f"in.{kind}"), columns), *output_flags(out))
    expected = [
        {"id": name, "": odd, "input_label": gold}
        for name, odd, gold in zip(columns["id"], columns[""], columns["label"], strict=True)
    ]
    found = kept(out, result)
    assert found == expected
    assert [list(row) for row in found] == [list(row) for row in expected]
    rows = read_output(out, result)
    assert [row.text for row in rows[:2]] == [TEXTS[0], None]
    assert [row.label is None for row in rows[:2]] == [False, True]


CLASHES: list[tuple[list[str], str, str, list[str]]] = [
    (["text", "label"], "text", "both", ["input_label"]),
    (["label", "input_label", "text"], "text", "both", ["input_input_label", "input_label"]),
    (["input_label", "label", "text"], "text", "both", ["input_label", "input_input_label"]),
    (["body"], "body", "both", ["body"]),
    (["title", "body"], "title,body", "both", ["title", "body"]),
    (["body", "text"], "body", "both", ["body", "input_text"]),
    (["text", "body"], "text,body", "both", ["input_text", "body"]),
    (["text", "probabilities", "probability"], "text", "jsonl", ["input_probabilities", "probability"]),
    (["text", "probabilities", "probability"], "text", "csv", ["probabilities", "input_probability"]),
    (["text", "probability_Sports", "probability_x"], "text", "csv", ["input_probability_Sports", "probability_x"]),
    (["text", "Label", "label ", ""], "text", "both", ["Label", "label ", ""]),
]


@pytest.mark.parametrize(("columns", "text_column", "out", "expected"), CLASHES, ids=repr)
def test_a_column_called_like_one_of_ours_is_renamed(
    columns: list[str], text_column: str, out: str, expected: list[str], bundle: Path
) -> None:
    flags = write_table(Path("in.csv"), {name: [f"a {name}"] for name in columns})
    for kind in ("jsonl", "csv") if out == "both" else (out,):
        result = predicted(bundle, *flags, "--text-column", text_column, *output_flags(kind))
        assert [list(row) for row in kept(kind, result)] == [expected]
        assert read_output(kind, result)[0].text == " ".join(f"a {name}" for name in text_column.split(","))


def test_a_column_has_the_same_name_in_all_json_lines(bundle: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "input_label": 2, "label": 3}, {"text": "c", "input_label": 4}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = kept("stdout", predicted(bundle, "-i", "in.jsonl"))
    assert found == [{"input_label": 1}, {"input_input_label": 2, "input_label": 3}, {"input_input_label": 4}]


@pytest.mark.parametrize("out", OUTPUTS)
def test_files_with_other_columns_give_the_union(out: str, bundle: Path) -> None:
    flags = write_table(Path("a.csv"), {"id": ["7"], "text": ["a text"]})
    Path("b.jsonl").write_text('{"text": "b"}\n' * CHUNK_SIZE + '{"late": "x", "text": "c"}\n', encoding="utf-8")
    Path("c.txt").write_text("a line\n", encoding="utf-8")
    result = predicted(bundle, "an argument", *flags, "-i", "b.jsonl", "-i", "c.txt", *output_flags(out))
    empty: dict[str, Any] = {} if out in ("stdout", "jsonl") else {"id": None, "late": None}
    expected = [empty, {**empty, "id": "7"}, *[empty] * CHUNK_SIZE, {**empty, "late": "x"}, empty]
    assert kept(out, result) == expected


VALUES: dict[str, tuple[pa.DataType, Any]] = {
    "big": (pa.int64(), 2**62 + 1),
    "small": (pa.int8(), 7),
    "unsigned": (pa.uint64(), 2**64 - 1),
    "half": (pa.float16(), np.float16(1.5)),
    "day": (pa.date32(), dt.date(2024, 2, 29)),
    "moment": (pa.timestamp("ns", "UTC"), 1_234_567_890_123_456_789),
    "clock": (pa.time64("us"), dt.time(1, 2, 3, 4)),
    "length": (pa.duration("ms"), dt.timedelta(seconds=90)),
    "price": (pa.decimal128(10, 2), Decimal("1.20")),
    "bytes": (pa.binary(), b"caf\xe9"),
    "yes": (pa.bool_(), True),
    "category": (pa.dictionary(pa.int32(), pa.string()), "red"),
    "list": (pa.list_(pa.date32()), [dt.date(2024, 2, 29)]),
    "object": (pa.struct([("a", pa.float64()), ("b", pa.string())]), {"a": math.nan, "b": 'x"'}),
    "map": (pa.map_(pa.string(), pa.int8()), [("k", 1)]),
    "nothing": (pa.null(), None),
    "nan": (pa.float64(), math.nan),
    "infinite": (pa.float32(), math.inf),
}
AS_JSON = {
    **{"big": 2**62 + 1, "small": 7, "unsigned": 2**64 - 1, "half": 1.5, "yes": True, "category": "red"},
    **{"day": "2024-02-29", "moment": "2009-02-13 23:31:30.123456789+00:00", "clock": "01:02:03.000004"},
    **{"length": "0:01:30", "price": "1.20", "bytes": "caf\\xe9", "list": ["2024-02-29"], "map": [["k", 1]]},
    **{"object": {"a": None, "b": 'x"'}, "nothing": None, "nan": None, "infinite": None},
}


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    """A Parquet file with columns of many types, of a row of values and one of nulls."""
    columns: dict[str, Any] = {name: pa.array([value, None], kind) for name, (kind, value) in VALUES.items()}
    return write_table(tmp_path / "in.parquet", {**columns, "text": ["a", "b"]})


def test_parquet_keeps_the_types_of_parquet(typed: list[str], bundle: Path) -> None:
    predicted(bundle, *typed, *output_flags("parquet"))
    before, after = pq.read_table("in.parquet").drop_columns("text"), pq.read_table("out.parquet")
    assert after.column_names == [*before.column_names, *OURS]
    assert after.schema.types[: len(VALUES)] == before.schema.types
    for name in VALUES.keys() - {"nan", "object"}:
        assert after[name].to_pylist() == before[name].to_pylist(), name
    assert after["nan"].to_pylist() == [None, None]


@pytest.mark.parametrize("out", ["stdout", "jsonl"])
def test_what_json_cannot_hold_becomes_text_or_null(out: str, typed: list[str], bundle: Path) -> None:
    first, second = kept(out, predicted(bundle, *typed, *output_flags(out)))
    assert first == AS_JSON
    assert second == dict.fromkeys(VALUES)


def test_lists_and_objects_are_json_in_delimited_files(typed: list[str], bundle: Path) -> None:
    first, second = kept("csv", predicted(bundle, *typed, *output_flags("csv")))
    assert first == {
        name: None if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)
        for name, value in {**AS_JSON, "infinite": "inf"}.items()
    }
    assert set(second.values()) == {None}


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None], pa.int64(), [1, None]),
        ([2**53 + 1, math.nan], pa.int64(), [2**53 + 1, None]),
        ([1, 0.5], pa.float64(), [1.0, 0.5]),
        ([True, None], pa.bool_(), [True, None]),
        ([1, "a"], pa.string(), ["1", "a"]),
        ([2**70, 1], pa.string(), [str(2**70), "1"]),
        ([True, 1], pa.string(), ["True", "1"]),
        ([[1], {"a": math.inf}], pa.string(), ["[1]", '{"a": null}']),
        (["half \ud83d", ""], pa.string(), ["half \\ud83d", ""]),
    ],
)
def test_parquet_has_the_types_of_json_values(
    values: list[Any], kind: pa.DataType, expected: list[Any], bundle: Path
) -> None:
    flags = write_table(Path("in.jsonl"), {"text": ["a", "b"], "x\ud83d": values})
    predicted(bundle, *flags, *output_flags("parquet"))
    column = pq.read_table("out.parquet")["x\\ud83d"]
    assert (column.type, column.to_pylist()) == (kind, expected)


def test_files_of_other_types_have_a_type_in_common(bundle: Path) -> None:
    """Numbers stay numbers where one type holds them all; everything else is text."""
    small, large = pa.array([1], pa.int8()), pa.array([2**62], pa.int64())
    parts = [
        write_table(Path("a.parquet"), {"n": small, "x": small, "mixed": pa.array(["a"], pa.large_string())}),
        write_table(Path("b.parquet"), {"n": large, "x": pa.array([0.5]), "mixed": large}),
        write_table(Path("c.csv"), {"mixed": ["c"]}),
    ]
    result = predicted(bundle, "--text-column", "mixed", *itertools.chain(*parts), *output_flags("parquet"))
    table = pq.read_table("out.parquet")
    assert table.schema.types[:3] == [pa.int64(), pa.float64(), pa.string()]
    assert [table[name].to_pylist() for name in ("n", "x", "mixed")] == [
        [1, 2**62, None],
        [1.0, 0.5, None],
        ["a", str(2**62), "c"],
    ]
    assert "type int" in result.stderr


@pytest.mark.parametrize("out", OUTPUTS)
def test_odd_json_is_kept_as_it_is(out: str, bundle: Path) -> None:
    deep = 400
    Path("in.jsonl").write_text(
        '{"text": "a", "deep": ' + "[" * deep + "NaN" + "]" * deep + ', "half": "\\ud83d", "half": "\\udc00"}\n'
    )
    (row,) = kept(out, predicted(bundle, "--input", "in.jsonl", *output_flags(out)))
    is_json = out in ("stdout", "jsonl")
    assert row["half"] == ("\udc00" if is_json else "\\udc00")
    nested = json.dumps(row["deep"]) if is_json else row["deep"]
    assert nested == "[" * deep + "null" + "]" * deep


@pytest.mark.parametrize("out", ["stdout", "csv"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_two_columns_of_one_name_are_refused(kind: str, out: str, bundle: Path) -> None:
    if kind == "csv":
        write_delimited(Path("in.csv"), [("text", "", ""), ("a", "b", "c")])
    else:
        arrays = [pa.array(["a"]), pa.array([1]), pa.array([2])]
        pq.write_table(pa.Table.from_arrays(arrays, names=["text", "n", "n"]), "in.parquet")
    result = predict(bundle, "--input", f"in.{kind}", *output_flags(out))
    assert_refused(result, f"in.{kind}", "Rename one of them")


@pytest.mark.parametrize(("kind", "value"), [(pa.date32(), 5_000_000), (pa.timestamp("s"), 2**40)])
def test_a_date_that_python_does_not_know_is_refused(kind: pa.DataType, value: int, bundle: Path) -> None:
    days = pa.array([value], pa.int32() if kind == pa.date32() else pa.int64()).view(kind)
    result = predict(bundle, *write_table(Path("in.parquet"), {"text": ["a"], "day": days}))
    assert_refused(result, "in.parquet", "out of range")


# Hostile texts


HOSTILE = [
    'she said "no", twice',
    '"',
    "'",
    ",",
    "a;b\tc|d",
    "two\nlines",
    "\nlines around\n",
    "=1+1",
    "\\N \\t \\",
    "null",
    "NaN",
    "  blanks around  ",
    "😀 👩\u200d👩\u200d👧 🏴\U000e0067\U000e0062\U000e007f",
    "مرحبا بالعالم, שלום",
    "\u202eright to left\u202c",
    "cafe\u0301 ﬁ ﷽",
    "bell\x07 escape\x1b[31m \x01\x7f\x1c",
    "other \u2028 breaks \x85 and \x0b \x0c",
    "\ufeffmark",
    "shares rise " * 8_400,  # 100 kB
]
CARRIAGE_RETURNS = ["carriage\rreturn", "windows\r\nbreak", "\r.", "old\rnew\n"]


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_hostile_texts_come_out_as_they_went_in(kind: str, out: str, bundle: Path) -> None:
    arguments, _ = given_as(kind, HOSTILE)
    result = predicted(bundle, *output_flags(out), *arguments)
    assert_right(read_output(out, result), bundle, list(HOSTILE))


@pytest.mark.parametrize("out", OUTPUTS)
def test_carriage_returns_come_out_as_they_went_in(out: str, bundle: Path) -> None:
    arguments, _ = given_as("jsonl", CARRIAGE_RETURNS)
    result = predicted(bundle, *output_flags(out), *arguments)
    assert_right(read_output(out, result), bundle, list(CARRIAGE_RETURNS))


READABLE = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")


@pytest.mark.parametrize("out", OUTPUTS[1:])
@given(texts=st.lists(st.none() | st.text(READABLE, min_size=1), min_size=1, max_size=5))
def test_any_text_reads_back_from_any_file(out: str, texts: list[str | None]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"out.{out}"
        with predictions_file(path, ["yes", "no"]) as write:
            for part in classify(Even(), ((text, {}) for text in texts), at_once=2):
                write(part)
        if out == "parquet":
            found = pq.read_table(path)["text"].to_pylist()
        elif out == "jsonl":
            found = [json.loads(line)["text"] for line in path.read_bytes().split(b"\n")[:-1]]
        else:
            with path.open(encoding="utf-8", newline="") as file:
                found = [row["text"] or None for row in csv.DictReader(file, delimiter=DELIMITERS[out], strict=True)]
    assert found == texts


@pytest.mark.parametrize("kind", ["arguments", "stdin", "txt"])
def test_hostile_lines_come_out_as_they_went_in(kind: str, setfit_folder: Path) -> None:
    texts = [text for text in HOSTILE if "\n" not in text and not text.startswith("\ufeff")]
    arguments, stdin = given_as(kind, texts)
    result = predicted(setfit_folder, *arguments, stdin=stdin)
    assert_right(read_output("stdout", result), setfit_folder, list(texts))


@pytest.mark.parametrize("kind", ["stdin", "txt", "jsonl", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_text(kind: str, bundle: Path) -> None:
    arguments, stdin = given_as(kind, TEXTS[:2])
    if stdin is None:
        Path(arguments[1]).write_bytes(b"\xef\xbb\xbf" + Path(arguments[1]).read_bytes())
    else:
        stdin = f"\ufeff{stdin}"
    result = predicted(bundle, *arguments, stdin=stdin)
    assert_right(read_output("stdout", result), bundle, list(TEXTS[:2]))


def test_an_argument_that_is_no_unicode_is_told(bundle: Path) -> None:
    result = predict(bundle, "caf\udce9")  # what Python makes of a byte of another encoding
    assert result.exit_code in (0, 2), result.exception
    assert "Traceback" not in result.stderr
    if result.exit_code == 0:
        assert [row.label for row in read_output("stdout", result)] == [None]


# Thresholds


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_a_label_below_the_threshold_is_null(threshold: float, out: str, bundle: Path) -> None:
    texts = [*TEXTS, *pool_signals().texts]
    arguments, _ = given_as("jsonl", texts)
    result = predicted(bundle, *output_flags(out), "--threshold", str(threshold), *arguments)
    best = probabilities_of(bundle, texts).max(axis=1)
    rows = read_output(out, result)
    assert [row.label is not None for row in rows] == (best >= threshold).tolist()
    assert [max((row.probabilities or {}).values()) for row in rows] == pytest.approx(best.tolist(), abs=2e-6)
    if threshold in (0, 1):
        assert {row.label is None for row in rows} == {threshold == 1}


@pytest.mark.parametrize("threshold", ["-0.1", "1.1", "inf", "nan", "half"])
def test_a_threshold_that_is_no_probability_is_refused(threshold: str, bundle: Path) -> None:
    result = predict(bundle, "a text", "--threshold", threshold)
    assert_refused(result, "--threshold")
    assert result.stdout == ""


# Whole files, or none


@pytest.mark.parametrize("name", ["out.xlsx", "out.txt", "out", "out.csv.gz", ".csv"])
def test_an_output_of_no_known_kind_is_refused_first(name: str, tmp_path: Path) -> None:
    result = predict("./nowhere", "--input", "nowhere.csv", "--output", name)
    assert_refused(result, name, ".jsonl", ".csv", ".parquet")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["in.csv", "./in.csv", "folder/../in.csv", "link.csv"])
def test_an_input_is_not_written_over(name: str, bundle: Path, tmp_path: Path) -> None:
    write_delimited(Path("in.csv"), [("text",), ("a",)])
    Path("folder").mkdir()
    Path("link.csv").symlink_to("in.csv")
    before = tree(tmp_path)
    result = predict(bundle, "-i", "in.csv", "--output", name)
    assert_refused(result, "both --input and --output", "--output")
    assert tree(tmp_path) == before


def test_a_missing_input_is_told_before_anything_is_read(tmp_path: Path) -> None:
    Path("in.txt").write_text("a\n", encoding="utf-8")
    result = predict("./nowhere", "-i", "in.txt", "-i", "nowhere.csv", "-o", "out.csv")
    assert_refused(result, "There is no file nowhere.csv")
    assert set(tree(tmp_path)) == {"in.txt"}


BROKEN: dict[str, tuple[bytes, str]] = {
    "in.jsonl": (b'{"text": "a"}\n' * 4999 + b"{broken\n" + b'{"text": "a"}\n', "in.jsonl, line 5000"),
    "in.csv": (b"text\n" + b"a\n" * 4998 + b"a,b\n", "in.csv, line 5000"),
    "in.txt": (b"a\n" * 4999 + b"caf\xe9\n", "in.txt, line 5000"),
    "stdin": (b"a\n" * 4999 + b"caf\xe9\n", "stdin is not UTF-8"),
}


@pytest.mark.parametrize("earlier", [None, b"of an earlier run"])
@pytest.mark.parametrize("out", OUTPUTS[1:])
@pytest.mark.parametrize("name", BROKEN)
def test_an_input_that_breaks_half_way_leaves_no_half_output(
    name: str, out: str, earlier: bytes | None, bundle: Path, tmp_path: Path
) -> None:
    content, says = BROKEN[name]
    if name != "stdin":
        Path(name).write_bytes(content)
    if earlier is not None:
        Path(f"out.{out}").write_bytes(earlier)
    before = tree(tmp_path)
    arguments = [] if name == "stdin" else ["--input", name]
    assert_refused(predict(bundle, *arguments, *output_flags(out), stdin=content), says)
    assert tree(tmp_path) == before


def test_what_came_before_a_broken_row_is_on_stdout(bundle: Path) -> None:
    Path("in.jsonl").write_bytes(BROKEN["in.jsonl"][0])
    result = predict(bundle, "--input", "in.jsonl")
    assert_refused(result, "in.jsonl, line 5000")
    rows = read_output("stdout", result)
    assert 4999 - CHUNK_SIZE <= len(rows) <= 4999
    assert {row.text for row in rows} == {"a"}


@pytest.mark.parametrize("out", OUTPUTS[1:])
def test_an_earlier_output_is_replaced(out: str, bundle: Path, tmp_path: Path) -> None:
    Path(f"out.{out}").write_bytes(b"of an earlier run")
    result = predicted(bundle, *TEXTS, *output_flags(out))
    assert_right(read_output(out, result), bundle, list(TEXTS))
    assert set(tree(tmp_path)) == {f"out.{out}"}


@pytest.mark.parametrize("out", OUTPUTS[1:])
def test_a_folder_that_is_not_there_is_told(out: str, bundle: Path, tmp_path: Path) -> None:
    result = predict(bundle, "a text", "--output", f"nowhere/out.{out}")
    assert_refused(result, f"Cannot write nowhere/out.{out}", "No such file or directory")
    assert tree(tmp_path) == {}


def test_a_folder_in_the_place_of_the_output_is_told(bundle: Path, tmp_path: Path) -> None:
    Path("out.csv").mkdir()
    Path("out.csv/mine.txt").write_text("mine", encoding="utf-8")
    before = tree(tmp_path)
    assert_refused(predict(bundle, "a text", "--output", "out.csv"), "Cannot write out.csv")
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o555)
    result = predict(bundle, "a text", "--output", folder / "out.csv")
    assert_refused(result, f"Cannot write {folder}/out.csv", "Permission is missing")


def test_a_read_only_file_system_is_told(bundle: Path, mount: Callable[[str], Path]) -> None:
    folder = mount("ro,size=64k")
    result = predict(bundle, "a text", "--output", folder / "out.csv")
    assert_refused(result, f"Cannot write {folder}/out.csv", "The file system is read-only")


@pytest.mark.parametrize("out", OUTPUTS[1:])
def test_a_full_disk_is_told(out: str, bundle: Path, mount: Callable[[str], Path]) -> None:
    folder = mount("size=64k")
    (folder / f"out.{out}").write_bytes(b"of an earlier run")
    arguments, _ = given_as("txt", [f"{i} {i * 7919 % 10007} {i * i}" for i in range(6000)])
    before = tree(folder)
    result = predict(bundle, *arguments, "--output", folder / f"out.{out}")
    assert_refused(result, f"Cannot write {folder}/out.{out}", "The disk is full")
    assert tree(folder) == before


@pytest.mark.parametrize("out", OUTPUTS[1:])
def test_a_disk_that_fills_up_is_told(out: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = Path.open

    def fail_on_output(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> IO[Any]:
        if path.name.startswith(f".out.{out}."):
            return Full(path, mode)
        return opened(path, mode, *arguments, **named)

    Path(f"out.{out}").write_bytes(b"of an earlier run")
    before = tree(tmp_path)
    monkeypatch.setattr(Path, "open", fail_on_output)
    assert_refused(predict(bundle, "a text", *output_flags(out)), f"Cannot write out.{out}", "The disk is full")
    assert tree(tmp_path) == before


# Streams


class Counted(str):
    """A text that is counted as long as anybody holds it."""

    alive = 0
    __slots__ = ()

    def __init__(self, _: str) -> None:
        Counted.alive += 1

    def __del__(self) -> None:
        Counted.alive -= 1


class Even:
    """A classifier that finds everything equally probable."""

    batch_size = 32

    def __init__(self) -> None:
        self.labels = ["yes", "no"]
        self.most = 0

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.most = max(self.most, len(texts))
        return np.full((len(texts), 2), 0.5, np.float32)


@pytest.mark.parametrize("at_once", [1, 100, CHUNK_SIZE])
def test_however_many_texts_come_few_are_held(at_once: int) -> None:
    total = 200_000 if at_once == CHUNK_SIZE else 2_000
    read, most_alive, classifier = 0, 0, Even()

    def rows() -> Iterator[tuple[str | None, dict[str, str]]]:
        nonlocal read, most_alive
        for i in range(total):
            read += 1
            yield None if i % 10 == 3 else Counted(f"text {i}"), {"other": "column"}
            most_alive = max(most_alive, Counted.alive)

    done = 0
    for part in classify(classifier, rows(), at_once=at_once):
        done += len(part.texts)
        assert len(part.texts) == len(part.labels) == len(part.probabilities) <= at_once
        assert read == done  # nothing is read ahead
        del part
    assert done == total
    assert classifier.most <= at_once
    assert most_alive <= 2 * at_once  # those just answered, and those that take their place


def test_rows_without_text_never_reach_the_classifier() -> None:
    class Strict(Even):
        def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            assert all(isinstance(text, str) for text in texts)
            return np.tile(np.array([[0.25, 0.75]], np.float32), (len(texts), 1))

    (part,) = classify(Strict(), [(None, {}), ("a", {}), (None, {"id": 1}), ("b", {})])
    assert part.texts == [None, "a", None, "b"]
    assert part.labels == [None, "no", None, "no"]
    assert part.columns == [{}, {}, {"id": 1}, {}]
    assert np.isnan(part.probabilities).all(axis=1).tolist() == [True, False, True, False]
    assert list(classify(Strict(), [])) == []


def bare_python(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that cannot import torch nor what is built on it."""
    folder = tmp_path / "bare"
    folder.mkdir()
    modules = ["torch", "setfit", "sentence_transformers", "transformers"]
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules}))\n")
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    return {**os.environ, "PYTHONPATH": path}


@pytest.mark.parametrize(("kind", "out"), [("arguments", "stdout"), ("csv", "parquet"), ("jsonl", "csv")])
def test_a_bundle_is_run_without_torch(kind: str, out: str, bundle: Path, tmp_path: Path) -> None:
    environment = bare_python(tmp_path)
    arguments, _ = given_as(kind, TEXTS)
    command = [sys.executable, "-m", "setfit_kd", "predict", str(bundle), *output_flags(out), *arguments]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    result = Result(CliRunner(), done.stdout, done.stderr, done.stdout, None, 0, None)
    assert_right(read_output(out, result), bundle, list(TEXTS))


def test_answers_come_while_texts_still_come(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "setfit_kd", "predict", str(bundle)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=bare_python(tmp_path)
    ) as process:
        stop = threading.Timer(60, process.kill)
        stop.start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"a text\n" * CHUNK_SIZE)
        process.stdin.flush()
        first = [process.stdout.readline() for _ in range(CHUNK_SIZE)]
        process.stdin.write("der Schluß\n".encode())
        rest, stderr = process.communicate()
        stop.cancel()
    assert process.returncode == 0, stderr.decode()
    assert {json.loads(line)["text"] for line in first} == {"a text"}
    assert json.loads(rest)["text"] == "der Schluß"


def test_a_reader_who_has_seen_enough_ends_it_quietly(bundle: Path, tmp_path: Path) -> None:
    Path("in.txt").write_text("a text\n" * 20_000, encoding="utf-8")
    command = [sys.executable, "-m", "setfit_kd", "predict", str(bundle), "-q", "--input", "in.txt"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=bare_python(tmp_path)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
        process.wait(60)
    assert "Traceback" not in said
    assert "Exception ignored" not in said


# Bundles that cannot be used


def change_manifest(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}), encoding="utf-8")

    return change


def change_file(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_file("manifest.json", halve), "manifest.json cannot be read"),
        (change_file("manifest.json", lambda path: path.write_text("[]")), "manifest.json is not the manifest"),
        (change_file("manifest.json", Path.unlink), "broken"),
        (change_file("labels.json", Path.unlink), "labels.json cannot be read"),
        (change_file("tokenizer.json", Path.unlink), "tokenizer.json cannot be read"),
        (change_file("embeddings.safetensors", Path.unlink), "embeddings.safetensors cannot be read"),
        (change_file("embeddings.safetensors", halve), "embeddings.safetensors is not what it was"),
        (change_file("head.safetensors", scribble), "head.safetensors is not what it was"),
        (change_file("labels.json", lambda path: path.write_text('["a", "b"]')), "labels.json is not what it was"),
        (change_manifest(format=99), "of format 99"),
        (change_manifest(kind="magic"), "of kind 'magic'"),
        (change_manifest(files={"../../secret": ""}), "'../../secret'"),
        (change_manifest(files={}), "does not name labels.json"),
        (change_manifest(prefix=None), "prefix"),
    ],
)
def test_a_broken_bundle_is_told(change: Callable[[Path], object], says: str, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, "broken")
    change(Path("broken"))
    before = tree(tmp_path)
    assert_refused(predict("broken", "a text", "--output", "out.csv"), says)
    assert tree(tmp_path) == before


def test_a_bundle_that_needs_onnxruntime_says_so(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="the extra onnx is not installed")
    signals = pool_signals()
    model = train_student(signals, tiny_student, labeled=few_labels(), **QUICK)
    export_bundle(model, tmp_path / "bundle", texts=signals.texts, format="onnx")
    found = predicted("bundle", signals.texts[0])
    assert json.loads(found.stdout)["label"] == model.predict([signals.texts[0]])[0]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = predict("bundle", "a text")
    assert result.exit_code == 69
    assert "needs onnxruntime" in result.stderr
    assert "pip install onnxruntime" in result.stderr
    assert "Traceback" not in result.stderr


# Threads


@pytest.fixture
def _threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("model", ["bundle", "setfit"])
def test_the_number_of_threads_changes_no_answer(model: str, models: dict[str, Path]) -> None:
    for threads in ("1", "2"):
        result = predicted(models[model], "--threads", threads, *TEXTS)
        assert_right(read_output("stdout", result), models[model], list(TEXTS))


def test_a_setfit_model_takes_no_more_threads_than_allowed(
    setfit_folder: Path,
    _threads_as_before: None,  # noqa: PT019
) -> None:
    import torch

    predicted(setfit_folder, "--threads", "2", "a text")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", ["0", "-1", "many"])
def test_a_number_of_threads_that_cannot_be_is_refused(threads: str, bundle: Path) -> None:
    assert_refused(predict(bundle, "a text", "--threads", threads), "--threads")
