"""``setfit-kd compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from setfit_kd.report.comparison import ComparedModel


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
def compare(runs: tuple[Path, ...]) -> None:
    """Compare the teachers and students of several runs.

    The difference is in accuracy to the first run's first student, in percentage points with a 95% interval. It is
    left out for runs that were evaluated on other texts.
    """
    from setfit_kd.cli.output import show_table
    from setfit_kd.report.comparison import compare as compare_runs

    headings = ("run", "model", "accuracy", "difference", "macro-F1", "calibration error", "MB", "texts/s")
    show_table(headings, [_row(model) for model in compare_runs(runs)])


def _row(model: ComparedModel) -> tuple[Any, ...]:
    evaluation, difference = model.evaluation, ""
    if model.difference is not None:
        value, low, high = (100 * x for x in (model.difference.value, model.difference.low, model.difference.high))
        difference = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return (
        str(model.run),
        model.name,
        f"{evaluation.quality.accuracy:.1%}",
        difference,
        f"{evaluation.quality.macro_f1:.1%}",
        f"{evaluation.calibration.ece:.1%}",
        f"{evaluation.cost.megabytes:.1f}",
        f"{evaluation.cost.texts_per_second:,.0f}",
    )
