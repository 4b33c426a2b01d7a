"""The templates of reports, with the filters that escape what they show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from setfit_kd.utils.escape import markdown, truncate

if TYPE_CHECKING:
    from jinja2 import Environment


def template_environment() -> Environment:
    """Where the templates are, with the filters that they use."""
    from jinja2 import Environment, PackageLoader

    made = Environment(
        loader=PackageLoader("setfit_kd.report"),
        autoescape=lambda name: (name or "").endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(cell=_cell, text=markdown, yaml=_yaml)
    return made


def _yaml(value: str) -> str:
    """A text in quotes, on one line."""
    return yaml.safe_dump(value, default_style='"', width=float("inf")).strip()


def _cell(value: Any) -> str:
    """Markdown that shows a value as it is, no longer than is read in a table's cell."""
    return markdown(truncate(str(value)))
