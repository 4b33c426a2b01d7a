"""Reading questions: formats, roles and unusable rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checks import assert_refused, invoke
from synthetic_questions import make_questions, to_row, write_questions

from setfit_kd.errors import DataError
from setfit_kd.qa.data import Question, read_questions

ROW = {"question": "who ?", "context": "Ann and Bob", "answers": {"text": ["Bob"], "answer_start": [8]}}


def squad(questions: list[Question]) -> dict[str, Any]:
    """Return questions in the JSON format of SQuAD 2.0, two per paragraph and two paragraphs per article."""
    qas = []
    for question in questions:
        row = to_row(question)
        answers = [{"text": text, "answer_start": start} for text, start in question.answers or ()]
        more = {"answers": answers, "is_impossible": not answers, "plausible_answers": [{"text": "x"}]}
        qas.append({"context": question.context, "qas": [{"id": row["id"], "question": row["question"], **more}]})
    return {"version": "v2.0", "data": [{"title": "", "paragraphs": qas[i : i + 2]} for i in range(0, len(qas), 2)]}


def to_parquet(questions: list[Question]) -> Path:
    import datasets

    datasets.Dataset.from_list([to_row(question) for question in questions]).to_parquet("questions.parquet")
    return Path("questions.parquet")


def to_json(questions: list[Question]) -> Path:
    Path("questions.json").write_text(json.dumps(squad(questions)), encoding="utf-8")
    return Path("questions.json")


def with_lists(questions: list[Question]) -> list[dict[str, Any]]:
    pairs = [[{"text": text, "answer_start": start} for text, start in q.answers or ()] for q in questions]
    return [{**to_row(q), "answers": answers} for q, answers in zip(questions, pairs, strict=True)]


def to_data_frame(questions: list[Question]) -> Any:
    import pandas as pd

    return pd.read_parquet(to_parquet(questions))


FORMS: dict[str, Callable[[list[Question]], Any]] = {
    "squad": to_json,
    "jsonl": lambda questions: write_questions(Path("questions.jsonl"), questions),
    "parquet": to_parquet,
    "rows": lambda questions: list(map(to_row, questions)),
    "lists": with_lists,
    "data frame": to_data_frame,
}


@pytest.mark.parametrize("form", FORMS)
def test_all_formats_give_the_same_questions(form: str) -> None:
    questions = make_questions(5, unanswerable=2)
    source = FORMS[form](questions)
    assert read_questions(source) == questions
    assert [bool(question.answers) for question in questions] == [True] * 3 + [False] * 2


def test_several_answers_are_kept_in_order_and_offsets_count_characters() -> None:
    context = "Zürich 😀 and Genève, Genève"
    answers = {"text": ["Genève", "Genève"], "answer_start": [context.rindex("G"), context.index("G")]}
    (question,) = read_questions([{"id": 7, "question": "where?", "context": context, "answers": answers}])
    assert question == Question("7", "where?", context, (("Genève", 21), ("Genève", 13)))


def test_rows_without_answers_or_ids_are_a_pool() -> None:
    Path("pool.csv").write_text("question,context\nwho?,Ann\nwhat?,Bob\n", encoding="utf-8")
    assert read_questions("pool.csv") == [Question("2", "who?", "Ann"), Question("3", "what?", "Bob")]


def test_splits_are_read_by_role() -> None:
    import datasets

    questions = make_questions(3)
    roles = ("train", "validation", "test")
    data = [datasets.Dataset.from_list([to_row(question)]) for question in questions]
    datasets.DatasetDict(zip(roles, data, strict=True)).save_to_disk("splits")
    for role, question in zip(roles, questions, strict=True):
        assert read_questions("splits", role) == [question]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answers": {"text": ["Bob"], "answer_start": [7]}}, "'Bob' is not at character 7 of the context, but at 8"),
        ({"answers": {"text": ["Bob"], "answer_start": [-3]}}, "'Bob' is not at character -3 of the context"),
        ({"answers": {"text": ["Carl"], "answer_start": [0]}}, "the answer 'Carl' is not in the context"),
        ({"answers": {"text": ["Bob"], "answer_start": []}}, 'expected "answers": {"text": [...]'),
        ({"answers": {"text": ["Bob"]}}, 'expected "answers"'),
        ({"answers": "Bob"}, 'expected "answers"'),
        ({"answers": [{"text": "Bob", "answer_start": "8"}]}, "expected an answer and its first character"),
        ({"answers": [{"text": "", "answer_start": 8}]}, "expected an answer and its first character"),
        ({"context": " "}, "context: the text is empty"),
        ({"question": "\u200b"}, "question: the text is empty"),
        ({"question": None}, "question: no text"),
        ({"context": 3}, "context: expected a string"),
        ({"id": "1"}, "the id '1' is that of line 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_unusable_rows_are_named(change: dict[str, Any], problem: str) -> None:
    rows = [{"id": "1", **ROW}, {"id": "2", **ROW, **change}]
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = invoke("finetune", "--task", "qa", "model", "--labeled", "few.jsonl", "--output-dir", "out")
    assert_refused(result, "few.jsonl, line 2: ", problem)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "questions.json, after question 0: not in SQuAD format (JSONDecodeError"),
        (
            '{"data": [{"paragraphs": [{"qas": [{"question": "who?"}]}]}]}',
            "after question 1: not in SQuAD format (KeyError",
        ),
        ('{"data": 3}', "not in SQuAD format (TypeError"),
        ('{"data": []}', "questions.json has no questions"),
        (json.dumps(squad([Question("a", "who?", "Ann", (("Bob", 0),))])), "question 1: the answer 'Bob' is not in"),
    ],
)
def test_damaged_squad_files_are_explained(content: str, problem: str) -> None:
    Path("questions.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_questions("questions.json")
    assert problem in error.value.message
    assert error.value.hint


def test_missing_columns_are_named() -> None:
    with pytest.raises(DataError, match=r"the list has no column 'context'; it has 'question', 'text'."):
        read_questions([{"question": "who?", "text": "Ann"}])


@pytest.mark.parametrize("source", ["missing.json", "missing.jsonl"])
def test_missing_files_are_named(source: str) -> None:
    with pytest.raises(DataError, match=f"No such file: {source}"):
        read_questions(source)
