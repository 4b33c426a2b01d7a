"""``setfit-kd report``."""

from __future__ import annotations

from pathlib import Path

import click

from setfit_kd.utils.escape import printable


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
def report(run: Path) -> None:
    """Write a run's report anew: report.html, report.md, and a model card for each student.

    Every run ends with it; this is for a run whose report was changed, lost, or made by an earlier version.
    """
    from setfit_kd.report import verdict, write_report
    from setfit_kd.run_folder import REPORT_HTML

    account = write_report(run)
    click.echo(printable(verdict(account)))
    click.echo(printable(f"The report is {run / REPORT_HTML}."))
