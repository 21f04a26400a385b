"""Train SAEs of many settings side by side on the built-in model's residuals, and measure each on
two slices of held-out text: one to choose by, one to report.

    python -m scripts.study results.jsonl --tokens 400000 --optimizer adam normuon --factor 1 2 4
    python -m scripts.study results.jsonl --n_latents 768 3072 12288 --k 32 --factor 2 --seed 0 1

Every combination of the values given is a cell. The cells of one call see the same batches, from
one pass of the transformer; each is trained by the code that `python -m mlsae.train` runs, so its
figures are what that program would reach. `--factor` multiplies the law of the peak rate,

    2e-4 / √(n_latents / 2¹⁴) · (10⁹ / tokens)^0.32

A line of JSON for each cell is appended to the file: settings, FVU (mean over layers, and per
layer) on both slices, the share of latents that are never active on either, L0. Cells that the file
has are not run again, so that a study that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mlsae.config import SAEConfig, TrainConfig, law_of_rates
from mlsae.data.config import DataConfig
from mlsae.data.stream import DataStream, read_shape
from mlsae.errors import NonFiniteError
from mlsae.training.init import mlsae_config
from mlsae.training.loop import train_step
from mlsae.training.start import initialize, new_state
from mlsae.training.state import TrainState
from mlsae.training.validation import validate
from scripts.quality.measure import figures_of
from scripts.quality.results import append, read
from sparse_topk import keep_freed_memory

SLICE_TOKENS = 32_768
MICRO_TOKENS = 2048

Cell = dict[str, Any]
"""The settings that tell one training from another, by the names of the arguments."""


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """Every combination of the values that the command line gives; of each, every `--cell`."""
    fixed = {"tokens": arguments.tokens, "batch_tokens": arguments.batch_tokens}
    columns = [getattr(arguments, name) for name in _LISTS]
    cells = [fixed | dict(zip(_LISTS, values, strict=True)) for values in product(*columns)]
    if not arguments.cell:
        return cells
    given = [dict(word.split("=", 1) for word in words) for words in arguments.cell]
    changed = [{name: _LISTS[name][0](text) for name, text in words.items()} for words in given]
    return [cell | change for change in changed for cell in cells]


def config_of(cell: Cell) -> TrainConfig:
    """The settings of a training, as `mlsae.train` takes them."""
    betas = tuple(map(float, cell["betas"].split(","))) if cell["betas"] else None
    layers = tuple(map(int, cell["layers"].split(","))) if cell["layers"] else None
    config = TrainConfig(
        DataConfig(model=cell["model"], layers=layers, model_dtype="float32"),  # on every machine
        tokens=cell["tokens"],
        batch_tokens=cell["batch_tokens"],
        micro_tokens=MICRO_TOKENS,
        optimizer=cell["optimizer"],
        decoder_optimizer=cell["decoder_optimizer"],
        betas=betas,
        decay=cell["decay"],
        warmup=cell["warmup"],
        seed=cell["seed"],
        sae=SAEConfig(
            n_latents=cell["n_latents"], k=cell["k"], init=cell["init"],
            aux_weight=cell["aux_weight"], activation=cell["activation"],
        ),
    )  # fmt: skip
    return replace(config, lr=cell["factor"] * law_of_rates(cell["n_latents"], cell["tokens"]))


def measure(states: list[TrainState], stream: DataStream, heldout: Tensor) -> list[dict[str, Any]]:
    """The figures of each SAE, on both slices of the held-out rows (B, T)."""
    mlsaes = [state.mlsae for state in states]
    slices = heldout.chunk(2)
    choose, report = (validate(mlsaes, stream.kept_and_dropped(rows)) for rows in slices)
    return [
        {
            **figures_of(one, other),
            "dead": round(state.dead_share(), 5),
            "l0_layers": [round(value, 2) for value in other.l0.tolist()],
        }
        for one, other, state in zip(choose, report, states, strict=True)
    ]


def study(cells: list[Cell], path: Path, evals: list[int]) -> None:
    """Train the cells, and append what comes out to the file at `path`."""
    configs = [config_of(cell) for cell in cells]
    config, shape = configs[0], read_shape(configs[0].data)
    stream = DataStream(
        config.data, shape, torch.device("cpu"),
        micro_rows=max(1, MICRO_TOKENS // shape.seq_len), whole=False,
    )  # fmt: skip
    heldout = stream.heldout(2 * SLICE_TOKENS)
    batches = stream.batches(config.batch_tokens // stream.seq_len)
    rows, states = next(batches), []
    for each in configs:
        sae = mlsae_config(each, shape)
        states.append(new_state(each, sae, stream.device, stream.mesh, each.tokens))
    initialize(configs, states, stream, rows)
    started, due = time.time(), sorted(evals)
    alive, tokens = list(range(len(cells))), 0
    bar = tqdm(total=config.tokens, unit=" tokens", unit_scale=True, mininterval=30)
    with closing(batches), bar:
        while alive and tokens < config.tokens:
            n_tokens, parts = stream.count(rows), list(stream.masked_residuals(rows))
            for i in list(alive):  # apart, so that one that diverges does not end the others
                try:
                    train_step([states[i]], parts, n_tokens)
                except NonFiniteError as error:
                    append(path, cells[i] | {"error": str(error)})
                    alive.remove(i)
            tokens, rows = tokens + n_tokens, next(batches)
            bar.update(n_tokens)
            done = tokens >= config.tokens
            if not done and not (due and tokens >= due[0]):
                continue
            due = [at for at in due if at > tokens]
            about = {"seconds": round(time.time() - started)} | ({} if done else {"at": tokens})
            figures = measure([states[i] for i in alive], stream, heldout) if alive else []
            for i, own in zip(alive, figures, strict=True):
                append(path, cells[i] | about | {"lr": configs[i].lr} | own)


_LISTS: dict[str, tuple[type, list[Any]]] = {
    "model": (str, ["builtin"]),
    "layers": (str, [None]),
    "optimizer": (str, ["normuon"]),
    "decoder_optimizer": (str, [None]),
    "betas": (str, [None]),
    "factor": (float, [1.0]),
    "init": (str, ["fitted"]),
    "n_latents": (int, [3072]),
    "k": (int, [32]),
    "decay": (float, [0.3]),
    "warmup": (float, [0.01]),
    "aux_weight": (float, [1 / 32]),
    "activation": (str, ["topk"]),
    "seed": (int, [0]),
}


def main(arguments: list[str]) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.study", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("results", type=Path, help="the file to append to, JSON lines")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--batch_tokens", type=int, default=2048)
    parser.add_argument("--evals", type=int, nargs="*", default=[], help="tokens to measure at too")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument(
        "--cell", nargs="+", action="append", metavar="NAME=VALUE",
        help="a cell that differs in these settings only; may be given several times",
    )  # fmt: skip
    for name, (kind, default) in _LISTS.items():
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=default)
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    keep_freed_memory()
    cells = cells_of(given)
    done = [line for line in read(given.results) if "at" not in line]
    cells = [c for c in cells if not any(c.items() <= line.items() for line in done)]
    if cells:
        study(cells, given.results, given.evals)


if __name__ == "__main__":
    main(sys.argv[1:])
