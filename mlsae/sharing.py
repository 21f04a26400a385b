"""What sharing costs: an MLSAE of all layers beside single-layer SAEs of the same size.

    python -m mlsae.sharing --out runs/sharing                # built-in model: some minutes
    python -m mlsae.sharing EleutherAI/pythia-70m-deduped monology/pile-uncopyrighted \\
        --sae.expansion 64 --tokens 100000000 --out runs/sharing-70m

It trains each as `python -m mlsae.train` does, with the same settings, text and number of tokens,
into OUT/shared and OUT/layer-0, OUT/layer-1, …; measures each at every layer as `python -m
mlsae.evaluate` does; prints a table; and leaves OUT/sharing.csv (a row an SAE and layer). It is the
comparison of arXiv 2409.04185: an SAE of one layer sees 1 / L of the vectors that the shared one
sees. Any argument of training can be given; --layers says which layers are compared.

Legend: L layers.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import replace

import transformers
import tyro
from rich.console import Console
from rich.table import Table

from .config import SAEConfig, TrainConfig, runs_of
from .errors import InputError, exit_on_bad_input
from .evaluate import EvaluateConfig, Result, evaluate
from .files import write_file
from .train import train

_DEFAULT = TrainConfig(sae=SAEConfig(expansion=8), tokens=200_000, eval_tokens=32_768)
_COLUMNS = ("fvu", "fvu_paper", "delta_ce", "kl")


def compare(config: TrainConfig) -> dict[str, Result]:
    """Train and measure as `config` says; the result of each SAE by its folder's name.

    Raises InputError for bad input.
    """
    several = len(runs_of(config)) > 1
    if config.resume or several:
        name = "--resume" if config.resume else "several --sae.k or sizes"
        raise InputError(
            f"a comparison is of one size and starts anew, got {name}; give one, without --resume"
        )
    (shared,) = train(replace(config, out=config.out / "shared")).values()
    layers = shared.config.layers
    runs = {"shared": config.out / "shared"}
    for layer in layers:
        runs[f"layer-{layer}"] = config.out / f"layer-{layer}"
        train(replace(config, layers=(layer,), out=runs[f"layer-{layer}"]))
    tokens, device = config.eval_tokens, config.device
    return {
        name: evaluate(EvaluateConfig(run, layers=layers, tokens=tokens, device=device))
        for name, run in runs.items()
    }


def as_csv(results: dict[str, Result]) -> str:
    """A row an SAE and layer: FVU, ΔCE and KL, with their intervals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ("", "_low", "_high")
    writer.writerow(["sae", "layer", *(name + end for name in _COLUMNS for end in ends)])
    for sae, result in results.items():
        for i, layer in enumerate(result.layers):
            cells = (column[i].item() for name in _COLUMNS for column in result.figures[name])
            writer.writerow([sae, layer, *cells])
    return text.getvalue()


def table(results: dict[str, Result], name: str, title: str) -> Table:
    """To print: a row an SAE, a column a layer; a single-layer SAE's own layer stands out."""
    layers = next(iter(results.values())).layers
    found = Table(title=title)
    found.add_column("trained on")
    for layer in layers:
        found.add_column(f"layer {layer}", justify="right")
    for sae, result in results.items():
        values = result.figures[name].value[:-1].tolist()
        cells = [
            f"[bold]{value:.3f}[/bold]" if sae == f"layer-{layer}" else f"{value:.3f}"
            for layer, value in zip(layers, values, strict=True)
        ]
        found.add_row("all layers" if sae == "shared" else sae.replace("-", " "), *cells)
        if sae == "shared":
            found.add_section()
    return found


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings of a command line."""
    return tyro.cli(
        TrainConfig,
        args=arguments,
        default=_DEFAULT,
        description=(__doc__ or "").split("Legend:")[0],
        use_underscores=True,
        prog="python -m mlsae.sharing",
    )


def main() -> None:
    """The program."""
    config = parse(sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False)
    with exit_on_bad_input():
        results = compare(config)
        write_file(config.out / "sharing.csv", as_csv(results).encode())
    console.print(
        table(results, "fvu", "FVU at each layer"),
        table(results, "delta_ce", "ΔCE at each layer, nats"),
        "bold: a single-layer SAE at its own layer, to be held against the first row",
        f"figures: {config.out / 'sharing.csv'}",
        sep="\n",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
