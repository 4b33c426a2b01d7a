"""Jinja environment of the report templates, with filters that escape values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from setfit_kd.utils.escape import escape_markdown, truncate

if TYPE_CHECKING:
    from jinja2 import Environment


def template_environment() -> Environment:
    """Create the Jinja environment of the report templates."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("setfit_kd.report"),
        autoescape=lambda name: (name or "").endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=_cell, text=escape_markdown, yaml=_yaml)
    return environment


def _yaml(value: str) -> str:
    """Format a string as a quoted YAML scalar on one line."""
    return yaml.safe_dump(value, default_style='"', width=float("inf")).strip()


def _cell(value: Any) -> str:
    """Escape a value for a cell of a Markdown table and truncate it."""
    return escape_markdown(truncate(str(value)))
