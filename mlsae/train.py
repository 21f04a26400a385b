"""Train a multi-layer SAE on the residual stream of every layer of a transformer.

    python -m mlsae.train                                    # built-in model and corpus, offline
    python -m mlsae.train EleutherAI/pythia-70m-deduped monology/pile-uncopyrighted \\
        --sae.expansion 64 --sae.k 32 --tokens 1000000000 --batch_tokens 131072 --out runs/70m
    python -m mlsae.train … --out runs/70m --resume          # go on after a stop, to the same bits
    python -m mlsae.train --sae.k 16 32 64 --sae.expansion 8 16 --out runs/grid      # six at once
    torchrun --nproc_per_node 8 -m mlsae.train …             # the same run on eight GPUs

It leaves a folder that stands alone: config.json, model.safetensors, latents.safetensors,
metrics.jsonl, report.html and README.md, a model card. `MLSAE.from_pretrained(FOLDER)` loads it.
Several SAEs train side by side on the same residuals, so that the transformer runs once for all of
them; each ends as it would alone, in a folder of its own in OUT.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path

import torch
import transformers
import tyro
from torch import Tensor

from sparse_topk import backend_name, keep_freed_memory

from . import distributed
from .config import PRESETS, TrainConfig, check_config, runs_of
from .data.stream import DataStream, Shape, micro_rows, read_shape
from .distributed import Group, LostContactError, Mesh, choose_device, log_rank0
from .errors import InputError, check_installed, exit_on_bad_input
from .hub import check_push, push_run
from .memory import check_memory, estimate
from .model import MLSAE, MLSAEConfig
from .training.init import survey
from .training.loop import Fit
from .training.run_dir import PUSHED_FILES, check_folders, empty, load_checkpoint, newest_checkpoint
from .training.sae_run import Run
from .training.state import NonFiniteError, Trainer
from .training.summary import print_summary, write_csv


def train(config: TrainConfig) -> dict[Path, MLSAE]:
    """Train as `config` says; leave each run in its folder: the MLSAEs by folder.

    As one of several processes, started by torchrun, it trains together with them: all read the
    checkpoint to go on from, and the first one writes and prints.

    Raises InputError for bad input, before anything is written (in the first process; in the
    others SystemExit, 2); NonFiniteError where a loss is not finite; LostContactError where
    another process is gone; SystemExit (128 + the signal's number) after SIGINT or SIGTERM in any
    process, with a checkpoint written and models that load.
    """
    with distributed.session(config.timeout) as world:
        return _train(config, world)


def _train(config: TrainConfig, world: Group) -> dict[Path, MLSAE]:
    is_first = world.rank == 0
    with world.raise_together():
        device = _check(config, world)
        path = newest_checkpoint(config) if is_first and config.resume else None
    path = world.broadcast_object(path)
    mesh = distributed.make_mesh(world, device, config.shard_latents, config.timeout)

    # What is read: the training so far, the transformer up to its last token_mask layer, the text.
    with world.raise_together():
        state = load_checkpoint(path, config) if path else None
        shape = read_shape(config)
        saes = {name: shape.mlsae_config(run) for name, run in runs_of(config).items()}
        if is_first:
            check_folders(config, saes.values())
        needed = _memory_needed(config, shape, saes.values(), device, mesh)
        stream = DataStream(config, device, mesh, whole=False, reserved=needed)
        check_memory(needed, device)
        heldout = stream.heldout() if is_first else None
        _say_where(stream)
    heldout = world.broadcast_object(heldout)

    # What is trained: an SAE for each run. The first batch sets b_pre and the first variances,
    # then is trained on.
    trainers = {name: _new_trainer(config, sae, stream) for name, sae in saes.items()}
    batches = stream.batches(state["batches"] if state else None)
    first = [] if state else [next(batches)]
    for input_ids in first:
        _begin(trainers.values(), stream, input_ids)
        if is_first:
            empty(config.out)

    # Train, and measure on held-out rows.
    with ExitStack() as stack:
        stack.enter_context(closing(batches))
        runs = []
        for name, settings in runs_of(config).items():
            if is_first:
                settings.out.mkdir(parents=True, exist_ok=True)
            saved = state["runs"][name] if state else None
            run = Run(name, settings, trainers[name], saved, writes=is_first)
            runs.append(stack.enter_context(closing(run)))
        fit = Fit(config, runs, stream, batches, heldout, state, path)
        if state:
            log_rank0(f"going on from {path}, after {fit.tokens:,} tokens")
        fit.train(chain(first, batches))
        evaluations = fit.measure()

    # Leave folders that stand alone.
    for run, figures in zip(runs, evaluations, strict=True):
        run.finish(figures)
    encoding = fit.encode_seconds()
    if is_first:
        if len(runs) > 1:
            write_csv(config.out / "runs.csv", fit, evaluations)
        print_summary(fit, evaluations, encoding)
        _push(config, runs)
    return {run.config.out: run.trainer.mlsae for run in runs}


def _check(config: TrainConfig, world: Group) -> torch.device:
    """The device to train on. Raises InputError for what needs no model to be known as wrong."""
    check_config(config)
    for logger in config.log:
        check_installed(logger, f"--log {logger}")
    if config.push_to_hub is not None and world.rank == 0:
        check_push(config.push_to_hub)
    distributed.check_shards(world, config.shard_latents)
    if config.model_device_map and world.size > 1:
        raise InputError(
            f"--model_device_map must not be given to several processes, got "
            f"{config.model_device_map}: each has the transformer on its own device"
        )
    return choose_device(config.device, distributed.local_rank())


def _push(config: TrainConfig, runs: Sequence[Run]) -> None:
    """Push the runs to the hub, where that is asked for."""
    if config.push_to_hub is None:
        return
    for run in runs:
        repo_id = "-".join([config.push_to_hub, *([run.name] if len(runs) > 1 else [])])
        log_rank0(f"pushed: {push_run(run.config.out, repo_id, PUSHED_FILES)}")


def _begin(trainers: Iterable[Trainer], stream: DataStream, input_ids: Tensor) -> None:
    """Set b_pre and the first variances from the first batch (B, T)."""
    mlsae = next(iter(trainers)).mlsae
    with stream.mesh.world.raise_together():
        moments, center = survey(mlsae, stream.residuals(input_ids), stream.mesh.data)
    for trainer in trainers:
        trainer.initialize(moments, center)


def _say_where(stream: DataStream) -> None:
    """Say what trains on what."""
    try:
        kernels = backend_name(stream.device)
    except ValueError as error:  # an unknown SPARSE_TOPK_BACKEND
        raise InputError(str(error)) from error
    world, data, latents = stream.mesh
    parts = f", {world.size} processes: {data.size} × tokens, {latents.size} × latents"
    processes = parts if world.size > 1 else ""
    log_rank0(f"training on {stream.device} with the {kernels} kernels{processes}")


def _compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def _k_aux(config: TrainConfig, d_in: int) -> int:
    return config.sae.k_aux or 2 ** round(math.log2(max(d_in / 2, 1)))


def _memory_needed(
    config: TrainConfig,
    shape: Shape,
    saes: Iterable[MLSAEConfig],
    device: torch.device,
    mesh: Mesh,
) -> int:
    """Bytes that training all of `saes` takes on `device`, beside the transformer. Raises
    InputError where they have fewer latents than shards."""
    shards, configs = mesh.latents.size, list(saes)
    fewest = min(sae.n_latents for sae in configs)
    if fewest < shards:
        raise InputError(
            f"--shard_latents must be at most {fewest} (the number of latents), got {shards}"
        )
    return estimate(
        configs,
        micro_rows(config, shape.seq_len, mesh) * shape.seq_len,
        _k_aux(config, shape.d_in),
        _compute_dtype(config, device),
        shards,
    )


def _new_trainer(config: TrainConfig, sae: MLSAEConfig, stream: DataStream) -> Trainer:
    """The trainer of a run at its start."""
    torch.manual_seed(config.seed)  # so that no SAE's weights depend on what else there is
    return Trainer(
        MLSAE(sae, stream.device, stream.mesh.latents),
        dead_tokens=config.sae.dead_tokens or min(10_000_000, math.ceil(config.tokens / 10)),
        k_aux=_k_aux(config, sae.d_in),
        aux_weight=config.sae.aux_weight,
        max_grad_norm=config.max_grad_norm,
        dtype=_compute_dtype(config, stream.device),
        data=stream.mesh.data,
    )


def parse(
    arguments: Sequence[str],
    presets: Mapping[str, TrainConfig] = PRESETS,
    description: str = (__doc__ or "").split("Legend:")[0],
    prog: str = "python -m mlsae.train",
) -> TrainConfig:
    """The settings of a command line. `--preset` sets what those not given default to."""
    preset = "default"
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--preset":
            preset = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
    return tyro.cli(
        TrainConfig,
        args=arguments,
        default=presets.get(preset, presets["default"]),  # tyro refuses an unknown one
        description=description,
        use_underscores=True,
        prog=prog,
        console_outputs=distributed.is_rank0(),
    )


def main() -> None:
    """The program."""
    config = parse(sys.argv[1:])
    keep_freed_memory()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with exit_on_bad_input():
        try:
            train(config)
        except NonFiniteError as error:
            log_rank0(f"error: {error}")
            sys.exit(1)
        except LostContactError as error:
            # The launcher ends this process meanwhile, and names the one that failed first.
            time.sleep(5)
            print(f"error: {error}; go on with the same command and --resume", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            log_rank0("interrupted")
            sys.exit(130)


if __name__ == "__main__":
    main()
