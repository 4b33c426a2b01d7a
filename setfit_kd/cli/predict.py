"""``setfit-kd predict``."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click

from setfit_kd.cli.options import given, setting_options, verbosity_options
from setfit_kd.config import RunConfig
from setfit_kd.errors import DataError

_CHUNK = 1024


@click.command()
@click.argument("model", metavar="RUN_OR_MODEL")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--input", "-i", "files", multiple=True, metavar="FILE",
              help="Read texts from a CSV, TSV, JSONL, Parquet or text file; may be repeated.")  # fmt: skip
@setting_options("text_column", "device", "cpu_fallback", "encode_batch_size")
@click.option("--trust-pickle", is_flag=True, help="Load a pickled head of somebody else's; it may run any code.")
@verbosity_options
def predict(
    model: str,
    texts: tuple[str, ...],
    files: tuple[str, ...],
    trust_pickle: bool,
    quiet: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Classify texts: the arguments, files, or one a line from stdin.

    RUN_OR_MODEL is a run's folder, a SetFit folder, or a SetFit model on the hub. Prints one JSON object a text:
    {"text": ..., "label": ..., "probabilities": {...}}.
    """
    from setfit_kd.cli.screen import screen
    from setfit_kd.memory import remembering
    from setfit_kd.models import load, predict_proba
    from setfit_kd.progress import shown_on

    config = RunConfig.of(**given(flags))
    output = sys.stdout.buffer
    with screen(quiet=quiet, verbose=verbose), remembering(cpu_fallback=config.cpu_fallback):
        classifier = load(model, device=config.device, trust_pickle=trust_pickle)
        names = classifier.labels
        for chunk in _chunks(_texts(texts, files, config.text_column)):
            with shown_on(None):
                probabilities = predict_proba(classifier, chunk, batch_size=config.encode_batch_size)
            for text, row in zip(chunk, probabilities, strict=True):
                record: dict[str, Any] = {"text": text, "label": names[int(row.argmax())]}
                record["probabilities"] = {name: round(float(p), 6) for name, p in zip(names, row, strict=True)}
                output.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
            output.flush()


def _texts(texts: tuple[str, ...], files: tuple[str, ...], text_column: Sequence[str]) -> Iterator[str]:
    from setfit_kd.data import read

    yield from texts
    for file in files:
        if not Path(file).is_file():
            raise DataError(f"There is no file {file}.", hint="Check the path.")
        yield from read(file, text_column=text_column).texts
    if not texts and not files:
        if sys.stdin.isatty():
            raise DataError("There is nothing to classify.", hint="Give texts, --input FILE, or lines on stdin.")
        stdin = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8")
        try:
            yield from (line.rstrip("\r\n") for line in stdin)
        except UnicodeDecodeError as error:
            raise DataError(f"stdin is not UTF-8 (byte {error.start}).", hint="Convert it to UTF-8.") from None


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
