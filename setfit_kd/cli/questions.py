"""Commands on models that answer questions; the commands of classification call them."""

from __future__ import annotations

import csv
import io
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
    if result.evaluation is not None:
        _show_metrics(str(config.output_dir), result.evaluation)
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
    rows = [
        {
            "id": q.id,
            "question": q.question,
            "answer": a.text,
            "score": round(a.score, 6),
            "start": a.start,
            "end": a.end,
        }
        for q, a in zip(questions, answers, strict=True)
    ]
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


def _show_metrics(name: str, metrics: dict[str, float]) -> None:
    from setfit_kd.cli.output import show_table

    show_table(["", *metrics], [[name, *(f"{value:.1%}" for value in metrics.values())]])


def _write_rows(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Write answers to a file, whose extension selects the format, or as JSON lines to stdout."""
    from setfit_kd.cli.output import echo
    from setfit_kd.utils.atomic_io import atomic_file

    if path is None:
        echo("\n".join(map(json_text, rows)))
        return
    extension = path.suffix.lower()
    with atomic_file(path) as file:
        if extension == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            schema = {"id": pa.string(), "question": pa.string(), "answer": pa.string()}
            schema |= {"score": pa.float32(), "start": pa.int64(), "end": pa.int64()}
            pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(schema)), file)
        elif extension in (".csv", ".tsv"):
            text = io.StringIO(newline="")
            table = csv.DictWriter(text, list(rows[0]), dialect="excel-tab" if extension == ".tsv" else "excel")
            table.writeheader()
            table.writerows(rows)
            file.write(text.getvalue().replace("\r\n", "\n").encode("utf-8", "backslashreplace"))
        else:
            file.write("".join(json_text(row) + "\n" for row in rows).encode())
