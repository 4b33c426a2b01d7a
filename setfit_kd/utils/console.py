"""Progress bars, the output of libraries, and escaping of untrusted text for terminals, JSON lines and Markdown."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]
_MIN_TEXTS = 10  # for which progress is shown
_enabled = True
_shown: ContextVar[bool | None] = ContextVar("shown", default=None)
MAX_CHARACTERS = 600  # of a text that is shown
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!$&])")
# Control characters, line separators, bidirectional marks and overrides, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def disable_progress_bars() -> None:
    """Do not show progress."""
    global _enabled
    _enabled = False


def enable_progress_bars() -> None:
    """Show progress, which is the default."""
    global _enabled
    _enabled = True


@contextmanager
def show_progress(show: bool) -> Iterator[None]:
    """Show or hide progress during the block, in this thread."""
    token = _shown.set(show)
    try:
        yield
    finally:
        _shown.reset(token)


@cache
def stderr_console() -> Console:
    """Return the console that shows progress; messages printed on it appear above a bar."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def track(description: str, total: int | None, unit: str = "texts") -> Iterator[Advance]:
    """Show the progress of a step on stderr: a bar, one line if it is not a terminal, or nothing for a few texts.

    Call the yielded function with the number of units completed since the last call; ``total`` may be unknown (None).
    """
    shown = _shown.get()
    if not (_enabled if shown is None else shown) or (unit == "texts" and total is not None and total < _MIN_TEXTS):
        yield lambda _: None
        return
    if not stderr_console().is_terminal:
        size = "" if total is None else f": {total:,} {unit}"
        stderr_console().print(f"{description}{size}", markup=False, highlight=False, soft_wrap=True)
        yield lambda _: None
        return
    from rich import progress

    description_column = progress.TextColumn("{task.description:<24}", markup=False)
    columns = description_column, progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn()
    time_left = progress.TextColumn("elapsed,"), progress.TimeRemainingColumn(), progress.TextColumn("left")
    with progress.Progress(*columns, *time_left, console=stderr_console()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def suppress_warnings(library: str) -> Iterator[None]:
    """Raise the log level of a library to ERROR during the block, if the caller checks what it warns about."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def hide_download_bars() -> Iterator[None]:
    """Hide the progress bars of huggingface_hub during the block."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_enabled = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bars()


@contextmanager
def quiet_libraries(*, with_setfit: bool = True) -> Iterator[None]:
    """Hide progress bars of datasets, huggingface_hub and transformers, and SetFit's info logs, during the block.

    Importing SetFit sets its log level to INFO. If this block imports it first, the level stays at WARNING afterwards.
    Without ``with_setfit``, SetFit and datasets, which take time to import, are left out.
    """
    import transformers

    transformers_logging: Any = transformers.utils.logging
    with hide_download_bars(), ExitStack() as stack:
        if transformers_logging.is_progress_bar_enabled():
            transformers_logging.disable_progress_bar()
            stack.callback(transformers_logging.enable_progress_bar)
        if not with_setfit:
            yield
            return
        was_imported = "setfit" in sys.modules
        import datasets
        import setfit

        if datasets.is_progress_bar_enabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        if was_imported:
            stack.callback(setfit.logging.set_verbosity, setfit.logging.get_verbosity())
        setfit.logging.set_verbosity_warning()
        yield


def printable(text: str, limit: int | None = 2_000, *, keep: str = "\n") -> str:
    """Escape the characters that control a terminal, except those in ``keep``; leave out the middle of a long text."""
    if limit is not None and len(text) > limit:
        text = f"{text[: limit // 2]}… ({len(text) - limit:,} characters left out) …{text[len(text) - limit // 2 :]}"
    return _UNPRINTABLE.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode("ascii"), text)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON without control characters; NaN and infinity become null, other types strings."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=as_text)
    except ValueError:
        finite = json.loads(json.dumps(value, default=as_text), parse_constant=lambda _: None)
        text = json.dumps(finite, indent=indent, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda m: m[0] if m[0] == "\n" else f"\\u{ord(m[0]):04x}", text)


def as_text(value: Any) -> str:
    """Convert any value to text; decode bytes as UTF-8."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def truncate(text: str, max_characters: int = MAX_CHARACTERS) -> str:
    """Return a text as one line of at most ``max_characters``, without control characters."""
    line = _one_line(text[: 100 * MAX_CHARACTERS])
    fits = len(line) <= max_characters and len(text) <= 100 * MAX_CHARACTERS
    return line if fits else line[: max_characters - 1] + "…"


def _one_line(text: str) -> str:
    return " ".join(_UNPRINTABLE.sub(" ", text).split())


def short_class_name(name: object) -> str:
    """Return a class name as one line, truncated for tables."""
    return truncate(str(name), 80)


def escape_markdown(value: object) -> str:
    """Convert any value to one line of text with Markdown syntax escaped."""
    return _MARKDOWN.sub(r"\\\1", _one_line(str(value)))
