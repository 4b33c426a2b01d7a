"""What the commands share in front of the user: progress and messages on stderr, results on stdout."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from setfit_kd.utils.console import show_progress
from setfit_kd.utils.escape import printable

if TYPE_CHECKING:
    from setfit_kd.evaluation import Evaluation


@contextmanager
def _no_download_bars(quiet: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = quiet and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            enable_progress_bars()


class _ScreenHandler(logging.Handler):
    """A message a line, never broken; warnings say that they are."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        prefix = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        text = printable(prefix + record.getMessage())
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def console_output(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Within this block, messages and progress go to stderr."""
    console = Console(stderr=True)
    handler = _ScreenHandler(console)
    handler.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    logger = logging.getLogger("setfit_kd")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        with show_progress(None if quiet else console), _no_download_bars(quiet):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def echo(text: str) -> None:
    """Print text with control characters escaped."""
    click.echo(printable(text, None))


def show_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table as wide as its rows are, be the screen narrower: headings break between words, figures never.

    Every column but the first is set right. Cells have no markup, and their control characters are escaped.
    """
    table, console = Table(box=None, padding=(0, 2, 0, 0), header_style="bold"), Console()
    cells = [[printable(f"{cell:,}" if isinstance(cell, int) else str(cell), keep="") for cell in row] for row in rows]
    least = 0
    for number, heading in enumerate(headings):
        width = max(map(cell_len, [*(row[number] for row in cells), *heading.split()]), default=0)
        table.add_column(heading, justify="right" if number else "left", min_width=width)
        least += width + 2
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table, width=max(console.width, least), crop=False)


def show_evaluations(evaluations: Mapping[str, Evaluation]) -> None:
    """Print one row a model: quality first, then cost."""
    has_teacher = any(evaluation.quality.agreement is not None for evaluation in evaluations.values())
    as_teacher = ("as teacher",) if has_teacher else ()
    rows = []
    for name, evaluation in evaluations.items():
        quality, cost, accuracy = evaluation.quality, evaluation.cost, evaluation.intervals["accuracy"]
        agreement = "" if quality.agreement is None else f"{quality.agreement:.1%}"
        rows.append(
            (
                name,
                f"{quality.accuracy:.1%}",
                f"{100 * accuracy.low:.1f}-{100 * accuracy.high:.1f}",
                f"{quality.macro_f1:.1%}",
                *([agreement] if has_teacher else []),
                f"{cost.parameters / 1e6:.1f} M",
                f"{cost.megabytes:.1f}",
                f"{cost.texts_per_second:,.0f}",
            )
        )
    show_table(("", "accuracy", "interval", "macro-F1", *as_teacher, "parameters", "MB", "texts/s"), rows)
