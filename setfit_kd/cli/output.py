"""Console output of the commands: progress and messages on stderr, results on stdout."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from setfit_kd.utils.console import hide_download_bars, printable, show_progress, stderr_console


class _ConsoleHandler(logging.Handler):
    """Logging handler that prints one unwrapped line per message; warnings and errors start with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        text = printable(f"{record.levelname.capitalize()}: " * is_warning + record.getMessage())
        style = "yellow" if is_warning else None
        stderr_console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def console_output(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Context manager that sends log messages and progress bars to stderr."""
    handler = _ConsoleHandler(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    logger = logging.getLogger("setfit_kd")
    previous_level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        with show_progress(not quiet), hide_download_bars() if quiet else nullcontext():
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
