"""How anybody's texts and names are written into a report: on one line, escaped, and no longer than is read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_CHARACTERS = 600
"""Longest piece of a text that is shown."""
MOST_OF_A_NAME = 80
"""Longest piece of a class's name."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!$&])")
# Control characters, and those that turn the direction of all that follows.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


def environment() -> Environment:
    """Where the templates are, with the filters that they use."""
    from jinja2 import Environment, PackageLoader

    made = Environment(
        loader=PackageLoader("setfit_kd.report"),
        autoescape=lambda name: (name or "").endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(cell=_cell, text=_text, yaml=_yaml)
    return made


def _yaml(value: str) -> str:
    """A text in quotes, on one line."""
    return yaml.safe_dump(value, default_style='"', width=float("inf")).strip()


def _text(value: Any) -> str:
    """Any value as text that Markdown shows as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", one_line(str(value)))


def _cell(value: Any) -> str:
    """The same, no longer than is read in a table's cell."""
    return _MARKDOWN.sub(r"\\\1", shortened(str(value)))


def one_line(text: str) -> str:
    """A text on one line, without characters that disturb others."""
    return " ".join(_UNSHOWN.sub(" ", text).split())


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text on one line, cut where it is too long to be read."""
    line = one_line(text[: 100 * MOST_CHARACTERS])
    is_whole = len(line) <= most and len(text) <= 100 * MOST_CHARACTERS
    return line if is_whole else line[: most - 1] + "…"


def class_name(name: str) -> str:
    """A class's name as a table shows it."""
    return shortened(name, MOST_OF_A_NAME)
