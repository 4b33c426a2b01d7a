"""What a run has come to, to be read and to be shown."""

from setfit_kd.report.comparison import ComparedModel, compare
from setfit_kd.report.render import SPREAD_HEADINGS, spread_cells, verdict
from setfit_kd.report.summary import display_name, read_summary
from setfit_kd.report.write import write_report

__all__ = [
    "SPREAD_HEADINGS",
    "ComparedModel",
    "compare",
    "display_name",
    "read_summary",
    "spread_cells",
    "verdict",
    "write_report",
]
