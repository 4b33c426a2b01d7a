"""Writing a run's report into its folder."""

from __future__ import annotations

from pathlib import Path

from setfit_kd.report.render import card, html, markdown
from setfit_kd.report.summary import RunSummary, read_summary
from setfit_kd.run_folder import REPORT_HTML, REPORT_MARKDOWN, RunFolder
from setfit_kd.utils.atomic_io import write_text

_ELSEWHERE = "copy the run to where you may write"


def write_report(folder: str | Path) -> RunSummary:
    """Write ``report.html``, ``report.md`` and each student's model card anew, from what the run's folder holds.

    Raises:
        DataError: There is no finished run, or it cannot be read.
        OutputError: They cannot be written, or the folder holds links.
    """
    account = read_summary(folder)
    RunFolder.refuse_links(account.folder)
    write_text(account.folder / REPORT_HTML, html(account), elsewhere=_ELSEWHERE)
    write_text(account.folder / REPORT_MARKDOWN, markdown(account), elsewhere=_ELSEWHERE)
    for source, place in account.about.students.items():
        write_text(account.folder / place / "README.md", card(account, source), elsewhere=_ELSEWHERE)
    return account
