"""A whole training: from its settings to the folders that it leaves.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_topk import backend_name

from .. import distributed
from ..basis import Lens
from ..config import TrainConfig, check_config, heldout_tokens, shared_folder
from ..data.sinks import DropRule
from ..data.stream import DataStream, read_shape
from ..distributed import Group, Mesh, choose_device, log_rank0
from ..errors import InputError, check_installed
from ..formats import SavedSAE
from ..hub import check_push, push_run
from ..memory import available, check_memory
from ..model import MLSAE, MLSAEConfig
from .init import mlsae_config
from .init_from import check_fits, has_bias, load_initial
from .inputs import Fingerprints, fingerprints
from .loop import TrainLoop
from .needs import check_shards, needs_of
from .optimizers import optimizers_of
from .previous import replacing_run
from .run_dir import (
    PUSHED_FILES,
    RunDir,
    check_folders,
    held,
    load_checkpoint,
    newest_checkpoint,
)
from .settings import History, check_lens, check_processes, history_of, model_dtype_of
from .start import initialize, lens_of, new_state
from .summary import log_extension, print_summary, write_csv
from .validation import Validation


def train(*configs: TrainConfig) -> dict[Path, MLSAE]:
    """Train an SAE for each of `configs`, which differ in `sae` and `out` only, side by side on the
    same residuals; leave each in its folder: the MLSAEs by folder.

    As one of several processes, started by torchrun, it trains together with them: all read the
    checkpoint to resume from, and rank 0 writes and prints.

    Raises InputError for bad input, before anything is written (in rank 0; in the other processes
    SystemExit, 2); NonFiniteError if a loss is not finite; LostContactError if another process is
    gone; SystemExit (128 + the signal's number) after SIGINT or SIGTERM in any process, with a
    checkpoint written and models that load.
    """
    with distributed.session(configs[0].timeout) as world, ExitStack() as stack:
        with world.raise_together():
            if world.rank == 0:
                stack.enter_context(held(configs))
        return _train(configs, world)


class _Start(NamedTuple):
    """What a training begins with."""

    saved: dict[str, Any] | None
    """The checkpoint that it goes on from."""
    history: History
    saes: list[MLSAEConfig]
    initial: SavedSAE | None
    """The SAE of --init_from."""
    lens: Lens | None
    """That of --lens."""
    stream: DataStream
    batch_rows: int
    heldout: Tensor | None
    """Rows (B, T) to validate on; in rank 0 only."""


def _train(configs: Sequence[TrainConfig], world: Group) -> dict[Path, MLSAE]:
    config, writes = configs[0], world.rank == 0
    with world.raise_together():
        device = _check(configs, world)
        path = newest_checkpoint(configs) if writes and config.resume else None
        inputs = fingerprints(config) if writes else {}
    path, inputs = world.broadcast_object((path, inputs))
    mesh = distributed.make_mesh(world, device, config.shard_latents, config.timeout)
    with world.raise_together():
        start = _load(configs, device, mesh, path, inputs)
    saved, stream = start.saved, start.stream
    heldout = world.broadcast_object(start.heldout)

    # What is trained. The first batch sets b_pre and the first variances, then is trained on.
    states = []
    for each, sae in zip(configs, start.saes, strict=True):
        first_tokens = start.history.first_tokens(each)
        states.append(new_state(each, sae, device, mesh, first_tokens, start.initial, start.lens))
    batches = stream.batches(start.batch_rows, saved["batches"] if saved else None)
    first: list[Tensor] = []
    if saved:
        stream.drop = DropRule.from_dict(saved.get("dropped", {}))
    else:
        first = [next(batches)]
        initialize(configs, states, stream, first[0])

    with ExitStack() as stack:
        stack.enter_context(closing(batches))
        run_dirs = []
        with world.raise_together():
            if writes and saved is None:
                # again: much may have happened meanwhile
                check_folders(configs, start.saes, stream.seq_len)
                stack.enter_context(replacing_run(shared_folder(configs)))
            for each, state in zip(configs, states, strict=True):
                own = saved["runs"][each.sae.name] if saved else None
                run_dir = RunDir(each, state, own, writes, stream.drop)
                run_dirs.append(stack.enter_context(closing(run_dir)))
        loop = TrainLoop(configs, states, run_dirs, stream, batches, heldout, start.history)
        stack.enter_context(closing(loop.checkpoints))
        if saved and path:
            loop.resume(saved, path)
            log_rank0(f"resuming from {path}, after {loop.tokens:,} tokens")
            if config.tokens > saved["settings"]["tokens"]:
                log_extension(loop)
        loop.run(chain(first, batches))
        validations = loop.validate()
        loop.checkpoints.wait()
    _finish(loop, run_dirs, validations)
    return {each.out: state.mlsae for each, state in zip(configs, states, strict=True)}


def _load(
    configs: Sequence[TrainConfig],
    device: torch.device,
    mesh: Mesh,
    path: Path | None,
    inputs: Fingerprints,
) -> _Start:
    """Read the checkpoint at `path`, if any; the transformer up to its last layer to read; the
    text. Raises InputError for what is wrong with them, or with the settings given them."""
    config, writes = configs[0], mesh.world.rank == 0
    saved = load_checkpoint(path, configs, inputs) if path else None
    if saved:
        check_processes(configs, saved.get("processes", 1), mesh.data.size)
    initial = load_initial(configs) if saved is None else None
    shape = read_shape(config.data)
    lens = lens_of(config, shape, initial)
    if saved:
        check_lens(saved, lens)
    batch_rows, micro_rows = rows_of(config, shape.seq_len, mesh)
    saes = []
    for each in configs:
        sae = mlsae_config(each, shape)
        if saved:
            bias = "b_enc" in saved["runs"][each.sae.name]["trainer"]["weights"]
        elif initial:
            check_fits(initial, each, sae)
            bias = has_bias(initial)
        else:
            bias = False
        saes.append(replace(sae, bias=bias))
    if writes:
        check_folders(configs, saes, shape.seq_len)
    history = history_of(config, inputs, saved)
    optimizers = optimizers_of(config, history.first_tokens(config))[:2]
    check_shards(saes, mesh.latents.size)
    told: dict[str, Any] = {
        "micro_tokens": micro_rows * shape.seq_len,
        "first_tokens": history.first_tokens(config),
        "processes": mesh.world.size,
    }
    needed = needs_of(configs, saes, shape, device, **told).memory.total
    data = replace(config.data, model_dtype=model_dtype_of(config, saved, device.type))
    stream = DataStream(
        data, shape, device, mesh,
        micro_rows=micro_rows, seed=config.seed, whole=False, reserved=needed,
    )  # fmt: skip
    told |= {"transformer": stream.n_bytes, "model_dtype": stream.dtype, "free": available(device)}
    needs = needs_of(configs, saes, shape, device, **told)
    check_memory(needs.memory.total, device)
    heldout = stream.heldout(heldout_tokens(config)) if writes else None
    _log_backend(stream, optimizers)
    for line in needs.lines(device.type):
        log_rank0(line)
    lens = lens and lens.to(device)
    return _Start(saved, history, saes, initial, lens, stream, batch_rows, heldout)


def _finish(loop: TrainLoop, run_dirs: Sequence[RunDir], validations: Sequence[Validation]) -> None:
    """Leave folders that stand alone, print what came out, and push what is to be pushed."""
    for run_dir, validation in zip(run_dirs, validations, strict=True):
        run_dir.finish(validation, **loop.about())
    dead = [state.dead_share() for state in loop.states]
    if loop.stream.mesh.world.rank != 0:
        return
    if len(loop.configs) > 1:
        write_csv(shared_folder(loop.configs) / "runs.csv", loop, validations, dead)
    print_summary(loop, validations, dead)
    for each in loop.configs:
        if each.push_to_hub is not None:
            log_rank0(f"pushed: {push_run(each.out, each.push_to_hub, PUSHED_FILES)}")


def _check(configs: Sequence[TrainConfig], world: Group) -> torch.device:
    """The device to train on. Raises InputError for what is wrong whatever the model is."""
    for each in configs:
        check_config(each)
    config = configs[0]
    for logger in config.log:
        check_installed(logger, f"--log {logger}")
    if config.push_to_hub is not None and world.rank == 0:
        check_push(config.push_to_hub)
    distributed.check_shards(world, config.shard_latents)
    if config.data.model_device_map and world.size > 1:
        raise InputError(
            f"--model_device_map must not be given to several processes, got "
            f"{config.data.model_device_map}: each has the transformer on its own device"
        )
    return choose_device(config.device, distributed.local_rank())


def rows_of(config: TrainConfig, seq_len: int, mesh: Mesh) -> tuple[int, int]:
    """Rows per batch, and rows whose residuals a process has at a time. Raises InputError if a
    batch, or a part of one, is shorter than a row."""
    micro_tokens = config.micro_tokens or config.batch_tokens
    smallest = min(config.batch_tokens, micro_tokens)
    if smallest < seq_len:
        raise InputError(
            f"--batch_tokens and --micro_tokens must be at least {seq_len} (a row; see --seq_len), "
            f"got {smallest}"
        )
    batch_rows = config.batch_tokens // seq_len
    own_rows = -(-batch_rows // mesh.data.size)  # of a batch, at most
    return batch_rows, min(own_rows, micro_tokens // seq_len)


def _log_backend(stream: DataStream, optimizers: Sequence[str]) -> None:
    """Say what trains on what."""
    try:
        kernels = backend_name(stream.device)
    except ValueError as error:  # an unknown SPARSE_TOPK_BACKEND
        raise InputError(str(error)) from error
    world, data, latents = stream.mesh
    layout = f", {world.size} processes: {data.size} × tokens, {latents.size} × latents"
    processes = layout if world.size > 1 else ""
    names = " and ".join(dict.fromkeys(optimizers))  # of W_enc and W_dec
    dtype = str(stream.dtype).removeprefix("torch.")
    by_units = stream.device.type == "cpu" and stream.dtype == torch.bfloat16
    chosen = by_units and stream.config.model_dtype == "auto"
    why = ", for which this CPU has matrix units (else --model_dtype float32)" if chosen else ""
    log_rank0(
        f"training on {stream.device} with the {kernels} kernels and {names}{processes}; the "
        f"transformer computes in {dtype}{why}"
    )
