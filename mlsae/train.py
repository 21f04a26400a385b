"""Train a multi-layer SAE on the residual stream of every layer of a transformer.

    python -m mlsae.train                                    # built-in model and corpus, offline
    python -m mlsae.train EleutherAI/pythia-70m-deduped monology/pile-uncopyrighted \\
        --sae.expansion 64 --sae.k 32 --tokens 1000000000 --batch_tokens 131072 --out runs/70m
    python -m mlsae.train … --out runs/70m --resume          # go on after a stop, to the same bits
    python -m mlsae.train --sae.k 16 32 64 --sae.expansion 8 16 --out runs/grid      # six at once

It leaves a folder that stands alone: config.json, model.safetensors, latents.safetensors,
metrics.jsonl and report.html. `MLSAE.from_pretrained(FOLDER)` loads it. Several SAEs train side by
side on the same residuals, so that the transformer runs once for all of them; each ends as it
would alone, in a folder of its own in OUT.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from torch import Tensor

from sparse_topk import backend_name

from . import checkpoint
from .activations import choose_device
from .config import PRESETS, TrainConfig, check_config, check_same, runs_of
from .errors import InputError, exit_on_bad_input
from .files import check_out
from .fit import Fit, say
from .logs import check_loggers
from .memory import check_memory, estimate
from .model import MLSAE
from .run import Run
from .source import Source
from .summary import print_summary, write_csv
from .trainer import NonFiniteError, Trainer, survey

RUN_FILES = (
    "config.json",
    "model.safetensors",
    "latents.safetensors",
    "metrics.jsonl",
    "report.html",
    "evaluation.csv",
    "evaluation.json",
    "analysis.json",
    "analysis.safetensors",
    "analysis_latents.parquet",
    "analysis_examples.parquet",
    "analysis_prompt.json",
    "prompt.html",
    "checkpoints",
    "tensorboard",
    "wandb",
)
RUN_FOLDERS = ("x*-k*", "n*-k*")  # see `config.runs_of`


def train(config: TrainConfig) -> dict[Path, MLSAE]:
    """Train as `config` says; leave each run in its folder: the MLSAEs by folder.

    Raises InputError for bad input, before anything is written; NonFiniteError where a loss is
    not finite; SystemExit (128 + the signal's number) after SIGINT or SIGTERM, with a checkpoint
    written and models that load.
    """
    check_config(config)
    check_loggers(config.log)
    device = choose_device(config.device)

    # What is read: the training so far, the transformer, the layers of it, the text.
    path, state = _training_so_far(config) if config.resume else (None, None)
    source = Source(config, device)
    _check_out(config, source)
    heldout = source.heldout()

    try:
        say(f"training on {device} with the {backend_name(device)} kernels")
    except ValueError as error:  # an unknown SPARSE_TOPK_BACKEND
        raise InputError(str(error)) from error

    # What is trained: an SAE for each run. The first batch sets b_pre and the first variances,
    # then is trained on.
    trainers = _new_trainers(config, source)
    batches = source.batches(state["batches"] if state else None)
    first: list[Tensor] = []
    if not state:
        first = [next(batches)]
        mlsae = next(iter(trainers.values())).mlsae
        moments, centre = survey(mlsae, source.residuals(first[0]))
        for trainer in trainers.values():
            trainer.initialize(moments, centre)
        _empty(config.out)

    # Train, and measure on held-out rows.
    with ExitStack() as stack:
        stack.enter_context(closing(batches))
        runs = []
        for name, settings in runs_of(config).items():
            settings.out.mkdir(parents=True, exist_ok=True)
            run = Run(name, settings, trainers[name], state["runs"][name] if state else None)
            runs.append(stack.enter_context(closing(run)))
        fit = Fit(config, runs, source, batches, heldout, state, path)
        if state:
            say(f"going on from {path}, after {fit.tokens:,} tokens")
        fit.train(chain(first, batches))
        evaluations = fit.measure()

    # Leave folders that stand alone.
    for run, figures in zip(runs, evaluations, strict=True):
        run.finish(figures)
    if len(runs) > 1:
        write_csv(config.out / "runs.csv", fit, evaluations)
    print_summary(fit, evaluations)
    return {run.config.out: run.trainer.mlsae for run in runs}


def _training_so_far(config: TrainConfig) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint in `config.out` and its state; (None, None) where it has come to
    none. Raises InputError where that would lose something, or the settings differ."""
    found = checkpoint.newest(config.out, say)
    if found:
        check_same(config, found[1]["settings"])
        return found
    models = (config.out, *(run.out for run in runs_of(config).values()))
    if checkpoint.any_written(config.out) or any(
        (folder / "model.safetensors").exists() for folder in models
    ):
        raise InputError(
            f"--resume needs an undamaged checkpoint, and {config.out} has none; choose another "
            "--out, or start over with --overwrite"
        )
    say(f"there is no checkpoint in {config.out} yet; starting at the beginning")
    return None, None


def _new_trainers(config: TrainConfig, source: Source) -> dict[str, Trainer]:
    """The trainers of all runs at their start, by the runs' names. Raises InputError where they
    do not fit in memory together."""
    device, sae = source.device, config.sae
    saes = {name: source.mlsae_config(run.sae) for name, run in runs_of(config).items()}
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    k_aux = sae.k_aux or 2 ** round(math.log2(max(source.d_in / 2, 1)))
    micro_tokens = source.micro_rows * source.seq_len
    check_memory(estimate(list(saes.values()), micro_tokens, k_aux, dtype), device)
    trainers = {}
    for name, mlsae_config in saes.items():
        torch.manual_seed(config.seed)  # so that no SAE's weights depend on what else there is
        trainers[name] = Trainer(
            MLSAE(mlsae_config, device),
            dead_tokens=sae.dead_tokens or min(10_000_000, math.ceil(config.tokens / 10)),
            k_aux=k_aux,
            aux_weight=sae.aux_weight,
            max_grad_norm=config.max_grad_norm,
            dtype=dtype,
        )
    return trainers


def _check_out(config: TrainConfig, source: Source) -> None:
    """Raise InputError where the folder cannot take the runs, or would lose something.

    What they take on the disk: two weights, the counts of latents, the report; and in each
    checkpoint, one of them being written, the weights and two moments of each."""
    bytes_needed = 0
    for run in runs_of(config).values():
        sae = source.mlsae_config(run.sae)
        bytes_needed += 4 * sae.n_latents * (2 * sae.d_in + 3 * len(sae.layers)) + 12 * 2**20
        bytes_needed += (config.keep_checkpoints + 1) * 24 * sae.n_latents * sae.d_in
    own = (*RUN_FILES, "runs.csv", *RUN_FOLDERS)
    check_out(config.out, config.overwrite, config.resume, own, bytes_needed)
    for pattern in RUN_FOLDERS:
        for folder in config.out.glob(pattern):
            check_out(folder, config.overwrite, config.resume, RUN_FILES, 0)


def _empty(folder: Path) -> None:
    """Make the folder, and remove the runs in it, if any: `_check_out` has said that it may."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings of a command line. `--preset` sets what those not given default to."""
    preset = "default"
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--preset":
            preset = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
    return tyro.cli(
        TrainConfig,
        args=arguments,
        default=PRESETS.get(preset, PRESETS["default"]),  # tyro refuses an unknown one
        description=(__doc__ or "").split("Legend:")[0],
        use_underscores=True,
        prog="python -m mlsae.train",
    )


def main() -> None:
    """The program."""
    config = parse(sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with exit_on_bad_input():
        try:
            train(config)
        except NonFiniteError as error:
            say(f"error: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            say("interrupted")
            sys.exit(130)


if __name__ == "__main__":
    main()
