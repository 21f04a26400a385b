"""Pages to show others: a run as one (`report.html`), and several side by side.

Each is self-contained, so it opens anywhere, offline too. The HTML, CSS and JavaScript lie in files
of their own beside this one.
"""

from pathlib import Path

from .page import write_report

__all__ = ["redraw", "write_report"]


def redraw(folder: Path) -> None:
    """Draw the report of the run in `folder` again, with what has been measured by now. A folder
    without one stays without: that of a model from the hub, or an --out elsewhere."""
    if (folder / "report.html").exists():
        write_report(folder)
