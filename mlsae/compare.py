"""Does one SAE for all layers cost anything? Train it, and one of each layer; measure all at all.

    python -m mlsae.compare                                # built-in model and corpus, offline
    python -m mlsae.compare EleutherAI/pythia-70m-deduped monology/pile-uncopyrighted \\
        --sae.expansion 64 --tokens 1000000000 --batch_tokens 131072 --out runs/70m-compare

The MLSAE and the single-layer SAEs have the same size, settings and tokens; the MLSAE has seen a
vector of each layer for every token, a single-layer SAE those of its own layer. Every argument is
that of `python -m mlsae.train`; --layers are the layers to train on, alone and together, and to
measure at. It leaves a folder per run (OUT/all, OUT/layer-0, …, each with its evaluation) and
comparison.csv in OUT; with --resume it resumes after a stop.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from . import cli
from .config import (
    PRESETS,
    SAEConfig,
    TrainArguments,
    TrainConfig,
    check_config,
    heldout_tokens,
)
from .data.sinks import DropRule
from .errors import InputError, NonFiniteError
from .evaluation import sharing
from .evaluation.result import EvaluationResult
from .evaluation.run import EvaluateConfig, evaluate
from .evaluation.sharing import SHARED, Results
from .files import check_out, locked, write_file
from .launcher import launched, log_rank0
from .training.init_sizes import sized_as_init
from .training.run import train

_OUT = Path("runs/compare")
_OWN = ("comparison.csv", SHARED, "layer-*")  # what is in it
_PRESETS = {
    # Small, for seven SAEs on two cores; else the defaults of training.
    "default": TrainConfig(
        sae=SAEConfig(expansion=8), tokens=200_000, eval_tokens=16_384, out=_OUT
    ),
    "paper": replace(PRESETS["paper"], out=_OUT),
}


def compare(config: TrainConfig) -> Results:
    """Train and evaluate the MLSAE ("all") and each single-layer SAE ("0", …) at all of the layers:
    the results by name. Writes comparison.csv.

    Raises InputError for bad input, before anything is written.
    """
    check_config(config)
    if launched():
        raise InputError(
            "python -m mlsae.compare must run as one process, got several; train the runs with "
            "torchrun -m mlsae.train, then measure each with python -m mlsae.evaluate --layers"
        )
    with locked(config.out):
        check_out(config.out, config.overwrite, config.resume, _OWN, 0)
        return _compare(config)


def _compare(config: TrainConfig) -> Results:
    log_rank0("SAE of all layers")
    results = {SHARED: _one(config, config.out / SHARED, config.data.layers, config.data.layers)}
    layers = results[SHARED].layers
    # Others see other layers, and so might drop other tokens: all are measured on the same ones.
    drop = DropRule.from_dict(results[SHARED].provenance.dropped)
    for layer in layers:
        log_rank0(f"SAE of layer {layer}")
        results[str(layer)] = _one(config, config.out / f"layer-{layer}", (layer,), layers, drop)
    write_file(config.out / "comparison.csv", sharing.as_csv(results).encode())
    return results


def _one(
    config: TrainConfig,
    out: Path,
    trained: tuple[int, ...] | None,
    measured: tuple[int, ...] | None,
    drop: DropRule | None = None,
) -> EvaluationResult:
    """Train on the layers `trained`, and measure at those `measured`. None: all. Measure without
    what `drop` names; None: as in training."""
    train(replace(config, out=out, data=replace(config.data, layers=trained)))
    return evaluate(
        EvaluateConfig(
            out, tokens=heldout_tokens(config), layers=measured, device=config.device, joint="off"
        ),
        drop,
    )


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings of a command line. Raises InputError if it asks for SAEs of several sizes."""
    default = TrainArguments.defaults(cli.preset(arguments, _PRESETS))
    default = sized_as_init(default, arguments)
    prog = "python -m mlsae.compare"
    configs = cli.parse(TrainArguments, __doc__, arguments, prog, default).configs()
    if len(configs) > 1:
        raise InputError(
            "--sae.k, --sae.expansion, --sae.n_latents and --seeds must have one value each to "
            "compare SAEs of the same size, got several; compare one at a time"
        )
    return configs[0]


def main() -> None:
    """Run the program."""
    cli.run_program(
        lambda: _compare_and_print(parse(sys.argv[1:])),
        NonFiniteError,
        interrupted="interrupted; resume with --resume",
    )


def _compare_and_print(config: TrainConfig) -> None:
    results = compare(config)
    where = "trained on (rows), measured at (columns)"
    Console(highlight=False).print(
        sharing.table(results, "fvu", f"FVU on held-out text, {where}"),
        sharing.table(results, "delta_ce", f"ΔCE in nats per token, {where}"),
        sharing.summary(results),
        f"metrics, with intervals: {config.out / 'comparison.csv'}",
        sep="\n",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
