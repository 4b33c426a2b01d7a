"""Report of a run: summary, HTML page, Markdown and model cards."""

from setfit_kd.report.comparison import ComparedModel, compare
from setfit_kd.report.render import SEED_HEADINGS, seed_cells, verdict
from setfit_kd.report.summary import display_name, read_summary
from setfit_kd.report.write import write_report

__all__ = [
    "SEED_HEADINGS",
    "ComparedModel",
    "compare",
    "display_name",
    "read_summary",
    "seed_cells",
    "verdict",
    "write_report",
]
