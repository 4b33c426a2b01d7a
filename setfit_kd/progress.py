"""Progress of long steps: silent unless somebody asks to see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]

_console: ContextVar[Console | None] = ContextVar("console", default=None)


@contextmanager
def shown_on(console: Console | None) -> Iterator[None]:
    """Show the progress of everything within this block on ``console``; None keeps silent."""
    token = _console.set(console)
    try:
        yield
    finally:
        _console.reset(token)


@contextmanager
def track(description: str, total: int | None) -> Iterator[Advance]:
    """A step of ``total`` units, or of an unknown number.

    Call the yielded function with the units done since the last call.
    """
    console = _console.get()
    if console is None:
        yield lambda _: None
        return
    from rich import progress

    with progress.Progress(
        progress.TextColumn("{task.description:<24}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
