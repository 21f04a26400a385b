"""Draw the page of a run, report.html, or a page that compares several runs, comparison.html.

    python -m mlsae.report runs/demo                       # runs/demo/report.html
    python -m mlsae.report runs/x16 runs/x64 runs/x64-k64  # comparison.html

A page is one self-contained file that opens anywhere, also offline. It shows what the run's files
hold. If `mlsae.evaluate` or `mlsae.analyze` has not been run yet, it names the command to run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..cli import parse, run_program
from ..errors import InputError
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


def draw(config: ReportConfig) -> Path:
    """Write the page that `config` asks for: its path.

    Raises InputError if a folder holds no run, or the page cannot be written there.
    """
    if not config.runs:
        raise InputError("RUN must be given at least once, got none; name the folder of a run")
    first, *others = config.runs
    out = config.out or (Path("comparison.html") if others else first / "report.html")
    if config.out and (not out.parent.is_dir() or (out.exists() and not out.is_file())):
        raise InputError(
            f"--out must be a file in a folder that is there, got {out}; name a page, as in "
            "--out comparison.html"
        )
    if others:
        write_comparison(config.runs, out)
    else:
        write_report(first, out)
    return out


def main() -> None:
    """Run the program."""
    config = parse(ReportConfig, __doc__, sys.argv[1:], "python -m mlsae.report")
    run_program(lambda: print(draw(config)))


if __name__ == "__main__":
    main()
