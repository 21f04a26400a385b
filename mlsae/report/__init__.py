"""HTML pages: `report.html` of one run, `comparison.html` of several side by side.

Each page is one self-contained file, so it opens anywhere, also offline. Its HTML, CSS and
JavaScript are files beside this one.
"""

from pathlib import Path

from ..errors import InputError

__all__ = ["redraw", "write_report"]


def write_report(folder: Path, out: Path | None = None) -> None:
    """Write the page of the run in `folder` to `out`, or to report.html in `folder`.

    Raises InputError if the folder holds no run, or one of its files is damaged.
    """
    from .page import write_report  # with torch and plotly, which the app does not wait for

    write_report(folder, out)


def redraw(folder: Path) -> None:
    """Redraw the report of the run in `folder` with all that is measured by now. Does nothing if
    there is no report: the folder is then a downloaded model's, or an --out elsewhere.

    Raises InputError if another file that it is drawn from is damaged.
    """
    if not (folder / "report.html").exists():
        return
    try:
        write_report(folder)
    except InputError as error:
        raise InputError(
            f"the results are written, and {folder / 'report.html'} cannot be redrawn: {error}"
        ) from error
