"""Train a multi-layer SAE on the residual stream of every layer of a transformer.

    python -m mlsae.train                                    # built-in model and corpus, offline
    python -m mlsae.train EleutherAI/pythia-70m-deduped monology/pile-uncopyrighted \\
        --sae.expansion 64 --sae.k 32 --tokens 1000000000 --batch_tokens 131072 --out runs/70m
    python -m mlsae.train … --out runs/70m --resume          # go on after a stop, to the same bits

It leaves a folder that stands alone: config.json, model.safetensors, latents.safetensors,
metrics.jsonl and report.html. `MLSAE.from_pretrained(FOLDER)` loads it.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

import math
import shutil
import sys
import uuid
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
import tyro
from rich.console import Console
from torch import Tensor

from sparse_topk import backend_name

from . import checkpoint
from .activations import choose_device
from .config import PRESETS, TrainConfig, check_config, check_same, settings_of
from .errors import InputError, exit_on_bad_input
from .files import check_out, write_file
from .fit import Fit, save_model, say
from .logs import MetricsLog, check_loggers
from .measure import Evaluation
from .memory import check_memory, estimate, peak
from .model import MLSAE, MLSAEConfig
from .report import write_report
from .source import Source
from .trainer import NonFiniteError, Trainer

RUN_FILES = (
    "config.json",
    "model.safetensors",
    "latents.safetensors",
    "metrics.jsonl",
    "report.html",
    "evaluation.csv",
    "evaluation.json",
    "checkpoints",
    "tensorboard",
    "wandb",
)


def train(config: TrainConfig) -> MLSAE:
    """Train as `config` says; leave the run in `config.out`.

    Raises InputError for bad input, before anything is written; NonFiniteError where a loss is
    not finite; SystemExit (128 + the signal's number) after SIGINT or SIGTERM, with a checkpoint
    written and a model that loads.
    """
    check_config(config)
    check_loggers(config.log)
    torch.manual_seed(config.seed)
    device = choose_device(config.device)

    # What is read: the run so far, the transformer, the layers of it, the text.
    path, state = _run_so_far(config) if config.resume else (None, None)
    source = Source(config, device)
    check_out(config.out, config.overwrite, config.resume, RUN_FILES, _run_bytes(source, config))
    heldout = source.heldout()

    try:
        say(f"training on {device} with the {backend_name(device)} kernels")
    except ValueError as error:  # an unknown SPARSE_TOPK_BACKEND
        raise InputError(str(error)) from error

    # What is trained. The first batch sets b_pre and the first variances, then is trained on.
    trainer = _new_trainer(config, source)
    batches = source.batches(state["batches"] if state else None)
    if state:
        trainer.load_state_dict(state["trainer"])
        say(f"going on from {path}, after {trainer.tokens:,} tokens")
        first: list[Tensor] = []
    else:
        first = [next(batches)]
        trainer.initialize(source.residuals(first[0]))
        _empty(config.out)

    # Train, and measure on held-out rows.
    run_id = state["run_id"] if state else uuid.uuid4().hex
    position = state["metrics_position"] if state else 0
    with (
        closing(batches),
        closing(MetricsLog(config.out, config.log, settings_of(config), run_id, position)) as log,
    ):
        fit = Fit(trainer, source, batches, heldout, log, run_id, state, path)
        fit.run(chain(first, batches))
        figures = fit.measure()

    # Leave a folder that stands alone.
    save_model(config, trainer)
    latents = {
        "totals": figures.totals.float().contiguous().cpu(),
        "counts": figures.counts.long().contiguous().cpu(),
    }
    write_file(config.out / "latents.safetensors", safetensors.torch.save(latents))
    write_report(config.out)
    _print_summary(config.out, fit, figures)
    return trainer.mlsae


def _run_so_far(config: TrainConfig) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint of the run in `config.out` and its state; (None, None) where it has
    come to none. Raises InputError where that would lose something, or the settings differ."""
    found = checkpoint.newest(config.out, say)
    if found:
        check_same(config, found[1]["settings"])
        return found
    if checkpoint.any_written(config.out) or (config.out / "model.safetensors").exists():
        raise InputError(
            f"--resume needs an undamaged checkpoint, and {config.out} has none; choose another "
            "--out, or start over with --overwrite"
        )
    say(f"there is no checkpoint in {config.out} yet; starting at the beginning")
    return None, None


def _new_trainer(config: TrainConfig, source: Source) -> Trainer:
    """The trainer of a run at its start. Raises InputError where it does not fit in memory."""
    d_in, device = source.mlsae_config.d_in, source.device
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    k_aux = config.sae.k_aux or 2 ** round(math.log2(max(d_in / 2, 1)))
    micro_tokens = source.micro_rows * source.seq_len
    check_memory(estimate(source.mlsae_config, micro_tokens, k_aux, dtype), device)
    return Trainer(
        MLSAE(source.mlsae_config, device),
        dead_tokens=config.sae.dead_tokens or min(10_000_000, math.ceil(config.tokens / 10)),
        k_aux=k_aux,
        aux_weight=config.sae.aux_weight,
        max_grad_norm=config.max_grad_norm,
        dtype=dtype,
    )


def _run_bytes(source: Source, config: TrainConfig) -> int:
    """What a run takes on the disk: two weights, the counts of latents, the report; and in each
    checkpoint, one of them being written, the weights and two moments of each."""
    sae = source.mlsae_config
    run = 4 * sae.n_latents * (2 * sae.d_in + 3 * len(sae.layers)) + 12 * 2**20
    return run + (config.keep_checkpoints + 1) * 24 * sae.n_latents * sae.d_in


def _empty(folder: Path) -> None:
    """Make the folder, and remove the run in it, if any: `check_out` has said that it may."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _print_summary(out: Path, fit: Fit, figures: Evaluation) -> None:
    trainer, console = fit.trainer, Console(highlight=False)
    config: MLSAEConfig = trainer.mlsae.config
    console.print(figures.table(config.layers))
    stages = fit.trainer.watch.seconds()
    total = sum(stages.values())
    stages["encode"] = min(stages.pop("SAE"), fit.encode_seconds())
    stages["rest of the SAE"] = total - sum(stages.values())
    shares = sorted(stages.items(), key=lambda stage: -stage[1])
    console.print(
        f"trained on {trainer.tokens:,} tokens in {fit.seconds:.0f} s "
        f"({trainer.tokens / fit.seconds:,.0f} tokens/s); "
        f"{trainer.dead().double().mean():.1%} of {config.n_latents:,} latents dead",
        "where the time went: "
        + ", ".join(f"{name} {spent / total:.1%}" for name, spent in shares)
        + f"; tokenising, beside it, {fit.batches.seconds:.1f} s",
        f"peak memory: {peak(fit.source.device) / 1e9:.2f} GB",
        f"run: {out}",
        f"report: {out / 'report.html'}",
        sep="\n",
        soft_wrap=True,
    )


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
