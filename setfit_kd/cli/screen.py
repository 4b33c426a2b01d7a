"""What the commands share in front of the user: progress and messages on stderr, results on stdout."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from setfit_kd.escape import printable
from setfit_kd.progress import shown_on

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
def screen(*, quiet: bool, verbose: bool) -> Iterator[Console]:
    """Within this block, messages and progress go to stderr. Yields the console for results, on stdout."""
    console = Console(stderr=True)
    handler = _ScreenHandler(console)
    handler.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    logger = logging.getLogger("setfit_kd")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        with shown_on(None if quiet else console), _no_download_bars(quiet):
            yield Console()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def say(console: Console, text: str) -> None:
    """Print text with control characters escaped: no markup, no colours, no lines broken."""
    console.print(printable(text, None), markup=False, highlight=False, soft_wrap=True)


def show(console: Console, table: Table) -> None:
    """Print a table as wide as its rows are, be the screen narrower: headings break between words, figures never."""
    for column in table.columns:
        kept_whole = [*map(str, column.cells), *str(column.header).split()]
        column.min_width = max(map(cell_len, kept_whole), default=0)
    least = sum((column.min_width or 0) + 2 for column in table.columns)
    console.print(table, width=max(console.width, least), crop=False)


def _cell(text: str) -> Text:
    """One line of a table's cell: no markup, control characters escaped."""
    return Text(printable(text, keep=""))


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """One row a model: quality first, then cost."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    has_teacher = any(evaluation.quality.agreement is not None for evaluation in evaluations.values())
    as_teacher = ("as teacher",) if has_teacher else ()
    for heading in ("accuracy", "interval", "macro-F1", *as_teacher, "parameters", "MB", "texts/s"):
        table.add_column(heading, justify="right")
    for name, evaluation in evaluations.items():
        quality, cost = evaluation.quality, evaluation.cost
        agreement = "" if quality.agreement is None else f"{quality.agreement:.1%}"
        table.add_row(
            _cell(name),
            f"{quality.accuracy:.1%}",
            f"{100 * evaluation.intervals['accuracy'].low:.1f}-{100 * evaluation.intervals['accuracy'].high:.1f}",
            f"{quality.macro_f1:.1%}",
            *([agreement] if has_teacher else []),
            f"{cost.parameters / 1e6:.1f} M",
            f"{cost.megabytes:.1f}",
            f"{cost.texts_per_second:,.0f}",
        )
    return table


def rows_table(headings: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Table:
    """A plain table; every column but the first is set right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_cell(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    return table
