"""Progress bars, and how libraries are kept quiet."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]

_console: ContextVar[Console | None] = ContextVar("console", default=None)


@contextmanager
def show_progress(console: Console | None) -> Iterator[None]:
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


@contextmanager
def without_warnings(library: str) -> Iterator[None]:
    """Within this block, a library logs errors only: what it would warn of is checked by us."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within this block, the libraries below draw no progress bars of their own and SetFit logs warnings only.

    Importing SetFit raises its log level to INFO in five modules; where this block is the first to import it, the
    level stays at WARNING afterwards too.
    """
    was_imported = "setfit" in sys.modules
    import datasets
    import setfit
    import transformers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    transformers_logging: Any = transformers.utils.logging
    level = setfit.logging.get_verbosity()
    undo = []
    if transformers_logging.is_progress_bar_enabled():
        transformers_logging.disable_progress_bar()
        undo.append(transformers_logging.enable_progress_bar)
    if datasets.is_progress_bar_enabled():
        datasets.disable_progress_bars()
        undo.append(datasets.enable_progress_bars)
    if not are_progress_bars_disabled():
        disable_progress_bars()
        undo.append(enable_progress_bars)
    setfit.logging.set_verbosity_warning()
    try:
        yield
    finally:
        if was_imported:
            setfit.logging.set_verbosity(level)
        for enable in undo:
            enable()
