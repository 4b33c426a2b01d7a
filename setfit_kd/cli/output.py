"""Console output of the commands: progress and messages on stderr, results on stdout."""

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
    from setfit_kd.evaluation.measure import Evaluation


@contextmanager
def _no_download_bars(quiet: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disable = quiet and not are_progress_bars_disabled()
    if disable:
        disable_progress_bars()
    try:
        yield
    finally:
        if disable:
            enable_progress_bars()


class _ConsoleHandler(logging.Handler):
    """Logging handler that prints one unwrapped line per message; warnings and errors start with their level."""

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
    """Context manager that sends log messages and progress bars to stderr."""
    console = Console(stderr=True)
    handler = _ConsoleHandler(console)
    handler.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    logger = logging.getLogger("setfit_kd")
    previous_level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        with show_progress(None if quiet else console), _no_download_bars(quiet):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous_level)


def echo(text: str) -> None:
    """Print text with control characters escaped."""
    click.echo(printable(text, None))


def show_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, which may be wider than the terminal: headings wrap between words, cells never wrap.

    All columns but the first are right-aligned. Markup in cells is not interpreted; control characters are escaped.
    """
    table, console = Table(box=None, padding=(0, 2, 0, 0), header_style="bold"), Console()
    cells = [[printable(f"{cell:,}" if isinstance(cell, int) else str(cell), keep="") for cell in row] for row in rows]
    min_width = 0
    for column, heading in enumerate(headings):
        width = max(map(cell_len, [*(row[column] for row in cells), *heading.split()]), default=0)
        table.add_column(heading, justify="right" if column else "left", min_width=width)
        min_width += width + 2
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table, width=max(console.width, min_width), crop=False)


def show_evaluations(evaluations: Mapping[str, Evaluation]) -> None:
    """Print one row per model: quality, then cost."""
    has_teacher = any(evaluation.quality.agreement is not None for evaluation in evaluations.values())
    agreement_heading = ("agreement",) if has_teacher else ()
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
    show_table(("", "accuracy", "95% CI", "macro-F1", *agreement_heading, "parameters", "MB", "texts/s"), rows)
