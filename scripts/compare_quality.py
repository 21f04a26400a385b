"""Train TopK SAEs by this package and by its peers, token for token, and measure all of them alike.

    python -m scripts.compare_quality results.jsonl
    python -m scripts.compare_quality results.jsonl --trainer normuon=1 normuon=2 adam --seed 0
    python -m scripts.compare_quality results.jsonl --table

The built-in model's residuals are harvested once, in the order of a training run. Every trainer
then sees the same standardized vectors in the same batches, and leaves an SAE of as many latents
and the same k. `NAME=FACTOR` multiplies the trainer's default peak rate; NAME alone takes the
factor that a sweep found best for it (1 for our own, which are swept no further):

    normuon              this package: the defaults of `python -m mlsae.train`
    adam                 the same with --optimizer adam
    0.2                  version 0.2.0 of this package: Adam of betas 0.9 and 0.999, --sae.init unit
    sparsify-signum      eai-sparsify 1.3.3 untouched: Signum + Schedule-Free; factor 1
    sparsify-muon        the same, Muon; factor 6
    sae-lens             SAELens 6.54.12, Adam; factor 10
    dictionary-learning  dictionary_learning 0.1.0, Adam; factor 10

Each library gets an environment of its own, which is made when it is first needed, and each
training is a process in it. FVU and the share of latents never active are measured on held-out
residuals; ΔCE and the share recovered (of what ablating by the mean costs) on some of that text,
with reconstructions put into the model, one layer at a time. docs/quality.md has a result, and
tells what in the peers is not as they are by default.

A line of JSON for each trainer, rate and seed is appended to the file, and a table of the file
ends the run. What the file has is not run again, so a run that was stopped goes on with the same
command. Seconds per step are the median of one process's; they mean little on a busy machine, and
the peers' are with this package's sparse products in place of their dense ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from bench.peers import CACHE as ENVS
from bench.peers import environment
from mlsae.errors import InputError, exit_on_bad_input
from mlsae.formats import SavedSAE
from mlsae.model import MLSAE
from scripts.quality.harvest import harvest
from scripts.quality.measure import InModel, fit_figures
from scripts.quality.results import append, read
from scripts.quality.table import table
from scripts.quality.trainers import TRAINERS, Cell
from scripts.quality.vectors import Vectors

_ROOT = Path(__file__).parent.parent


def cells_of(given: argparse.Namespace) -> list[Cell]:
    """Every trainer with every seed. Raises InputError for a trainer or a factor that is none."""
    cells = []
    for seed, text in product(given.seed, given.trainer):
        name, _, factor = text.partition("=")
        if name not in TRAINERS:
            raise InputError(f"--trainer must be of {', '.join(TRAINERS)}, got {name}; see --help")
        cell: Cell = {
            "trainer": name, "factor": _factor(factor) if factor else TRAINERS[name].factor,
            "seed": seed, "tokens": given.tokens, "batch_tokens": given.batch_tokens,
            "layers": given.layers, "n_latents": given.n_latents, "k": given.k,
        }  # fmt: skip
        cell["lr"] = cell["factor"] * TRAINERS[name].rate(cell)
        cells.append(cell)
    return cells


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise InputError(
            f"--trainer NAME=FACTOR must have a factor above 0, got {text!r}; leave it out for the "
            "best one known"
        )
    return factor


def train_apart(cell: Cell, vectors: Vectors, envs: Path, out: Path) -> dict[str, Any]:
    """Train in a process of its own, in the library's environment; weights to `out`. The answer of
    `scripts.quality.worker`."""
    package = TRAINERS[cell["trainer"]].package
    python = environment(package, envs) if package else Path(sys.executable)
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels")])
    process = subprocess.run(
        [python, "-m", "scripts.quality.worker", vectors.folder.resolve(), out],
        input=json.dumps(cell | {"package": package}),
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(process.stdout)
    return answer


Train = Callable[[Cell, Vectors, Path, Path], dict[str, Any]]


def run(
    cells: list[Cell], vectors: Vectors, results: Path, envs: Path, train: Train = train_apart
) -> None:
    """Train and measure the cells that the file has not, and append a line for each."""
    model: InModel | None = None
    for cell in cells:
        if any(cell.items() <= line.items() for line in read(results)):
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "sae.safetensors")
            answer = train(cell, vectors, envs, out)
            weights = load_file(out)
        saved = SavedSAE(weights, cell["k"], standardize=True, layers=vectors.about.layers)
        mlsae = MLSAE.from_saved(saved).requires_grad_(False)
        model = model or InModel(vectors)
        line = cell | answer | fit_figures(mlsae, vectors) | model.figures(mlsae)
        line["seconds"] = round(time.perf_counter() - started)
        append(results, line)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare_quality", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("results", type=Path, help="the file to append to, JSON lines")
    parser.add_argument(
        "--trainer", nargs="+", default=list(TRAINERS), metavar="NAME[=FACTOR]",
        help="default: all, each at the best factor known",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--tokens", type=int, default=400_000, help="default: 400000")
    parser.add_argument("--batch_tokens", type=int, default=2048, help="default: 2048")
    parser.add_argument("--slice_tokens", type=int, default=32_768, help="held out, default: 32768")
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--n_latents", type=int, default=3072, help="default: 3072")
    parser.add_argument("--k", type=int, default=32, help="default: 32")
    parser.add_argument(
        "--data", type=Path, default=Path("runs/quality"),
        help="the residuals' folder, filled if it holds none; 0.9 GB at 400,000 tokens; "
        "default: runs/quality",
    )  # fmt: skip
    parser.add_argument(
        "--envs", type=Path, default=ENVS, help=f"the environments' folder; default: {ENVS}"
    )
    parser.add_argument("--table", action="store_true", help="print the table, and run nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str], train: Train = train_apart) -> None:
    """Run the program."""
    given = parse(arguments)
    with exit_on_bad_input():
        cells = cells_of(given)
        if not given.table:
            layers = tuple(given.layers) if given.layers else None
            vectors = harvest(
                given.data, given.tokens, given.batch_tokens, given.slice_tokens, layers
            )
            run(cells, vectors, given.results, given.envs, train)
        size = ("tokens", "batch_tokens", "layers", "n_latents", "k")
        alike = {name: getattr(given, name) for name in size}
        print(table(line for line in read(given.results) if alike.items() <= line.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
