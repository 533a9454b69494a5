"""`peftkern report`: one page before training, all of it measured, with intervals and with what cannot be
told."""

from .build import ReportOptions, transfer_report
from .page import Line, Page, Plot, Section, write_page

__all__ = ["Line", "Page", "Plot", "ReportOptions", "Section", "transfer_report", "write_page"]
