"""Run the notebooks from start to end, offline, as a reader would.

    make notebooks
    python -m scripts.run_notebooks                    # all; or the names of some

The executed copies are left in build/notebooks, and the seconds that each took are printed. It
fails where a cell fails, or takes ten minutes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "notebooks"
SECONDS = 600  # for a cell
ORDER = ("train_and_look", "one_latent", "swap_kernels")
"""As a reader takes them: the second one uses the run that the first one leaves."""


def run(name: str) -> bool:
    """Run a notebook in `OUT`, and print how long it took. Returns whether it came to its end."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    start = time.monotonic()
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": OUT}}
    )
    failure = ""
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
        failure = str(error)
    nbformat.write(notebook, OUT / f"{name}.ipynb")
    print(f"{name}: {time.monotonic() - start:.0f} s {failure}")
    return not failure


def main() -> int:
    """Run those that the command line names, or all."""
    OUT.mkdir(parents=True, exist_ok=True)
    results = [run(name) for name in sys.argv[1:] or ORDER]  # all of them, before it fails
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
