"""Read questions with their contexts and gold answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setfit_kd.data.readers import Record, file_format
from setfit_kd.data.sources import RowErrors, Source, get_text, read_table
from setfit_kd.errors import DataError
from setfit_kd.utils.files import check_regular_file

_MAX_SQUAD_BYTES = 1 << 30
_FORM = '"answers": {"text": [...], "answer_start": [...]}'


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        id: Unique name of the question.
        question, context: The texts.
        answers: Gold answers, each with its first character in the context: empty if the context does not answer the
            question, None if the answers are unknown.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None = None


def read_questions(source: Source, role: str = "train") -> list[Question]:
    """Read all questions of a source.

    Args:
        source: A file in the JSON format of SQuAD; or any source of `read` with the columns ``question`` and
            ``context``, optionally ``id`` (else the number of the row), and ``answers``: ``{"text": [...],
            "answer_start": [...]}`` or a list of ``{"text": ..., "answer_start": ...}``.
        role: ``train``, ``validation`` or ``test``; selects the split if the source has several and none is named.

    Raises:
        DataError: If something is missing, damaged or empty, an answer is not in the context at its offset, or two
            questions have the same id. The message names the file and row.
        UnavailableError: If the hub cannot be reached.
    """
    if isinstance(source, str | Path) and file_format(Path(source)) == ".json" and Path(source).is_file():
        table: tuple[Iterable[Record], str, str] = _read_squad(Path(source)), str(source), "question"
    else:
        table = read_table(source, role)
    records, origin, unit = table
    errors, rows = RowErrors(origin, unit), dict[str, int]()
    questions: list[Question] = []
    for number, record in records:
        missing = [column for column in ("question", "context") if not rows and column not in record]
        if missing:
            message = f"{origin} has no column {missing[0]!r}; it has {', '.join(map(repr, record))}."
            raise DataError(message, hint=f"Name the columns question, context and answers, as in {_FORM}.")
        question, problem = _get_question(record, number)
        if rows.setdefault(question.id, number) != number:
            problem = problem or f"the id {question.id!r:.60} is that of {unit} {rows[question.id]}"
        if problem:
            errors.add(number, problem)
        questions.append(question)
    if not questions:
        raise DataError(f"{origin} has no questions.", hint="Add rows to it, or choose another source.")
    errors.check()
    return questions


def _read_squad(path: Path) -> Iterator[Record]:
    """Yield the questions of a file in SQuAD format, numbered from 1."""
    hint = "Use SQuAD's format: data, with paragraphs, with a context and qas, each with question, id and answers."
    number = 0
    try:
        articles = json.loads(check_regular_file(path, limit=_MAX_SQUAD_BYTES).read_text(encoding="utf-8-sig"))["data"]
        for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
            for number, row in enumerate(paragraph["qas"], number + 1):  # noqa: B020 - continues over paragraphs
                answers = [] if row.get("is_impossible") else row.get("answers")
                yield number, {**row, "context": paragraph["context"], "answers": answers}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}, after question {number}: not in SQuAD format ({reason}).", hint=hint) from None


def _get_question(record: Mapping[str, Any], number: int) -> tuple[Question, str | None]:
    """Return the question in a record, and the reason if it is unusable."""
    texts = {column: get_text(record, [column]) for column in ("question", "context")}
    problem = next((f"{column}: {problem}" for column, (_, problem) in texts.items() if problem), None)
    name, context, answers = record.get("id"), texts["context"][0], None
    if problem is None:
        answers, problem = _get_answers(record.get("answers"), context)
    name = str(number if name is None else name).encode("utf-8", "backslashreplace").decode()
    return Question(name, texts["question"][0], context, answers), problem


def _get_answers(value: Any, context: str) -> tuple[tuple[tuple[str, int], ...] | None, str | None]:
    """Return the gold answers in a column, and the reason if they are unusable."""
    value = _to_python(value)
    if value is None:
        return None, None
    try:
        if isinstance(value, Mapping):
            pairs = list(zip(_to_python(value["text"]), _to_python(value["answer_start"]), strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in value]
    except (LookupError, TypeError, ValueError):
        return None, f"expected {_FORM} or a list of answers, got {value!r:.60}"
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
            return None, f"expected an answer and its first character, got {text!r:.60} and {start!r:.20}"
        if start < 0 or context[start : start + len(text)] != text:
            found = context.find(text)
            place = f"at character {start} of the context, but at {found}" if found >= 0 else "in the context"
            return None, f"the answer {text!r:.60} is not {place}"
    return tuple(pairs), None


def _to_python(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value  # a NumPy array, as in a data frame
