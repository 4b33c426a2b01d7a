"""Escape untrusted text for terminals, JSON lines and Markdown."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_CHARACTERS = 600
"""Maximum length of a text that is shown."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!$&])")
# Control characters, line separators, bidirectional marks and overrides, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, limit: int | None = 2_000, *, keep: str = "\n") -> str:
    r"""Escape the characters that control a terminal, such as ``\x1b`` and ``\u202e``, except those in ``keep``.

    The middle of a text with more than ``limit`` characters is left out.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[: limit // 2]}… ({len(text) - limit:,} characters left out) …{text[len(text) - limit // 2 :]}"
    return _UNPRINTABLE.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode("ascii"), text)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON without control characters.

    NaN and infinity become null. Values of other types that JSON lacks, such as dates, become strings.
    """
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
