"""Does one SAE for all layers cost anything? Train it, and one of each layer; measure all at all.

    python -m mlsae.compare                                # built-in model and corpus, offline
    python -m mlsae.compare EleutherAI/pythia-70m-deduped monology/pile-uncopyrighted \\
        --sae.expansion 64 --tokens 1000000000 --batch_tokens 131072 --out runs/70m-compare

The MLSAE and the single-layer SAEs have the same size, settings and tokens; the MLSAE has seen a
vector of each layer for every token, a single-layer SAE those of its own. Every argument is that
of `python -m mlsae.train`; --layers are the layers that are trained on, alone and together, and
measured at. It leaves a run a folder (OUT/all, OUT/layer-0, …, each with its evaluation) and
comparison.csv in OUT; with --resume it goes on after a stop.

Legend: L layers.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .config import PRESETS, SAEConfig, TrainConfig, check_config, runs_of
from .distributed import launched, log_rank0
from .errors import InputError, exit_on_bad_input
from .evaluation.result import EvaluationResult as Result
from .evaluation.run import EvaluateConfig, evaluate
from .files import check_out, write_file
from .train import parse as parse_training
from .train import train
from .training.state import NonFiniteError

SHARED = "all"
_FIGURES = ("fvu", "fvu_paper", "delta_ce", "kl", "top1")
# Small, for seven SAEs on two cores; else the defaults of training.
_DEFAULT = replace(
    PRESETS["default"],
    sae=SAEConfig(expansion=8),
    tokens=200_000,
    eval_tokens=16_384,
    out=Path("runs/compare"),
)


def compare(config: TrainConfig) -> dict[str, Result]:
    """Train and measure the MLSAE ("all") and each single-layer SAE ("0", …): what
    `mlsae.evaluate` found of each, at all of the layers. Writes comparison.csv.

    Raises InputError for bad input, before anything is written.
    """
    check_config(config)
    if launched():
        raise InputError(
            "python -m mlsae.compare must run as one process, got several; train the runs with "
            "torchrun -m mlsae.train, then measure each with python -m mlsae.evaluate --layers"
        )
    if len(runs_of(config)) > 1:
        raise InputError(
            "--sae.k, --sae.expansion and --sae.n_latents must have one value each to compare "
            "SAEs of the same size, got several; compare one size at a time"
        )
    own = ("comparison.csv", SHARED, "layer-*")
    check_out(config.out, config.overwrite, config.resume, own, 0)
    log_rank0("SAE of all layers")
    found = {SHARED: _one(config, config.out / SHARED, config.layers, config.layers)}
    layers = found[SHARED].layers
    for layer in layers:
        log_rank0(f"SAE of layer {layer}")
        found[str(layer)] = _one(config, config.out / f"layer-{layer}", (layer,), layers)
    write_file(config.out / "comparison.csv", _as_csv(found).encode())
    return found


def _one(
    config: TrainConfig,
    out: Path,
    trained: tuple[int, ...] | None,
    measured: tuple[int, ...] | None,
) -> Result:
    """Train on the layers `trained`, and measure at those `measured`. None: all."""
    train(replace(config, out=out, layers=trained))
    return evaluate(
        EvaluateConfig(out, tokens=config.eval_tokens, layers=measured, device=config.device)
    )


def grid(found: dict[str, Result], figure: str) -> Tensor:
    """A figure [trained on, measured at]: (1 + L, L), the MLSAE's row first, float64."""
    return torch.stack([result.metrics[figure].value[:-1] for result in found.values()]).double()


def _as_csv(found: dict[str, Result]) -> str:
    """A row for each SAE and layer; the figures are those of `mlsae.evaluate`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ("", "_low", "_high")
    writer.writerow(["trained_on", "measured_at", *(f + end for f in _FIGURES for end in ends)])
    for trained, result in found.items():
        for i, layer in enumerate(result.layers):
            cells = (column[i].item() for f in _FIGURES for column in result.metrics[f])
            writer.writerow([trained, layer, *cells])
    return text.getvalue()


def table(found: dict[str, Result], figure: str, title: str) -> Table:
    """A row an SAE, a column a layer that it is measured at; its own layer is bold."""
    layers = found[SHARED].layers
    made = Table(title=title)
    made.add_column("trained on", justify="right")
    for layer in layers:
        made.add_column(f"at {layer}", justify="right")
    for name, row in zip(found, grid(found, figure).tolist(), strict=True):
        cells = [
            f"[bold]{value:.4f}[/bold]" if name in (SHARED, str(layer)) else f"{value:.4f}"
            for layer, value in zip(layers, row, strict=True)
        ]
        made.add_row(name, *cells)
        if name == SHARED:
            made.add_section()
    return made


def summary(found: dict[str, Result]) -> str:
    """One sentence: what sharing costs, and what a single-layer SAE is worth elsewhere."""
    fvu = grid(found, "fvu")
    n_layers = fvu.shape[1]
    own = fvu[1:].diagonal().mean().item()
    text = f"FVU, mean over layers: {fvu[0].mean():.4f} shared, {own:.4f} with an SAE a layer"
    if n_layers > 1:
        elsewhere = (fvu[1:].sum() - fvu[1:].trace()).item() / (n_layers * (n_layers - 1))
        text += f", {elsewhere:.4f} with one of another layer"
    return text


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings of a command line."""
    presets = {**PRESETS, "default": _DEFAULT}
    presets["paper"] = replace(presets["paper"], out=_DEFAULT.out)
    return parse_training(
        arguments, presets, (__doc__ or "").split("Legend:")[0], "python -m mlsae.compare"
    )


def main() -> None:
    """The program."""
    config = parse(sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False)
    with exit_on_bad_input():
        try:
            found = compare(config)
        except NonFiniteError as error:
            log_rank0(f"error: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            log_rank0("interrupted; go on with --resume")
            sys.exit(130)
        console.print(
            table(found, "fvu", "FVU on held-out text, trained on (rows), measured at (columns)"),
            table(
                found, "delta_ce", "ΔCE in nats a token, trained on (rows), measured at (columns)"
            ),
            summary(found),
            f"figures, with intervals: {config.out / 'comparison.csv'}",
            sep="\n",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
