"""Pages to show others: a run as one (`report.html`), and several side by side.

Each is self-contained, so it opens anywhere, offline too. The HTML, CSS and JavaScript lie in files
of their own beside this one.
"""

from .page import write_report

__all__ = ["write_report"]
