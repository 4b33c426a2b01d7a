"""Commands on models that answer questions; the commands of classification call them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ConfigError
from setfit_kd.utils.console import json_text

if TYPE_CHECKING:
    from setfit_kd.export.bundle import Bundle

logger = logging.getLogger(__name__)


def finetune(settings: dict[str, Any], *, as_json: bool) -> None:
    """Fine-tune a transformer to answer questions, see `finetune_questions`."""
    from setfit_kd.cli.output import echo
    from setfit_kd.config.questions import QuestionFinetuneConfig
    from setfit_kd.qa.run import finetune_questions

    config = QuestionFinetuneConfig.of(**settings)
    result = finetune_questions(config)
    if as_json:
        echo(json_text(result.metrics, indent=2))
        return
    if evaluation := result.metrics["evaluation"]:
        _show_metrics(str(config.output_dir), evaluation)
    echo(f'To use it: setfit-kd predict {shlex.quote(str(config.output_dir))} "QUESTION" "CONTEXT"')


def evaluate(folder: Path, settings: dict[str, Any], *, as_json: bool) -> None:
    """Evaluate a model or bundle on questions with gold answers."""
    from setfit_kd.cli.output import echo
    from setfit_kd.inference.answerer import open_answerer
    from setfit_kd.memory.backoff import shared_backoff
    from setfit_kd.qa.data import read_questions
    from setfit_kd.qa.metrics import score_answers

    sources = settings.pop("eval", ())
    if len(sources) != 1:
        message = "Evaluating a model that answers questions requires questions from one source."
        raise ConfigError(message, hint="Pass --eval once.")
    [source] = sources
    questions = read_questions(source, role="test")
    with shared_backoff(cpu_fallback=settings.get("cpu_fallback")):
        answers = open_answerer(folder, settings)(questions)
    metrics = score_answers([answer.text for answer in answers], questions)
    if as_json:
        echo(json_text({"eval": str(source), "eval_questions": len(questions), **metrics}, indent=2))
        return
    _show_metrics(str(folder), metrics)
    echo(f"\n{len(questions):,} evaluation questions: {source}.")


def predict(
    folder: Path,
    texts: Sequence[str],
    files: Sequence[str],
    output: Path | None,
    settings: dict[str, Any],
    *,
    threads: int | None,
) -> None:
    """Find the answer to a question in a context, or to the questions in files."""
    from setfit_kd.inference.answerer import open_answerer
    from setfit_kd.inference.predict import check_output
    from setfit_kd.memory.backoff import shared_backoff
    from setfit_kd.qa.data import read_questions

    if bool(texts) == bool(files) or len(texts) not in (0, 2):
        message = f"Expected a question and its context, or --input, got {len(texts)} texts and {len(files)} files."
        raise ConfigError(message, hint='Pass "QUESTION" "CONTEXT", or --input FILE.')
    if output is not None:
        check_output(output)
        if any(Path(file).resolve() == output.resolve() for file in files):
            raise ConfigError(f"{output} is both --input and --output.", hint="Choose another --output.")
    sources: list[Any] = [*files, *([[dict(zip(("question", "context"), texts, strict=True))]] if texts else [])]
    questions = [question for source in sources for question in read_questions(source, role="test")]
    with shared_backoff(cpu_fallback=settings.get("cpu_fallback")):
        answers = open_answerer(folder, settings, threads=threads)(questions)
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        score = None if answer.score is None else round(answer.score, 6)
        values = question.id, question.question, answer.text, score, answer.start, answer.end
        rows.append(dict(zip(("id", "question", "answer", "score", "start", "end"), values, strict=True)))
    _write_rows(rows, output)


def export(folder: Path, output_dir: Path, source: str | None, options: dict[str, Any]) -> Bundle:
    """Export a model as a bundle; without questions to check it on, use the beginnings of the bundled texts."""
    from setfit_kd.data.sources import read
    from setfit_kd.export.answers import export_answerer
    from setfit_kd.qa.data import Question, read_questions
    from setfit_kd.qa.model import load_answerer

    if source is None:
        texts = read("bundled:newswire").texts
        logger.warning("Checking the bundle on bundled texts. Pass your own questions with --unlabeled.")
        questions = [Question(str(row), " ".join(text.split()[:8]), text) for row, text in enumerate(texts)]
    else:
        questions = read_questions(source)
    return export_answerer(load_answerer(folder), output_dir, questions=questions, **options)


def _show_metrics(name: str, metrics: dict[str, Any]) -> None:
    from setfit_kd.cli.output import show_table
    from setfit_kd.report.task_report import metrics_table

    show_table(*metrics_table("qa", {name: metrics}))


def _write_rows(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Write answers to a file, whose extension selects the format, or as JSON lines to stdout."""
    from setfit_kd.cli.output import echo
    from setfit_kd.utils.atomic_io import atomic_file

    if path is None:
        echo("\n".join(map(json_text, rows)))
        return
    import pyarrow as pa
    from pyarrow import csv, parquet

    extension = path.suffix.lower()
    with atomic_file(path) as file:
        if extension in (".jsonl", ".ndjson"):
            file.write("".join(json_text(row) + "\n" for row in rows).encode())
            return
        types = [*[pa.string()] * 3, pa.float32(), pa.int64(), pa.int64()]
        table = pa.Table.from_pylist(rows, pa.schema(list(zip(rows[0], types, strict=True))))
        if extension == ".parquet":
            parquet.write_table(table, file)
        else:
            csv.write_csv(table, file, csv.WriteOptions(delimiter="," if extension == ".csv" else "\t"))
