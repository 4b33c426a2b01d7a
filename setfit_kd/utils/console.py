"""Progress bars and the output of libraries."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]
_MIN_TEXTS = 10
"""Minimum number of texts for which progress is shown."""
_show = True


def disable_progress_bars() -> None:
    """Do not show progress."""
    global _show
    _show = False


def enable_progress_bars() -> None:
    """Show progress, which is the default."""
    global _show
    _show = True


@contextmanager
def show_progress(show: bool) -> Iterator[None]:
    """Context manager that shows or hides progress."""
    global _show
    previous, _show = _show, show
    try:
        yield
    finally:
        _show = previous


@cache
def stderr_console() -> Console:
    """Return the console that shows progress; messages printed on it appear above a bar."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def track(description: str, total: int | None, unit: str = "texts") -> Iterator[Advance]:
    """Context manager that shows the progress of a step on stderr: a bar, or one line if stderr is not a terminal.

    Nothing is shown for a few texts. Call the yielded function with the number of units completed since the last call.
    ``total`` is None if the number of units is unknown.
    """
    if not _show or (unit == "texts" and total is not None and total < _MIN_TEXTS):
        yield lambda _: None
        return
    from rich import progress

    if not stderr_console().is_terminal:
        size = "" if total is None else f": {total:,} {unit}"
        stderr_console().print(f"{description}{size}", markup=False, highlight=False, soft_wrap=True)
    with progress.Progress(
        progress.TextColumn("{task.description:<24}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("elapsed,"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
        console=stderr_console(),
        disable=not stderr_console().is_terminal,
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def suppress_warnings(library: str) -> Iterator[None]:
    """Context manager that raises the log level of a library to ERROR, if the caller checks what it warns about."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def hide_download_bars() -> Iterator[None]:
    """Context manager that hides the progress bars of huggingface_hub."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_enabled = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bars()


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

    transformers_logging: Any = transformers.utils.logging
    with hide_download_bars(), ExitStack() as stack:
        if transformers_logging.is_progress_bar_enabled():
            transformers_logging.disable_progress_bar()
            stack.callback(transformers_logging.enable_progress_bar)
        if datasets.is_progress_bar_enabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        if was_imported:
            stack.callback(setfit.logging.set_verbosity, setfit.logging.get_verbosity())
        setfit.logging.set_verbosity_warning()
        yield
