"""``setfit-kd compare``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
def compare(runs: tuple[Path, ...]) -> None:
    """Compare the teachers, baselines and students of several runs.

    The difference is in accuracy to the first run's first student, in percentage points with a 95% interval. It is
    left out for runs that were evaluated on other texts.
    """
    from setfit_kd.cli.output import show_table
    from setfit_kd.report.summary import compare as compare_runs

    rows = []
    for run, name, evaluation, difference in compare_runs(runs):
        quality, cost, points = evaluation.quality, evaluation.cost, ""
        if difference is not None:
            points = f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
        shares = [f"{share:.1%}" for share in (quality.macro_f1, evaluation.calibration.ece)]
        costs = [f"{cost.megabytes:.1f}", f"{cost.texts_per_second:,.0f}"]
        rows.append([str(run), name, f"{quality.accuracy:.1%}", points, *shares, *costs])
    show_table(("run", "model", "accuracy", "difference", "macro-F1", "calibration error", "MB", "texts/s"), rows)
