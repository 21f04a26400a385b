"""Train one SAE in the environment of its library.

    python -m scripts.quality.worker DATA OUT.safetensors < cell.json > answer.json

DATA holds residuals (`scripts.quality.vectors`). The answer has the library's version, the median
seconds of a step, and how far the losses of the steps that were checked differ.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sparse_topk import keep_freed_memory

from .vectors import Vectors


def work(cell: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Train `cell`, save the weights to `out`, and answer."""
    vectors = Vectors(folder)
    if cell["package"] is None:
        from . import ours
        from .trainers import own_config

        mlsae, seconds = ours.train(own_config(cell), vectors)
        weights, differs = {n: w.detach() for n, w in mlsae.weights().items()}, None
    else:
        from . import peers

        weights, seconds, differs = peers.train(cell, vectors)
    save_file(weights, out)
    return {
        "version": version(cell["package"].split("==")[0]) if cell["package"] else None,
        "step_seconds": round(statistics.median(seconds), 4),
        "checked": differs,
    }


def main() -> None:
    """Run the program."""
    keep_freed_memory()
    folder, out = map(Path, sys.argv[1:])
    with redirect_stdout(sys.stderr):  # libraries print to stdout
        answer = work(json.load(sys.stdin), folder, out)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
