"""Texts, names and messages of unknown origin, made safe to show: on a terminal, in JSON lines and in Markdown."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_CHARACTERS = 600
"""Longest piece of a text that is shown."""
MAX_NAME_CHARACTERS = 80
"""Longest piece of a class's name."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!$&])")
# Control characters, line separators, bidirectional marks and overrides, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, limit: int | None = 2_000, *, keep: str = "\n") -> str:
    r"""Escape the characters that a terminal would obey, as in ``\x1b`` and ``\u202e``.

    Args:
        text: Any text.
        limit: Most characters; a longer text is cut in its middle. None cuts nothing.
        keep: Control characters that stay as they are.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[: limit // 2]}… ({len(text) - limit:,} characters left out) …{text[len(text) - limit // 2 :]}"
    return _UNPRINTABLE.sub(lambda it: it[0] if it[0] in keep else it[0].encode("unicode_escape").decode("ascii"), text)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON without control characters; JSON has no NaN and no infinity, so they become null.

    Values of types that JSON lacks, such as dates, become strings.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=as_text)
    except ValueError:
        finite = json.loads(json.dumps(value, default=as_text), parse_constant=lambda _: None)
        text = json.dumps(finite, indent=indent, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda it: it[0] if it[0] == "\n" else f"\\u{ord(it[0]):04x}", text)


def as_text(value: Any) -> str:
    """A value of any type as text, bytes as UTF-8."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def one_line(text: str) -> str:
    """A text on one line, without characters that disturb others."""
    return " ".join(_UNPRINTABLE.sub(" ", text).split())


def truncate(text: str, most: int = MAX_CHARACTERS) -> str:
    """A text on one line, cut where it is too long to be read."""
    line = one_line(text[: 100 * MAX_CHARACTERS])
    is_whole = len(line) <= most and len(text) <= 100 * MAX_CHARACTERS
    return line if is_whole else line[: most - 1] + "…"


def class_name(name: object) -> str:
    """A class's name as a table shows it."""
    return truncate(str(name), MAX_NAME_CHARACTERS)


def markdown(value: object) -> str:
    """Any value as text that Markdown shows as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", one_line(str(value)))
