"""Writing of the report to the run folder."""

from __future__ import annotations

from pathlib import Path

from setfit_kd.report.render import render_card, render_html, render_markdown
from setfit_kd.report.summary import RunSummary, read_summary
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.run_folder.names import REPORT_HTML, REPORT_MARKDOWN
from setfit_kd.utils.atomic_io import write_text

_ALTERNATIVE = "copy the run to a writable folder"


def write_report(folder: str | Path) -> RunSummary:
    """Write ``report.html``, ``report.md`` and the model card of each student from the results in a run folder.

    Raises:
        DataError: If the folder contains no finished run or cannot be read.
        OutputError: If a file cannot be written, or the folder contains links.
    """
    summary = read_summary(folder)
    RunFolder.refuse_links(summary.folder)
    write_text(summary.folder / REPORT_HTML, render_html(summary), alternative=_ALTERNATIVE)
    write_text(summary.folder / REPORT_MARKDOWN, render_markdown(summary), alternative=_ALTERNATIVE)
    for source, path in summary.manifest.students.items():
        write_text(summary.folder / path / "README.md", render_card(summary, source), alternative=_ALTERNATIVE)
    return summary
