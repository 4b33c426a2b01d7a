"""``setfit-kd compare``."""

from __future__ import annotations

from pathlib import Path

import click

from setfit_kd.errors import ConfigError


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
def compare(runs: tuple[Path, ...]) -> None:
    """Compare the teachers, baselines and students of several runs.

    The difference in accuracy, or in macro-F1 with several labels per text, is that to the first run's first student,
    in percentage points with a 95% interval. It is left out for runs that were evaluated on other texts.
    """
    from setfit_kd.cli.output import show_table
    from setfit_kd.evaluation.metrics import METRICS
    from setfit_kd.report.summary import compare as compare_runs

    models = list(compare_runs(runs))
    if len({evaluation.task for _, _, evaluation, _ in models}) > 1:
        message = "Some runs have one label per text, others several."
        raise ConfigError(message, hint="Compare them separately.")
    metrics = METRICS[models[0][2].task]
    rows = []
    for run, name, evaluation, difference in models:
        cost, points = evaluation.cost, ""
        if difference is not None:
            points = f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
        main, *others = (f"{getattr(evaluation.quality, metric):.1%}" for metric in metrics)
        costs = [f"{evaluation.calibration.ece:.1%}", f"{cost.megabytes:.1f}", f"{cost.texts_per_second:,.0f}"]
        rows.append([str(run), name, main, points, *others, *costs])
    first, *rest = metrics.values()
    show_table(["run", "model", first, "difference", *rest, "calibration error", "MB", "texts/s"], rows)
