"""Progress bars and the output of libraries."""

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
    """Context manager that shows progress bars on ``console``; None disables them."""
    token = _console.set(console)
    try:
        yield
    finally:
        _console.reset(token)


@contextmanager
def track(description: str, total: int | None) -> Iterator[Advance]:
    """Context manager that shows a progress bar of ``total`` units; None means an unknown number.

    Call the yielded function with the number of units completed since the last call.
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
def suppress_warnings(library: str) -> Iterator[None]:
    """Context manager that raises the log level of a library to ERROR.

    The calling code checks the conditions that the library would warn about.
    """
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Context manager that hides progress bars of datasets, huggingface_hub and transformers, and SetFit's info logs.

    Importing SetFit sets the log level of five of its modules to INFO. If this block imports it first, the level stays
    at WARNING after the block.
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
