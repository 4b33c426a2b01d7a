"""``setfit-kd report``."""

from __future__ import annotations

from pathlib import Path

import click

from setfit_kd.utils.console import printable


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
def report(run: Path) -> None:
    """Rewrite the report of a run: report.html and one model card per student.

    Every run writes its report at the end. Use this command if the report was changed, lost, or written by an earlier
    version.
    """
    from setfit_kd.report.render import verdict, write_report
    from setfit_kd.report.task_report import write_task_report
    from setfit_kd.run_folder.folder import RunFolder
    from setfit_kd.run_folder.names import CONFIG_FILE, REPORT_HTML

    has_task = (run / CONFIG_FILE).is_file() and "task" in RunFolder.read_settings(run)
    text = write_task_report(run) if has_task else verdict(write_report(run))
    click.echo(printable(text))
    click.echo(printable(f"Report: {run / REPORT_HTML}"))
