"""``setfit-kd predict``."""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from setfit_kd.cli import questions
from setfit_kd.cli.options import FRACTION, output_options, passed, pickle_option, setting_options, threads_option
from setfit_kd.config.run import RunConfig
from setfit_kd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from setfit_kd.inference.predict import Prediction, Row
    from setfit_kd.runtime.classify import Lines
    from setfit_kd.scale.parts import Job


def _parse_shard(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)/(\d+)", value or "0/1", re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise click.BadParameter(f"expected I/N with 0 <= I < N, such as 0/8, got {value!r}.")
    return None if value is None else (int(match[1]), int(match[2]))


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--input", "-i", "files", multiple=True, metavar="FILE",
              help="Read texts from a CSV, TSV, JSONL, Parquet or text file; with an output folder, also from URLs and "
                   "patterns such as 's3://bucket/*.parquet'. May be repeated.")  # fmt: skip
@click.option("--output", "-o", "target", metavar="FILE|FOLDER/",
              help="Write a JSONL, CSV, TSV or Parquet file, atomically; or one file per input into a folder or an URL "
                   "that ends with /. [default: JSON lines on stdout]")  # fmt: skip
@click.option("--embeddings", is_flag=True,
              help="Add the embedding of each text as a list of numbers. Only for a SetFit model.")  # fmt: skip
@click.option("--shard", metavar="I/N", callback=_parse_shard,
              help="Write only every Nth output file, from the Ith one (0 to N-1), into an output folder.")  # fmt: skip
@click.option("--engine", type=click.Choice(["ray"]),
              help="Classify files by Ray Data, on the cluster of RAY_ADDRESS or this machine, into an output folder. "
                   "Requires the extra ray.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), metavar="N",
              help="Worker processes of --engine ray. [default: one per GPU; one per CPU without GPUs or for a "
                   "bundle]")  # fmt: skip
@click.option("--threshold", type=FRACTION, metavar="X",
              help="Minimum probability of a label; below it, the label is null. For a multi-label model, it replaces "
                   "the thresholds of all labels. [default: 0; the model's thresholds]")  # fmt: skip
@click.option("--at-least-one", is_flag=True,
              help="Give a text whose labels are all below their thresholds the label with the largest difference of "
                   "probability and threshold. Only for a multi-label model.")  # fmt: skip
@setting_options("text_column", "pair_column", "device", "cpu_fallback", "encode_batch_size", "exact")
@threads_option
@pickle_option
@output_options
def predict(
    model: str,
    texts: tuple[str, ...],
    files: tuple[str, ...],
    target: str | None,
    embeddings: bool,
    shard: tuple[int, int] | None,
    engine: str | None,
    workers: int | None,
    threshold: float | None,
    at_least_one: bool,
    threads: int | None,
    trust_pickle: bool,
    **flags: Any,
) -> None:
    """Classify texts from arguments, files or lines of stdin. Memory use does not grow with the number of texts.

    MODEL is a bundle, a run folder, one of its students, or a SetFit model or transformer classifier in a folder or on
    the hub. Bundles run without torch, and so do texts in arguments if the student's folder holds a bundle.

    For pairs of texts, pass the two texts of each pair as two arguments, name both columns of a file with --text-column
    and --pair-column, or separate them by a tab in the lines of stdin.

    The output has one row per input row, in the same order: {"text": ..., "label": ..., "probabilities": {...}}. Lines
    of stdin are answered as they arrive. A row without visible text has the label null. Other columns of the input come
    first, with their names; a column named like an output column is prefixed by input_, as in input_label.

    A multi-label model predicts "labels", a list of those whose probability reaches their threshold. In CSV and TSV
    files they are separated by "|", or a JSON list if a name contains "|".

    With an output folder, each input file has its output file, Parquet for Parquet and JSONL for all other formats, and
    a manifest beside it; a large Parquet file has one for each range of row groups with about 100,000 rows. A repeated
    command classifies only files that are not finished, or whose input, model or settings have changed.

    A transformer that answers questions, or its bundle, takes a question and a context as TEXTs, or files as for
    `setfit-kd finetune --task qa`: {"id": ..., "question": ..., "answer": ..., "score": ..., "start": ..., "end": ...}.
    """
    from setfit_kd.data.readers import column_types
    from setfit_kd.inference.answerer import answerer_folder
    from setfit_kd.inference.classifier import check_pair_column, open_classifier
    from setfit_kd.inference.predict import check_output, classify, write_predictions
    from setfit_kd.memory.backoff import shared_backoff
    from setfit_kd.runtime.classify import Lines
    from setfit_kd.utils.console import show_progress

    scale = {"embeddings": embeddings or None, "shard": shard, "engine": engine, "workers": workers}
    if answerer := answerer_folder(model):
        settings = passed({**flags, "threshold": threshold, "at_least_one": at_least_one or None, **scale})
        questions.predict(answerer, texts, files, Path(target) if target else None, settings, threads=threads)
        return
    config = RunConfig.of(**passed(flags))
    decision: Any = {"threshold": threshold, "at_least_one": at_least_one, "embeddings": embeddings}
    options: Any = {"device": config.device, "batch_size": config.encode_batch_size, "exact": config.exact}
    options |= {"threads": threads, "trust_pickle": trust_pickle}
    is_folder = bool(files) and target is not None and (target.endswith("/") or Path(target).is_dir())
    has_patterns = any(re.search(r"[*?[]|://", name) and not Path(name).is_file() for name in (*files, target or ""))
    if workers and not engine:
        raise ConfigError("--workers is for --engine ray.", hint="Add --engine ray, or remove --workers.")
    if shard or engine or is_folder or has_patterns:
        if texts or not files or target is None or (Path(target).suffix and not is_folder):
            message = "Patterns, URLs, --shard and --engine need --input and an output folder."
            raise ConfigError(message, hint="Pass --input, and an --output that ends with /.")
        from setfit_kd.scale.parts import Job  # imports fsspec

        columns = {"text_column": config.text_column, "pair_column": config.pair_column}
        with shared_backoff(cpu_fallback=config.cpu_fallback):
            _predict_files(files, target, Job.of(model, columns, decision, options), shard, engine, workers)
        return
    output = None if target is None else Path(target)
    if target is not None and target.endswith("/"):
        raise ConfigError("An output folder needs input files.", hint="Pass --input, or an --output such as out.csv.")
    if output is not None:
        check_output(output)
        if any(Path(file).resolve() == output.resolve() for file in files):
            raise ConfigError(f"{output} is both --input and --output.", hint="Choose another --output.")
    for file in files:
        if not Path(file).is_file():
            raise DataError(f"No such file: {file}.", hint="Check the path.")
    if not texts and not files and (sys.stdin is None or sys.stdin.isatty()):
        raise DataError("No texts to classify.", hint="Pass texts, --input FILE, or lines on stdin.")
    lines = Lines(sys.stdin and sys.stdin.buffer)
    with shared_backoff(cpu_fallback=config.cpu_fallback), ExitStack() as stack:
        few = bool(texts) and not files
        if few:
            gc.disable()  # garbage collection makes the import of torch and transformers slower by a fifth
            stack.callback(gc.enable)
        classifier = open_classifier(model, use_bundle=few, **options)
        types = column_types(map(Path, files)) if output and "json" not in output.suffix.lower() else {}
        if config.text_column == ("text",):
            types.pop("text", None)
        if files:
            check_pair_column(model, classifier, config.pair_column)
        rows = _rows(texts, files, lines, config, takes_pairs=classifier.takes_pairs)
        chunks = classify(classifier, rows, **decision, is_waiting=lambda: lines.is_waiting)
        # A progress bar would be mixed with the predictions on the terminal.
        quiet = show_progress(False) if output is None and sys.stdout.isatty() else nullcontext()
        with quiet, closing(_show_progress(chunks)) as shown:
            write_predictions(output, shown, classifier, types, embeddings=embeddings)


def _predict_files(
    files: Sequence[str], folder: str, job: Job, shard: tuple[int, int] | None, engine: str | None, workers: int | None
) -> None:
    """Classify many files, and print a summary."""
    from setfit_kd.scale.parts import list_parts, predict_parts

    start, (index, n_shards) = time.perf_counter(), shard or (0, 1)
    parts = list_parts(files, folder)[index::n_shards]
    results = predict_parts(parts, job, engine=engine, workers=workers)
    failed = [result.part.input for result in results if result.error]
    counts = f"{len(results) - len(failed)} files done, {len(parts) - len(results)} skipped, {len(failed)} failed"
    rows, seconds = sum(result.rows for result in results), time.perf_counter() - start
    click.echo(f"{counts}; {rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} rows/s")
    if failed:
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        hint = "Fix the errors above, and repeat the command: finished files are kept."
        raise DataError(f"Failed: {', '.join(failed[:3])}{more}.", hint=hint)


def _show_progress(chunks: Iterator[list[Prediction]]) -> Generator[list[Prediction], None, None]:
    """Pass on the predictions, with a progress bar if there are more than a few."""
    from setfit_kd.inference.classifier import CHUNK_SIZE
    from setfit_kd.utils.console import track

    n_new, advance = 0, None
    with ExitStack() as stack:
        for chunk in chunks:
            yield chunk
            n_new += len(chunk)
            if advance is None and n_new >= CHUNK_SIZE:
                advance = stack.enter_context(track("Classifying", None))
            if advance is not None:
                advance(n_new)
                n_new = 0


def _rows(
    texts: tuple[str, ...], files: tuple[str, ...], lines: Lines, config: RunConfig, *, takes_pairs: bool
) -> Iterator[Row]:
    from setfit_kd.data.sources import check_texts, stream_rows
    from setfit_kd.runtime.classify import BundleError, read_pairs

    try:
        if texts:
            items: Any = read_pairs(texts) if takes_pairs else texts
            yield from check_texts(items, origin="the arguments", unit="text", pairs=takes_pairs)
        for file in files:
            yield from stream_rows(file, text_column=config.text_column, pair_column=config.pair_column)
        if not texts and not files:
            items = read_pairs(lines) if takes_pairs else lines
            yield from check_texts(items, origin="stdin", unit="line", pairs=takes_pairs)
    except UnicodeDecodeError:
        raise DataError("stdin is not UTF-8.", hint="Convert it to UTF-8.") from None
    except BundleError as error:
        raise DataError(str(error), hint="Pass both texts of each pair.") from None
