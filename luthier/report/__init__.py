"""What a run changed, for people: one HTML page, a summary in the terminal, and runs side by side."""

from luthier.report.html import write_report

__all__ = ["write_report"]
