"""Tests of ``setfit-kd predict``: one output row per input row, and complete output files or none."""

from __future__ import annotations

import csv
import datetime as dt
import itertools
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checks import assert_refused, read_tree, truncate_file
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from predictions import (
    DELIMITERS,
    LABELS,
    OUTPUT_COLUMNS,
    Row,
    claim_onnx,
    predict_ok,
    read_output,
    read_records,
    run_predict,
)
from synthetic import pool_signals, random_classifier, texts_and_labels

from setfit_kd.export.bundle import export_bundle
from setfit_kd.inference import predict as predict_module
from setfit_kd.inference.classifier import CHUNK_SIZE, TorchClassifier, open_classifier
from setfit_kd.inference.predict import classify, write_predictions
from setfit_kd.models.bodies import load_body
from setfit_kd.models.heads import set_thresholds
from setfit_kd.models.io import save_model
from setfit_kd.models.static import static_body
from setfit_kd.tasks.classification import MULTI_LABEL

TEXTS = [*texts_and_labels(4)[0], "something else"]
OUTPUTS = ("stdout", "jsonl", "csv", "tsv", "parquet")


def write_delimited(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=DELIMITERS[path.suffix[1:]], quoting=csv.QUOTE_ALL).writerows(rows)


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


def write_input(kind: str, texts: Sequence[Any]) -> tuple[list[str], str | None]:
    """Provide texts as an input of one kind and return the arguments and stdin for the command."""
    lines = "".join(f"{text}\n" for text in texts)
    if kind == "arguments":
        return ["--", *texts], None
    if kind == "stdin":
        return [], lines
    if kind == "txt":
        Path("in.txt").write_text(lines, encoding="utf-8")
        return ["--input", "in.txt"], None
    return write_table(Path(f"in.{kind}"), {"text": texts}), None


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


@pytest.mark.parametrize(
    ("model", "kind", "out"),
    [
        *(("bundle", kind, "stdout") for kind in ("arguments", "stdin", "txt", "csv", "tsv", "jsonl", "parquet")),
        *(("bundle", "csv", out) for out in OUTPUTS[1:]),
        ("setfit", "jsonl", "parquet"),
    ],
)
def test_predictions_match_the_classifier_for_every_input_and_output(
    model: str, kind: str, out: str, models: dict[str, Path]
) -> None:
    arguments, stdin = write_input(kind, TEXTS)
    result = predict_ok(models[model], *output_flags(out), *arguments, stdin=stdin)
    assert_predictions(read_output(out, result), models[model], list(TEXTS))


def test_arguments_precede_files_and_files_keep_their_order(bundle: Path) -> None:
    Path("b.txt").write_text("from b\nagain from b\n", encoding="utf-8")
    write_delimited(Path("a.csv"), [("text",), ("from a",)])
    result = predict_ok(bundle, "--input", "b.txt", "an argument", "--input", "a.csv", "-i", "b.txt", stdin="unread\n")
    texts = ["an argument", "from b", "again from b", "from a", "from b", "again from b"]
    assert_predictions(read_output("stdout", result), bundle, list(texts))


# Rows without text


MISSING_TEXTS: list[tuple[str, Any, str]] = [
    ("arguments", "", "the arguments, text 2"),
    ("arguments", "caf\udce9", "the arguments, text 2"),  # the surrogate stands for a byte in another encoding
    ("stdin", "\u200b\u2060\ufeff", "stdin, line 2"),
    ("txt", "  \t ", "in.txt, line 2"),
    ("csv", "\u200b", "in.csv, line 3"),
    ("tsv", "", "in.tsv, line 3"),
    ("parquet", None, "in.parquet, row 2"),
    *(("jsonl", value, "in.jsonl, line 2") for value in [None, 7, float("nan"), ["a text"], "half \ud83d"]),
]


@pytest.mark.parametrize(("kind", "missing", "location"), MISSING_TEXTS, ids=repr)
def test_row_without_text_has_no_label_and_is_reported(kind: str, missing: Any, location: str, bundle: Path) -> None:
    arguments, stdin = write_input(kind, [TEXTS[0], missing, TEXTS[1]])
    result = predict_ok(bundle, "-q", *arguments, stdin=stdin)
    assert_predictions(read_output("stdout", result), bundle, [TEXTS[0], None, TEXTS[1]])
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("Warning: Rows without a usable text get no prediction:")
    assert location in warning


# Other columns of the input


def other_columns(kind: str, result: Result) -> list[dict[str, Any]]:
    """Read the other columns of the input from each row of an output."""
    n_output_columns = 3 if kind in ("stdout", "jsonl") else len(OUTPUT_COLUMNS)
    return [dict(list(record.items())[:-n_output_columns]) for record in read_records(kind, result)]


@pytest.mark.parametrize(
    ("kind", "out"),
    [("csv", "stdout"), ("tsv", "parquet"), ("jsonl", "csv"), ("parquet", "jsonl"), ("parquet", "tsv")],
)
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
    assert [row.text for row in rows] == [TEXTS[0], None] * (n // 2)
    assert [row.label is None for row in rows] == [False, True] * (n // 2)


@pytest.mark.parametrize(
    ("columns", "text_column", "outputs", "expected"),
    [
        (["label", "input_label", "text"], "text", "jsonl csv", ["input_input_label", "input_label"]),
        (["text", "body"], "text,body", "jsonl csv", ["input_text", "body"]),
        (["text", "probabilities", "probability"], "text", "jsonl", ["input_probabilities", "probability"]),
        (["text", "probability_Sports", "probability_x"], "text", "csv", ["input_probability_Sports", "probability_x"]),
    ],
)
def test_columns_with_reserved_names_are_renamed(
    columns: list[str], text_column: str, outputs: str, expected: list[str], bundle: Path
) -> None:
    flags = write_table(Path("in.csv"), {name: [f"a {name}"] for name in columns})
    for kind in outputs.split():
        result = predict_ok(bundle, *flags, "--text-column", text_column, *output_flags(kind))
        assert [list(row) for row in other_columns(kind, result)] == [expected]
        assert read_output(kind, result)[0].text == " ".join(f"a {name}" for name in text_column.split(","))


def test_renamed_columns_have_the_same_name_in_all_json_lines(bundle: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "input_label": 2, "label": 3}, {"text": "c", "input_label": 4}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    copied = other_columns("stdout", predict_ok(bundle, "-i", "in.jsonl"))
    assert copied == [{"input_label": 1}, {"input_input_label": 2, "input_label": 3}, {"input_input_label": 4}]


@pytest.mark.parametrize("out", ["stdout", "csv", "parquet"])
def test_files_with_different_columns_give_their_union(out: str, bundle: Path) -> None:
    flags = write_table(Path("a.csv"), {"id": ["7"], "text": ["a text"]})
    Path("b.jsonl").write_text('{"text": "b"}\n' * CHUNK_SIZE + '{"late": "x", "text": "c"}\n', encoding="utf-8")
    Path("c.txt").write_text("a line\n", encoding="utf-8")
    result = predict_ok(bundle, "an argument", *flags, "-i", "b.jsonl", "-i", "c.txt", *output_flags(out))
    empty: dict[str, Any] = {} if out in ("stdout", "jsonl") else {"id": None, "late": None}
    expected = [empty, {**empty, "id": "7"}, *[empty] * CHUNK_SIZE, {**empty, "late": "x"}, empty]
    assert other_columns(out, result) == expected


VALUES: dict[str, tuple[pa.DataType, Any, Any]] = {
    "big": (pa.int64(), 2**62 + 1, 2**62 + 1),
    "unsigned": (pa.uint64(), 2**64 - 1, 2**64 - 1),
    "half": (pa.float16(), np.float16(1.5), 1.5),
    "day": (pa.date32(), dt.date(2024, 2, 29), "2024-02-29"),
    "moment": (pa.timestamp("ns", "UTC"), 1_234_567_890_123_456_789, "2009-02-13 23:31:30.123456789+00:00"),
    "clock": (pa.time64("us"), dt.time(1, 2, 3, 4), "01:02:03.000004"),
    "length": (pa.duration("ms"), dt.timedelta(seconds=90), "0:01:30"),
    "price": (pa.decimal128(10, 2), Decimal("1.20"), "1.20"),
    "bytes": (pa.binary(), b"caf\xe9", "caf\\xe9"),
    "yes": (pa.bool_(), True, True),
    "list": (pa.list_(pa.date32()), [dt.date(2024, 2, 29)], ["2024-02-29"]),
    "object": (
        pa.struct([("a", pa.float64()), ("b", pa.string())]),
        {"a": math.nan, "b": 'x"'},
        {"a": None, "b": 'x"'},
    ),
    "map": (pa.map_(pa.string(), pa.int8()), [("k", 1)], [["k", 1]]),
    "nan": (pa.float64(), math.nan, None),
    "infinite": (pa.float32(), math.inf, None),
}
"""Arrow types with a value, and the value in JSON."""


def test_values_of_all_types_are_copied(bundle: Path) -> None:
    """Parquet keeps the types; in JSON and delimited files, values without an equivalent become text or null."""
    columns: dict[str, Any] = {name: pa.array([value, None], kind) for name, (kind, value, _) in VALUES.items()}
    flags = write_table(Path("in.parquet"), {**columns, "text": ["a", "b"]})
    predict_ok(bundle, *flags, *output_flags("parquet"))
    before, after = pq.read_table("in.parquet").drop_columns("text"), pq.read_table("out.parquet")
    assert after.column_names == [*before.column_names, *OUTPUT_COLUMNS]
    assert after.schema.types[: len(VALUES)] == before.schema.types
    for name in VALUES.keys() - {"nan", "object"}:
        assert after[name].to_pylist() == before[name].to_pylist(), name
    assert after["nan"].to_pylist() == [None, None]
    first, second = other_columns("stdout", predict_ok(bundle, *flags))
    as_json = {name: value for name, (_, _, value) in VALUES.items()}
    assert (first, second) == (as_json, dict.fromkeys(VALUES))
    first, second = other_columns("csv", predict_ok(bundle, *flags, *output_flags("csv")))
    assert first == {
        name: None if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)
        for name, value in {**as_json, "infinite": "inf"}.items()
    }
    assert set(second.values()) == {None}


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([2**53 + 1, math.nan], pa.int64(), [2**53 + 1, None]),
        ([True, None], pa.bool_(), [True, None]),
        ([1, "a"], pa.string(), ["1", "a"]),
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
    predict_ok(bundle, "--text-column", "mixed", *itertools.chain(*parts), *output_flags("parquet"))
    table = pq.read_table("out.parquet").select(["n", "x", "mixed"])
    assert table.schema.types == [pa.int64(), pa.float64(), pa.string()]
    expected = {"n": [1, 2**62, None], "x": [1.0, 0.5, None], "mixed": ["a", str(2**62), "c"]}
    assert table.to_pydict() == expected


# Hostile texts


HOSTILE_TEXTS = [
    """she said "no", twice; 'a'\tb|c""",
    '"',
    "\n two\nlines \n",
    "\\N \\t \\",
    "NaN",
    "😀 👩\u200d👩\u200d👧 🏴\U000e0067\U000e0062\U000e007f مرحبا שלום cafe\u0301 \u202eright to left\u202c",
    "bell\x07 escape\x1b[31m \x01\x7f\x1c",
    "other \u2028 breaks \x85 and \x0b \x0c",
    "\ufeffmark",
    "shares rise " * 8_400,  # 100 kB
]
CARRIAGE_RETURNS = ["carriage\rreturn", "windows\r\nbreak", "\r.", "old\rnew\n"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arguments", "stdin", "txt"])
def test_hostile_texts_are_written_unchanged(kind: str, bundle: Path) -> None:
    texts = HOSTILE_TEXTS + CARRIAGE_RETURNS * (kind == "jsonl")
    if kind in ("arguments", "stdin", "txt"):
        texts = [text for text in texts if "\n" not in text and not text.startswith("\ufeff")]
    arguments, stdin = write_input(kind, texts)
    for out in OUTPUTS if kind == "jsonl" else ("stdout",):
        result = predict_ok(bundle, *output_flags(out), *arguments, stdin=stdin)
        assert_predictions(read_output(out, result), bundle, list(texts))


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")


@pytest.mark.parametrize("out", OUTPUTS[1:])
@given(texts=st.lists(st.none() | st.text(CHARACTERS, min_size=1), min_size=1, max_size=5))
def test_any_text_round_trips_through_any_file(out: str, texts: list[str | None]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"out.{out}"
        write_predictions(path, classify(UniformClassifier(), ((text, {}) for text in texts)), UniformClassifier())
        if out == "parquet":
            read_back = pq.read_table(path)["text"].to_pylist()
        elif out == "jsonl":
            read_back = [json.loads(line)["text"] for line in path.read_bytes().split(b"\n")[:-1]]
        else:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file, delimiter=DELIMITERS[out], strict=True)
                read_back = [row["text"] or None for row in reader]
    assert read_back == texts


@pytest.mark.parametrize(("threshold", "out"), [(0.3, "csv"), (0.5, "jsonl"), (0.5, "parquet"), (1.0, "stdout")])
def test_label_below_the_threshold_is_null(threshold: float, out: str, bundle: Path) -> None:
    texts = [*TEXTS, *pool_signals().texts]
    arguments, _ = write_input("jsonl", texts)
    result = predict_ok(bundle, *output_flags(out), "--threshold", str(threshold), *arguments)
    highest = expected_probabilities(bundle, texts).max(axis=1)
    rows = read_output(out, result)
    assert [row.label is not None for row in rows] == (highest >= threshold).tolist()
    assert [max((row.probabilities or {}).values()) for row in rows] == pytest.approx(highest.tolist(), abs=2e-6)
    assert threshold < 1 or all(row.label is None for row in rows)


# Several labels per text


THRESHOLDS = {"Sports": 0.7, "World": 0.75, "a, b": 0.85, "never": 1.0}
OTHER_TEXTS = [text for text in pool_signals().texts if text not in TEXTS]


@pytest.fixture(scope="module")
def multi_label_models(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> dict[str, Path]:
    """Folders of a multi-label SetFit model and of its bundle."""
    folder, texts = tmp_path_factory.mktemp("multi-label"), pool_signals().texts
    body = static_body(load_body(tiny_student), texts, dimension=8)
    model = random_classifier(body, list(THRESHOLDS), texts, task=MULTI_LABEL)
    model.model_head = set_thresholds(model.model_head, np.array(list(THRESHOLDS.values())))
    save_model(model, folder / "setfit")
    export_bundle(model, folder / "bundle", texts=texts, min_agreement=0.9)
    return {"setfit": folder / "setfit", "bundle": folder / "bundle"}


def read_labels(kind: str, record: dict[str, Any]) -> list[str] | None:
    """Read the labels of a row with text; the cell of a text without labels is empty in delimited files."""
    labels: Any = record["labels"]
    return labels if kind in ("stdout", "jsonl", "parquet") else labels.split("|") if labels else []


def expected_labels(probabilities: dict[str, float], flags: list[str]) -> list[str]:
    thresholds = dict.fromkeys(THRESHOLDS, float(flags[1])) if "--threshold" in flags else THRESHOLDS
    labels = [name for name, threshold in thresholds.items() if probabilities[name] >= threshold]
    best = max(thresholds, key=lambda name: probabilities[name] - thresholds[name])
    return labels or [best] * ("--at-least-one" in flags)


@pytest.mark.parametrize("model", ["bundle", "setfit"])
@pytest.mark.parametrize(
    ("out", "flags"),
    [
        *((out, []) for out in OUTPUTS),
        ("csv", ["--threshold", "0.9", "--at-least-one"]),
        ("jsonl", ["--threshold", "0.8"]),
        ("parquet", ["--at-least-one"]),
    ],
)
def test_labels_that_reach_their_thresholds_are_written(
    model: str, out: str, flags: list[str], multi_label_models: dict[str, Path]
) -> None:
    texts = [*OTHER_TEXTS, " "]
    arguments = write_table(Path("in.csv"), {"labels": ["gold"] * len(texts), "text": texts})
    result = predict_ok(multi_label_models[model], "-q", *arguments, *output_flags(out), *flags)
    *records, blank = read_records(out, result)
    columns = [f"probability_{name}" for name in THRESHOLDS] if out in ("csv", "tsv", "parquet") else ["probabilities"]
    assert list(blank.items()) == [("input_labels", "gold"), *dict.fromkeys(["text", "labels", *columns]).items()]
    predicted = []
    expected = expected_probabilities(multi_label_models[model], OTHER_TEXTS)
    for record, row in zip(records, expected, strict=True):
        values = record.get("probabilities") or {name: float(record[f"probability_{name}"]) for name in THRESHOLDS}
        np.testing.assert_allclose([values[name] for name in THRESHOLDS], row, atol=2e-6)
        predicted.append(read_labels(out, record))
        assert predicted[-1] == expected_labels(dict(zip(THRESHOLDS, row, strict=True)), flags)
    assert {len(labels or ()) for labels in predicted} >= ({1, 2} if "--at-least-one" in flags else {0, 1, 2})


def test_labels_with_the_separator_are_json_lists(multi_label_models: dict[str, Path]) -> None:
    classifier = open_classifier(multi_label_models["setfit"], device="cpu")
    classifier.labels = ["Sports", "a|b", "c", "never"]
    chunks = list(classify(classifier, [(TEXTS[0], {}), (None, {})], threshold=0.0))
    write_predictions(Path("out.csv"), chunks, classifier)
    with Path("out.csv").open(encoding="utf-8", newline="") as file:
        cells = [row["labels"] for row in csv.DictReader(file)]
    assert (json.loads(cells[0]), cells[1]) == (classifier.labels, "")


# Complete files, or none


REFUSED: list[tuple[list[str], tuple[str, ...]]] = [
    *((["--threshold", threshold], ("--threshold",)) for threshold in ("1.1", "nan")),
    (["--threads", "0"], ("--threads",)),
    (["-o", "out.csv", "--at-least-one", "x"], ("one label per text", "Remove --at-least-one")),
    *((["-o", name, "-i", "no.csv"], (name, ".jsonl", ".csv", ".parquet")) for name in ("out", "out.csv.gz")),
    *((["-i", "in.csv", "-o", name], ("both --input and",)) for name in ("folder/../in.csv", "link.csv")),
    (["-i", "in.csv", "-i", "no.csv", "-o", "out.csv"], ("No such file: no.csv",)),
    (["-i", "other.csv", "-o", "out.csv"], ("other.csv", "no column 'text'", "'title'", "--text-column")),
    (["-i", "twice.csv"], ("twice.csv", "Rename one of them")),
    (["-i", "twice.parquet"], ("twice.parquet", "Rename one of them")),
    (["-i", "days.parquet"], ("days.parquet", "out of range")),
    (["-o", "labels/", "x"], ("An output folder needs input files", "--input")),
    (["-o", "nowhere/out.csv", "x"], ("Cannot write nowhere/out.csv: No such file or directory",)),
    (["-o", "folder/out.csv", "x"], ("Cannot write folder/out.csv", "Is a directory")),
]


@pytest.mark.parametrize(("arguments", "messages"), REFUSED, ids=lambda value: " ".join(value))
def test_invalid_arguments_and_files_are_refused(
    arguments: list[str], messages: tuple[str, ...], bundle: Path, tmp_path: Path
) -> None:
    Path("folder/out.csv").mkdir(parents=True)
    Path("link.csv").symlink_to("in.csv")
    for name, header in (("in", ["text"]), ("other", ["title"]), ("twice", ["text", "", ""])):
        write_delimited(Path(f"{name}.csv"), [header, ["a"] * len(header)])
    text, day = pa.array(["a"]), pa.array([5_000_000], pa.int32()).view(pa.date32())
    pq.write_table(pa.Table.from_arrays([text, text], names=["text", "text"]), "twice.parquet")
    pq.write_table(pa.Table.from_arrays([text, day], names=["text", "day"]), "days.parquet")
    before = read_tree(tmp_path)
    result = run_predict(bundle, *arguments)
    assert_refused(result, *messages)
    assert result.stdout == ""
    assert read_tree(tmp_path) == before


INVALID_INPUTS: list[tuple[str, str, bytes, str]] = [
    ("in.jsonl", "jsonl", b'{"text": "a"}\n' * 4999 + b"{broken\n" + b'{"text": "a"}\n', "in.jsonl, line 5000"),
    ("in.csv", "csv", b"text\n" + b"a\n" * 4998 + b"a,b\n", "in.csv, line 5000"),
    ("in.txt", "tsv", b"a\n" * 4999 + b"caf\xe9\n", "in.txt, line 5000"),
    ("stdin", "parquet", b"a\n" * 4999 + b"caf\xe9\n", "stdin is not UTF-8"),
]


@pytest.mark.parametrize(("name", "out", "content", "message"), INVALID_INPUTS, ids=[row[0] for row in INVALID_INPUTS])
def test_invalid_input_row_leaves_the_existing_output(
    name: str, out: str, content: bytes, message: str, bundle: Path, tmp_path: Path
) -> None:
    arguments = [] if name == "stdin" else ["--input", name]
    Path(name).write_bytes(content)
    Path(f"out.{out}").write_bytes(b"existing content")
    before = read_tree(tmp_path)
    assert_refused(run_predict(bundle, *arguments, *output_flags(out), stdin=content), message)
    assert read_tree(tmp_path) == before
    if out == "jsonl":
        result = run_predict(bundle, *arguments)
        assert_refused(result, message)
        assert [row.text for row in read_output("stdout", result)] == ["a"] * (4999 - 4999 % CHUNK_SIZE)


# Streams


class UniformClassifier(TorchClassifier):
    """A classifier that predicts the same probability for all classes and records the largest batch."""

    def __init__(self) -> None:
        self.labels, self.task, self.takes_pairs = ["yes", "no"], "single-label", False
        self.max_texts = 0

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.max_texts = max(self.max_texts, len(texts))
        return np.full((len(texts), 2), 0.5, np.float32)


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_rows_are_classified_in_chunks_and_not_read_ahead(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_module, "CHUNK_SIZE", chunk_size)
    read, classified, classifier = 0, 0, UniformClassifier()

    def rows() -> Iterator[tuple[str | None, dict[str, int]]]:
        nonlocal read
        for read in range(1, 1001):
            yield None if read % 10 == 3 else f"text {read}", {"number": read}

    for part in classify(classifier, rows()):
        for row in part:
            classified += 1
            has_text = classified % 10 != 3
            assert row.columns == {"number": classified}
            assert (row.text, row.label) == ((f"text {classified}", "yes") if has_text else (None, None))
        assert read == classified
    assert (classified, classifier.max_texts <= chunk_size) == (1000, True)
    assert list(classify(classifier, [])) == []


def test_unusable_bundle_is_reported(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("broken", "onnx"):
        shutil.copytree(bundle, name)
    truncate_file(Path("broken/embeddings.safetensors"))
    result = run_predict("broken", "a text", "--output", "out.csv")
    assert_refused(result, "embeddings.safetensors has changed since", "Export or copy the bundle again.")
    assert not Path("out.csv").exists()
    claim_onnx(Path("onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_predict("onnx", "a text")
    assert result.exit_code == 69
    assert "pip install onnxruntime" in result.stderr
    assert "Traceback" not in result.stderr


def test_number_of_threads_of_a_setfit_model(setfit_folder: Path) -> None:
    import torch

    for threads in (2, 1):
        result = predict_ok(setfit_folder, "--threads", str(threads), *TEXTS)
        assert_predictions(read_output("stdout", result), setfit_folder, list(TEXTS))
        assert torch.get_num_threads() == threads
