"""Tests of ``setfit-kd predict``: one output row per input row, and complete output files or none."""

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
from checks import assert_refused, corrupt_file, read_tree, truncate_file
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from predictions import DELIMITERS, LABELS, OUTPUT_COLUMNS, Row, predict_ok, read_output, read_records, run_predict
from synthetic import QUICK, few_labels, pool_signals, texts_and_labels

from setfit_kd import train_student
from setfit_kd.export.bundle import export_bundle
from setfit_kd.inference.classifier import open_classifier
from setfit_kd.inference.predict import CHUNK_SIZE, classify, predictions_file

TEXTS = [*texts_and_labels(4)[0], "something else"]
OUTPUTS = ("stdout", "jsonl", "csv", "tsv", "parquet")


# Input and output formats


def write_delimited(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=DELIMITERS[path.suffix[1:]], quoting=csv.QUOTE_ALL).writerows(rows)


def write_input(kind: str, texts: Sequence[Any]) -> tuple[list[str], str | None]:
    """Provide texts as an input of one kind and return the arguments and stdin for the command."""
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


def expected_probabilities(model: Path, texts: list[str]) -> npt.NDArray[np.float32]:
    return open_classifier(model, device="cpu").predict_proba(texts)


def assert_predictions(rows: list[Row], model: Path, texts: list[str | None]) -> None:
    """Check that the rows hold the texts in order and the predictions of the classifier."""
    assert [row.text for row in rows] == texts
    rows_with_text = [row for row in rows if row.text is not None]
    expected = expected_probabilities(model, [text for text in texts if text is not None])
    for row, probabilities in zip(rows_with_text, expected, strict=True):
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
def test_predictions_match_the_classifier_for_every_input_and_output(
    model: str, kind: str, out: str, models: dict[str, Path]
) -> None:
    arguments, stdin = write_input(kind, TEXTS)
    result = predict_ok(models[model], *output_flags(out), *arguments, stdin=stdin)
    assert_predictions(read_output(out, result), models[model], list(TEXTS))


@pytest.mark.parametrize("out", OUTPUTS)
def test_several_chunks_keep_the_order_of_texts(out: str, bundle: Path) -> None:
    texts = [f"match {i} goal {i % 7} shares" for i in range(2 * CHUNK_SIZE + 5)]
    arguments, _ = write_input("jsonl", texts)
    result = predict_ok(bundle, *output_flags(out), *arguments)
    assert_predictions(read_output(out, result), bundle, list(texts))


def test_arguments_precede_files_and_files_keep_their_order(bundle: Path) -> None:
    Path("b.txt").write_text("from b\nagain from b\n", encoding="utf-8")
    write_delimited(Path("a.csv"), [("text",), ("from a",)])
    result = predict_ok(bundle, "--input", "b.txt", "an argument", "--input", "a.csv", "-i", "b.txt", stdin="unread\n")
    texts = ["an argument", "from b", "again from b", "from a", "from b", "again from b"]
    assert_predictions(read_output("stdout", result), bundle, list(texts))


def test_several_text_columns_are_joined(bundle: Path) -> None:
    write_delimited(Path("in.csv"), [("title", "body"), ("match", "goal"), ("shares", ""), ("", "")])
    result = predict_ok(bundle, "--input", "in.csv", "--text-column", "body,title")
    assert_predictions(read_output("stdout", result), bundle, ["goal match", "shares", None])


def test_missing_text_column_is_reported(bundle: Path, tmp_path: Path) -> None:
    write_delimited(Path("in.csv"), [("title",), ("a",)])
    result = run_predict(bundle, "--input", "in.csv", "--output", "out.csv")
    assert_refused(result, "in.csv", "no column 'text'", "'title'", "--text-column")
    assert set(read_tree(tmp_path)) == {"in.csv"}


# Rows without text


INVISIBLE = "\u200b\u2060\ufeff"
MISSING_TEXTS: list[tuple[str, Any]] = [
    *itertools.product(["txt", "stdin", "csv", "tsv", "jsonl", "parquet", "arguments"], ["", "  \t ", INVISIBLE]),
    *itertools.product(["jsonl"], [None, 7, 1.5, float("nan"), True, ["a text"], {"text": "a text"}, "half \ud83d"]),
    ("parquet", None),
]


@pytest.mark.parametrize(("kind", "missing"), MISSING_TEXTS, ids=repr)
def test_row_without_text_has_no_label(kind: str, missing: Any, bundle: Path) -> None:
    arguments, stdin = write_input(kind, [TEXTS[0], missing, TEXTS[1]])
    result = predict_ok(bundle, *arguments, stdin=stdin)
    assert_predictions(read_output("stdout", result), bundle, [TEXTS[0], None, TEXTS[1]])


@pytest.mark.parametrize(
    ("kind", "location"),
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
def test_rows_without_text_are_reported_once(kind: str, location: str, out: str, bundle: Path) -> None:
    arguments, stdin = write_input(kind, [TEXTS[0], "", TEXTS[1]])
    result = predict_ok(bundle, *output_flags(out), "-q", *arguments, stdin=stdin)
    assert result.stderr.count("Warning: ") == 1
    assert location in result.stderr
    assert "get no prediction" in result.stderr


def test_many_rows_without_text_are_counted(bundle: Path) -> None:
    arguments, _ = write_input("jsonl", [TEXTS[0], *[None] * 12])
    result = predict_ok(bundle, "-q", *arguments)
    for fragment in ("in.jsonl", "line 2:", "line 3:", "line 4:", "and 9 more"):
        assert fragment in result.stderr
    assert_predictions(read_output("stdout", result), bundle, [TEXTS[0], *[None] * 12])


def test_rows_without_text_are_reported_per_file(bundle: Path) -> None:
    first, _ = write_input("txt", ["", TEXTS[0]])
    second, _ = write_input("csv", [TEXTS[1]])
    third, _ = write_input("jsonl", [TEXTS[2], None])
    result = predict_ok(bundle, "-q", *first, *second, *third)
    assert_predictions(read_output("stdout", result), bundle, [None, TEXTS[0], TEXTS[1], TEXTS[2], None])
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert ["in.txt, line 1" in warnings[0], "in.jsonl, line 2" in warnings[1], len(warnings)] == [True, True, 2]


@pytest.mark.parametrize("out", OUTPUTS)
def test_rows_without_text_are_written_to_every_output(out: str, bundle: Path) -> None:
    arguments, _ = write_input("parquet", pa.array([None, TEXTS[0], None], pa.string()))
    result = predict_ok(bundle, *output_flags(out), *arguments)
    assert_predictions(read_output(out, result), bundle, [None, TEXTS[0], None])


@pytest.mark.parametrize("out", OUTPUTS)
def test_numbers_as_texts_get_no_labels(out: str, bundle: Path) -> None:
    arguments, _ = write_input("parquet", [1, 2, 3])
    result = predict_ok(bundle, "-q", *output_flags(out), *arguments)
    assert_predictions(read_output(out, result), bundle, [None, None, None])
    assert "in.parquet, row 1: expected a string as text, got int" in result.stderr


def test_null_is_an_empty_cell_in_delimited_files(bundle: Path) -> None:
    arguments, _ = write_input("jsonl", [None])
    predict_ok(bundle, "--output", "out.csv", *arguments)
    assert Path("out.csv").read_text(encoding="utf-8").splitlines()[1] == "," * (2 + len(LABELS))


# Other columns of the input


def write_table(path: Path, columns: dict[str, Any]) -> list[str]:
    """Write columns as a file in the format of the file extension and return the flags for this input."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        write_delimited(path, [list(columns), *zip(*columns.values(), strict=True)])
    return ["--input", str(path)]


def other_columns(kind: str, result: Result) -> list[dict[str, Any]]:
    """Read the other columns of the input from each row of an output."""
    n_output_columns = 3 if kind in ("stdout", "jsonl") else len(OUTPUT_COLUMNS)
    return [dict(list(record.items())[:-n_output_columns]) for record in read_records(kind, result)]


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_other_columns_are_copied_in_order(kind: str, out: str, bundle: Path) -> None:
    n, texts = CHUNK_SIZE + 2, [TEXTS[0], " "]
    columns = {
        "id": [f"id {row}" for row in range(n)],
        "text": [texts[row % 2] for row in range(n)],
        "": ['=1,\t"\r\n\x1b'] * n,
        "label": ["gold"] * n,
    }
    result = predict_ok(bundle, *write_table(Path(f"in.{kind}"), columns), *output_flags(out))
    expected = [
        {"id": name, "": unnamed, "input_label": gold}
        for name, unnamed, gold in zip(columns["id"], columns[""], columns["label"], strict=True)
    ]
    copied = other_columns(out, result)
    assert copied == expected
    assert [list(row) for row in copied] == [list(row) for row in expected]
    rows = read_output(out, result)
    assert [row.text for row in rows[:2]] == [TEXTS[0], None]
    assert [row.label is None for row in rows[:2]] == [False, True]


RESERVED_NAMES: list[tuple[list[str], str, str, list[str]]] = [
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


@pytest.mark.parametrize(("columns", "text_column", "out", "expected"), RESERVED_NAMES, ids=repr)
def test_columns_with_reserved_names_are_renamed(
    columns: list[str], text_column: str, out: str, expected: list[str], bundle: Path
) -> None:
    flags = write_table(Path("in.csv"), {name: [f"a {name}"] for name in columns})
    for kind in ("jsonl", "csv") if out == "both" else (out,):
        result = predict_ok(bundle, *flags, "--text-column", text_column, *output_flags(kind))
        assert [list(row) for row in other_columns(kind, result)] == [expected]
        assert read_output(kind, result)[0].text == " ".join(f"a {name}" for name in text_column.split(","))


def test_renamed_columns_have_the_same_name_in_all_json_lines(bundle: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "input_label": 2, "label": 3}, {"text": "c", "input_label": 4}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    copied = other_columns("stdout", predict_ok(bundle, "-i", "in.jsonl"))
    assert copied == [{"input_label": 1}, {"input_input_label": 2, "input_label": 3}, {"input_input_label": 4}]


@pytest.mark.parametrize("out", OUTPUTS)
def test_files_with_different_columns_give_their_union(out: str, bundle: Path) -> None:
    flags = write_table(Path("a.csv"), {"id": ["7"], "text": ["a text"]})
    Path("b.jsonl").write_text('{"text": "b"}\n' * CHUNK_SIZE + '{"late": "x", "text": "c"}\n', encoding="utf-8")
    Path("c.txt").write_text("a line\n", encoding="utf-8")
    result = predict_ok(bundle, "an argument", *flags, "-i", "b.jsonl", "-i", "c.txt", *output_flags(out))
    empty: dict[str, Any] = {} if out in ("stdout", "jsonl") else {"id": None, "late": None}
    expected = [empty, {**empty, "id": "7"}, *[empty] * CHUNK_SIZE, {**empty, "late": "x"}, empty]
    assert other_columns(out, result) == expected


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
def typed_input(tmp_path: Path) -> list[str]:
    """Flags for a Parquet file with columns of many types, one row of values and one of nulls."""
    columns: dict[str, Any] = {name: pa.array([value, None], kind) for name, (kind, value) in VALUES.items()}
    return write_table(tmp_path / "in.parquet", {**columns, "text": ["a", "b"]})


def test_parquet_output_keeps_the_types_of_parquet_input(typed_input: list[str], bundle: Path) -> None:
    predict_ok(bundle, *typed_input, *output_flags("parquet"))
    before, after = pq.read_table("in.parquet").drop_columns("text"), pq.read_table("out.parquet")
    assert after.column_names == [*before.column_names, *OUTPUT_COLUMNS]
    assert after.schema.types[: len(VALUES)] == before.schema.types
    for name in VALUES.keys() - {"nan", "object"}:
        assert after[name].to_pylist() == before[name].to_pylist(), name
    assert after["nan"].to_pylist() == [None, None]


@pytest.mark.parametrize("out", ["stdout", "jsonl"])
def test_values_unknown_to_json_become_text_or_null(out: str, typed_input: list[str], bundle: Path) -> None:
    first, second = other_columns(out, predict_ok(bundle, *typed_input, *output_flags(out)))
    assert first == AS_JSON
    assert second == dict.fromkeys(VALUES)


def test_lists_and_objects_are_json_in_delimited_files(typed_input: list[str], bundle: Path) -> None:
    first, second = other_columns("csv", predict_ok(bundle, *typed_input, *output_flags("csv")))
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
def test_parquet_types_are_inferred_from_json_values(
    values: list[Any], kind: pa.DataType, expected: list[Any], bundle: Path
) -> None:
    flags = write_table(Path("in.jsonl"), {"text": ["a", "b"], "x\ud83d": values})
    predict_ok(bundle, *flags, *output_flags("parquet"))
    column = pq.read_table("out.parquet")["x\\ud83d"]
    assert (column.type, column.to_pylist()) == (kind, expected)


def test_columns_of_different_types_get_a_common_type(bundle: Path) -> None:
    """Numbers stay numbers if one type can represent all of them; everything else becomes text."""
    small, large = pa.array([1], pa.int8()), pa.array([2**62], pa.int64())
    parts = [
        write_table(Path("a.parquet"), {"n": small, "x": small, "mixed": pa.array(["a"], pa.large_string())}),
        write_table(Path("b.parquet"), {"n": large, "x": pa.array([0.5]), "mixed": large}),
        write_table(Path("c.csv"), {"mixed": ["c"]}),
    ]
    result = predict_ok(bundle, "--text-column", "mixed", *itertools.chain(*parts), *output_flags("parquet"))
    table = pq.read_table("out.parquet")
    assert table.schema.types[:3] == [pa.int64(), pa.float64(), pa.string()]
    assert [table[name].to_pylist() for name in ("n", "x", "mixed")] == [
        [1, 2**62, None],
        [1.0, 0.5, None],
        ["a", str(2**62), "c"],
    ]
    assert "got int" in result.stderr


@pytest.mark.parametrize("out", OUTPUTS)
def test_deeply_nested_json_and_surrogates_are_preserved(out: str, bundle: Path) -> None:
    deep = 400
    Path("in.jsonl").write_text(
        '{"text": "a", "deep": ' + "[" * deep + "NaN" + "]" * deep + ', "half": "\\ud83d", "half": "\\udc00"}\n'
    )
    (row,) = other_columns(out, predict_ok(bundle, "--input", "in.jsonl", *output_flags(out)))
    is_json = out in ("stdout", "jsonl")
    assert row["half"] == ("\udc00" if is_json else "\\udc00")
    nested = json.dumps(row["deep"]) if is_json else row["deep"]
    assert nested == "[" * deep + "null" + "]" * deep


@pytest.mark.parametrize("out", ["stdout", "csv"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_duplicate_column_names_are_rejected(kind: str, out: str, bundle: Path) -> None:
    if kind == "csv":
        write_delimited(Path("in.csv"), [("text", "", ""), ("a", "b", "c")])
    else:
        arrays = [pa.array(["a"]), pa.array([1]), pa.array([2])]
        pq.write_table(pa.Table.from_arrays(arrays, names=["text", "n", "n"]), "in.parquet")
    result = run_predict(bundle, "--input", f"in.{kind}", *output_flags(out))
    assert_refused(result, f"in.{kind}", "Rename one of them")


@pytest.mark.parametrize(("kind", "value"), [(pa.date32(), 5_000_000), (pa.timestamp("s"), 2**40)])
def test_dates_outside_the_range_of_python_are_rejected(kind: pa.DataType, value: int, bundle: Path) -> None:
    days = pa.array([value], pa.int32() if kind == pa.date32() else pa.int64()).view(kind)
    result = run_predict(bundle, *write_table(Path("in.parquet"), {"text": ["a"], "day": days}))
    assert_refused(result, "in.parquet", "out of range")


# Hostile texts


HOSTILE_TEXTS = [
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
def test_hostile_texts_are_written_unchanged(kind: str, out: str, bundle: Path) -> None:
    arguments, _ = write_input(kind, HOSTILE_TEXTS)
    result = predict_ok(bundle, *output_flags(out), *arguments)
    assert_predictions(read_output(out, result), bundle, list(HOSTILE_TEXTS))


@pytest.mark.parametrize("out", OUTPUTS)
def test_carriage_returns_are_written_unchanged(out: str, bundle: Path) -> None:
    arguments, _ = write_input("jsonl", CARRIAGE_RETURNS)
    result = predict_ok(bundle, *output_flags(out), *arguments)
    assert_predictions(read_output(out, result), bundle, list(CARRIAGE_RETURNS))


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")


@pytest.mark.parametrize("out", OUTPUTS[1:])
@given(texts=st.lists(st.none() | st.text(CHARACTERS, min_size=1), min_size=1, max_size=5))
def test_any_text_round_trips_through_any_file(out: str, texts: list[str | None]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"out.{out}"
        with predictions_file(path, ["yes", "no"]) as write:
            for part in classify(UniformClassifier(), ((text, {}) for text in texts), chunk_size=2):
                write(part)
        if out == "parquet":
            read_back = pq.read_table(path)["text"].to_pylist()
        elif out == "jsonl":
            read_back = [json.loads(line)["text"] for line in path.read_bytes().split(b"\n")[:-1]]
        else:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file, delimiter=DELIMITERS[out], strict=True)
                read_back = [row["text"] or None for row in reader]
    assert read_back == texts


@pytest.mark.parametrize("kind", ["arguments", "stdin", "txt"])
def test_hostile_lines_are_written_unchanged(kind: str, setfit_folder: Path) -> None:
    texts = [text for text in HOSTILE_TEXTS if "\n" not in text and not text.startswith("\ufeff")]
    arguments, stdin = write_input(kind, texts)
    result = predict_ok(setfit_folder, *arguments, stdin=stdin)
    assert_predictions(read_output("stdout", result), setfit_folder, list(texts))


@pytest.mark.parametrize("kind", ["stdin", "txt", "jsonl", "csv"])
def test_byte_order_mark_is_removed_from_the_first_text(kind: str, bundle: Path) -> None:
    arguments, stdin = write_input(kind, TEXTS[:2])
    if stdin is None:
        Path(arguments[1]).write_bytes(b"\xef\xbb\xbf" + Path(arguments[1]).read_bytes())
    else:
        stdin = f"\ufeff{stdin}"
    result = predict_ok(bundle, *arguments, stdin=stdin)
    assert_predictions(read_output("stdout", result), bundle, list(TEXTS[:2]))


def test_argument_that_is_not_utf8_does_not_crash(bundle: Path) -> None:
    result = run_predict(bundle, "caf\udce9")  # the surrogate that Python uses for a byte in another encoding
    assert result.exit_code in (0, 2), result.exception
    assert "Traceback" not in result.stderr
    if result.exit_code == 0:
        assert [row.label for row in read_output("stdout", result)] == [None]


# Thresholds


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_label_below_the_threshold_is_null(threshold: float, out: str, bundle: Path) -> None:
    texts = [*TEXTS, *pool_signals().texts]
    arguments, _ = write_input("jsonl", texts)
    result = predict_ok(bundle, *output_flags(out), "--threshold", str(threshold), *arguments)
    highest = expected_probabilities(bundle, texts).max(axis=1)
    rows = read_output(out, result)
    assert [row.label is not None for row in rows] == (highest >= threshold).tolist()
    assert [max((row.probabilities or {}).values()) for row in rows] == pytest.approx(highest.tolist(), abs=2e-6)
    if threshold in (0, 1):
        assert {row.label is None for row in rows} == {threshold == 1}


@pytest.mark.parametrize("threshold", ["-0.1", "1.1", "inf", "nan", "half"])
def test_invalid_threshold_is_rejected(threshold: str, bundle: Path) -> None:
    result = run_predict(bundle, "a text", "--threshold", threshold)
    assert_refused(result, "--threshold")
    assert result.stdout == ""


# Complete files, or none


@pytest.mark.parametrize("name", ["out.xlsx", "out.txt", "out", "out.csv.gz", ".csv"])
def test_unknown_output_extension_is_rejected_first(name: str, tmp_path: Path) -> None:
    result = run_predict("./nowhere", "--input", "nowhere.csv", "--output", name)
    assert_refused(result, name, ".jsonl", ".csv", ".parquet")
    assert read_tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["in.csv", "./in.csv", "folder/../in.csv", "link.csv"])
def test_input_file_is_rejected_as_output(name: str, bundle: Path, tmp_path: Path) -> None:
    write_delimited(Path("in.csv"), [("text",), ("a",)])
    Path("folder").mkdir()
    Path("link.csv").symlink_to("in.csv")
    before = read_tree(tmp_path)
    result = run_predict(bundle, "-i", "in.csv", "--output", name)
    assert_refused(result, "both --input and --output", "--output")
    assert read_tree(tmp_path) == before


def test_missing_input_file_is_reported_first(tmp_path: Path) -> None:
    Path("in.txt").write_text("a\n", encoding="utf-8")
    result = run_predict("./nowhere", "-i", "in.txt", "-i", "nowhere.csv", "-o", "out.csv")
    assert_refused(result, "No such file: nowhere.csv")
    assert set(read_tree(tmp_path)) == {"in.txt"}


INVALID_INPUTS: dict[str, tuple[bytes, str]] = {
    "in.jsonl": (b'{"text": "a"}\n' * 4999 + b"{broken\n" + b'{"text": "a"}\n', "in.jsonl, line 5000"),
    "in.csv": (b"text\n" + b"a\n" * 4998 + b"a,b\n", "in.csv, line 5000"),
    "in.txt": (b"a\n" * 4999 + b"caf\xe9\n", "in.txt, line 5000"),
    "stdin": (b"a\n" * 4999 + b"caf\xe9\n", "stdin is not UTF-8"),
}


@pytest.mark.parametrize("existing", [None, b"existing content"])
@pytest.mark.parametrize("out", OUTPUTS[1:])
@pytest.mark.parametrize("name", INVALID_INPUTS)
def test_invalid_input_row_leaves_no_partial_output(
    name: str, out: str, existing: bytes | None, bundle: Path, tmp_path: Path
) -> None:
    content, message = INVALID_INPUTS[name]
    if name != "stdin":
        Path(name).write_bytes(content)
    if existing is not None:
        Path(f"out.{out}").write_bytes(existing)
    before = read_tree(tmp_path)
    arguments = [] if name == "stdin" else ["--input", name]
    assert_refused(run_predict(bundle, *arguments, *output_flags(out), stdin=content), message)
    assert read_tree(tmp_path) == before


def test_rows_before_an_invalid_row_are_on_stdout(bundle: Path) -> None:
    Path("in.jsonl").write_bytes(INVALID_INPUTS["in.jsonl"][0])
    result = run_predict(bundle, "--input", "in.jsonl")
    assert_refused(result, "in.jsonl, line 5000")
    rows = read_output("stdout", result)
    assert 4999 - CHUNK_SIZE <= len(rows) <= 4999
    assert {row.text for row in rows} == {"a"}


@pytest.mark.parametrize("out", OUTPUTS[1:])
def test_existing_output_is_replaced(out: str, bundle: Path, tmp_path: Path) -> None:
    Path(f"out.{out}").write_bytes(b"existing content")
    result = predict_ok(bundle, *TEXTS, *output_flags(out))
    assert_predictions(read_output(out, result), bundle, list(TEXTS))
    assert set(read_tree(tmp_path)) == {f"out.{out}"}


@pytest.mark.parametrize("out", OUTPUTS[1:])
def test_missing_output_folder_is_reported(out: str, bundle: Path, tmp_path: Path) -> None:
    result = run_predict(bundle, "a text", "--output", f"nowhere/out.{out}")
    assert_refused(result, f"Cannot write nowhere/out.{out}", "No such file or directory")
    assert read_tree(tmp_path) == {}


def test_output_path_that_is_a_folder_is_reported(bundle: Path, tmp_path: Path) -> None:
    Path("out.csv").mkdir()
    Path("out.csv/other.txt").write_text("content", encoding="utf-8")
    before = read_tree(tmp_path)
    assert_refused(run_predict(bundle, "a text", "--output", "out.csv"), "Cannot write out.csv")
    assert read_tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission_is_reported(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    result = run_predict(bundle, "a text", "--output", folder / "out.csv")
    assert_refused(result, f"Cannot write {folder}/out.csv", "No permission to write")


def test_read_only_file_system_is_reported(bundle: Path, mount: Callable[[str], Path]) -> None:
    folder = mount("ro,size=64k")
    result = run_predict(bundle, "a text", "--output", folder / "out.csv")
    assert_refused(result, f"Cannot write {folder}/out.csv", "The file system is read-only")


@pytest.mark.parametrize("out", OUTPUTS[1:])
def test_full_disk_is_reported(out: str, bundle: Path, mount: Callable[[str], Path]) -> None:
    folder = mount("size=64k")
    (folder / f"out.{out}").write_bytes(b"existing content")
    arguments, _ = write_input("txt", [f"{i} {i * 7919 % 10007} {i * i}" for i in range(6000)])
    before = read_tree(folder)
    result = run_predict(bundle, *arguments, "--output", folder / f"out.{out}")
    assert_refused(result, f"Cannot write {folder}/out.{out}", "The disk is full")
    assert read_tree(folder) == before


@pytest.mark.parametrize("out", OUTPUTS[1:])
def test_disk_that_fills_up_is_reported(
    out: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    open_path = Path.open

    def fail_on_output(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> IO[Any]:
        if path.name.startswith(f".out.{out}."):
            return FullDisk(path, mode)
        return open_path(path, mode, *arguments, **options)

    Path(f"out.{out}").write_bytes(b"existing content")
    before = read_tree(tmp_path)
    monkeypatch.setattr(Path, "open", fail_on_output)
    assert_refused(run_predict(bundle, "a text", *output_flags(out)), f"Cannot write out.{out}", "The disk is full")
    assert read_tree(tmp_path) == before


# Streams


class CountedText(str):
    """A text that counts how many of its kind are in memory."""

    alive = 0
    __slots__ = ()

    def __init__(self, _: str) -> None:
        CountedText.alive += 1

    def __del__(self) -> None:
        CountedText.alive -= 1


class UniformClassifier:
    """A classifier that predicts the same probability for all classes and records the largest batch."""

    batch_size = 32

    def __init__(self) -> None:
        self.labels = ["yes", "no"]
        self.max_texts = 0

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.max_texts = max(self.max_texts, len(texts))
        return np.full((len(texts), 2), 0.5, np.float32)


@pytest.mark.parametrize("chunk_size", [1, 100, CHUNK_SIZE])
def test_number_of_texts_in_memory_is_bounded(chunk_size: int) -> None:
    total = 200_000 if chunk_size == CHUNK_SIZE else 2_000
    read, max_alive, classifier = 0, 0, UniformClassifier()

    def rows() -> Iterator[tuple[str | None, dict[str, str]]]:
        nonlocal read, max_alive
        for i in range(total):
            read += 1
            yield None if i % 10 == 3 else CountedText(f"text {i}"), {"other": "column"}
            max_alive = max(max_alive, CountedText.alive)

    n_classified = 0
    for part in classify(classifier, rows(), chunk_size=chunk_size):
        n_classified += len(part.texts)
        assert len(part.texts) == len(part.labels) == len(part.probabilities) <= chunk_size
        assert read == n_classified  # nothing is read ahead
        del part
    assert n_classified == total
    assert classifier.max_texts <= chunk_size
    assert max_alive <= 2 * chunk_size  # the chunk just classified and the next one


def test_rows_without_text_are_not_classified() -> None:
    class Strict(UniformClassifier):
        def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            assert all(isinstance(text, str) for text in texts)
            return np.tile(np.array([[0.25, 0.75]], np.float32), (len(texts), 1))

    (part,) = classify(Strict(), [(None, {}), ("a", {}), (None, {"id": 1}), ("b", {})])
    assert part.texts == [None, "a", None, "b"]
    assert part.labels == [None, "no", None, "no"]
    assert part.columns == [{}, {}, {"id": 1}, {}]
    assert np.isnan(part.probabilities).all(axis=1).tolist() == [True, False, True, False]
    assert list(classify(Strict(), [])) == []


def env_without_torch(tmp_path: Path) -> dict[str, str]:
    """Environment variables for a Python that cannot import torch or the packages that depend on it."""
    folder = tmp_path / "without-torch"
    folder.mkdir()
    modules = ["torch", "setfit", "sentence_transformers", "transformers"]
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules}))\n")
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    return {**os.environ, "PYTHONPATH": path}


@pytest.mark.parametrize(("kind", "out"), [("arguments", "stdout"), ("csv", "parquet"), ("jsonl", "csv")])
def test_bundle_runs_without_torch(kind: str, out: str, bundle: Path, tmp_path: Path) -> None:
    environment = env_without_torch(tmp_path)
    arguments, _ = write_input(kind, TEXTS)
    command = [sys.executable, "-m", "setfit_kd", "predict", str(bundle), *output_flags(out), *arguments]
    process = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr.decode()
    result = Result(CliRunner(), process.stdout, process.stderr, process.stdout, None, 0, None)
    assert_predictions(read_output(out, result), bundle, list(TEXTS))


def test_predictions_are_written_while_stdin_is_open(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "setfit_kd", "predict", str(bundle)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env_without_torch(tmp_path)
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


def test_closed_stdout_ends_the_command_quietly(bundle: Path, tmp_path: Path) -> None:
    Path("in.txt").write_text("a text\n" * 20_000, encoding="utf-8")
    command = [sys.executable, "-m", "setfit_kd", "predict", str(bundle), "-q", "--input", "in.txt"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env_without_torch(tmp_path)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read().decode()
        process.wait(60)
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr


# Damaged bundles


def change_manifest(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}), encoding="utf-8")

    return change


def change_file(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_file("manifest.json", truncate_file), "Cannot read broken/manifest.json"),
        (change_file("manifest.json", lambda path: path.write_text("[]")), "manifest.json is not the manifest"),
        (change_file("manifest.json", Path.unlink), "broken"),
        (change_file("labels.json", Path.unlink), "Cannot read broken/labels.json"),
        (change_file("tokenizer.json", Path.unlink), "Cannot read broken/tokenizer.json"),
        (change_file("embeddings.safetensors", Path.unlink), "Cannot read broken/embeddings.safetensors"),
        (change_file("embeddings.safetensors", truncate_file), "embeddings.safetensors has changed since"),
        (change_file("head.safetensors", corrupt_file), "head.safetensors has changed since"),
        (change_file("labels.json", lambda path: path.write_text('["a", "b"]')), "labels.json has changed since"),
        (change_manifest(format=99), "has format 99"),
        (change_manifest(kind="magic"), "has kind 'magic'"),
        (change_manifest(files={"../../secret": ""}), "'../../secret'"),
        (change_manifest(files={}), "does not list labels.json"),
        (change_manifest(prefix=None), "prefix"),
    ],
)
def test_damaged_bundle_is_reported(
    change: Callable[[Path], object], message: str, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, "broken")
    change(Path("broken"))
    before = read_tree(tmp_path)
    assert_refused(run_predict("broken", "a text", "--output", "out.csv"), message)
    assert read_tree(tmp_path) == before


def test_missing_onnxruntime_is_reported(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="the extra onnx is not installed")
    signals = pool_signals()
    model = train_student(signals, tiny_student, labeled=few_labels(), **QUICK)
    export_bundle(model, tmp_path / "bundle", texts=signals.texts, format="onnx")
    result = predict_ok("bundle", signals.texts[0])
    assert json.loads(result.stdout)["label"] == model.predict([signals.texts[0]])[0]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_predict("bundle", "a text")
    assert result.exit_code == 69
    assert "needs onnxruntime" in result.stderr
    assert "pip install onnxruntime" in result.stderr
    assert "Traceback" not in result.stderr


# Threads


@pytest.fixture
def _restore_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch

    n_threads = torch.get_num_threads()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("model", ["bundle", "setfit"])
def test_number_of_threads_does_not_change_predictions(model: str, models: dict[str, Path]) -> None:
    for threads in ("1", "2"):
        result = predict_ok(models[model], "--threads", threads, *TEXTS)
        assert_predictions(read_output("stdout", result), models[model], list(TEXTS))


def test_number_of_threads_is_limited_for_setfit_models(
    setfit_folder: Path,
    _restore_threads: None,  # noqa: PT019
) -> None:
    import torch

    predict_ok(setfit_folder, "--threads", "2", "a text")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", ["0", "-1", "many"])
def test_invalid_number_of_threads_is_rejected(threads: str, bundle: Path) -> None:
    assert_refused(run_predict(bundle, "a text", "--threads", threads), "--threads")
