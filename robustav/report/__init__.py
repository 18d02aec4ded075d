"""Reports: functions from ledgers to a table, and renderers that compute nothing."""

from robustav.report.render import FORMATS, as_json, csv, latex, markdown, print_terminal
from robustav.report.table import Report, build, worst_case

__all__ = ["FORMATS", "Report", "as_json", "build", "csv", "latex", "markdown", "print_terminal", "worst_case"]
