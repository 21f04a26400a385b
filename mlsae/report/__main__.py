"""Draw the page of a run, report.html, or a page that compares several runs, comparison.html.

    python -m mlsae.report runs/demo                       # runs/demo/report.html
    python -m mlsae.report runs/x16 runs/x64 runs/x64-k64  # comparison.html

A page is one self-contained file that opens anywhere, also offline. It shows what the run's files
hold. If `mlsae.evaluate` or `mlsae.analyze` has not been run yet, it names the command to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import InputError, exit_on_bad_input
from .comparison import write_comparison
from .page import write_report


@dataclass(frozen=True)
class ReportConfig:
    """What to draw, and where to write it."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
    """The folder of a run. Several folders are compared."""
    out: Path | None = None
    """The page to write. None: report.html in the run's folder, or for several runs
    comparison.html in the current folder."""


def main() -> None:
    """The program."""
    config = tyro.cli(
        ReportConfig, description=__doc__, use_underscores=True, prog="python -m mlsae.report"
    )
    with exit_on_bad_input():
        if not config.runs:
            raise InputError("RUN must be given at least once, got none; name the folder of a run")
        out = config.out or (
            Path("comparison.html") if config.runs[1:] else config.runs[0] / "report.html"
        )
        if config.out and (out.is_dir() or not out.parent.is_dir()):
            raise InputError(
                f"--out must be a file in a folder that is there, got {out}; name a page, as in "
                "--out comparison.html"
            )
        if config.runs[1:]:
            write_comparison(config.runs, out)
        else:
            write_report(config.runs[0], out)
        print(out)


if __name__ == "__main__":
    main()
