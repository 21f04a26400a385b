"""A whole training: from its settings to the folders that it leaves.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from sparse_topk import backend_name

from .. import distributed
from ..config import TrainConfig, check_config, learning_rate, shared_folder
from ..data.sinks import DropRule
from ..data.stream import DataStream, read_shape
from ..distributed import Group, Mesh, choose_device, log_rank0
from ..errors import InputError, check_installed
from ..formats import SavedSAE
from ..hub import check_push, push_run
from ..memory import check_memory, estimate
from ..model import MLSAE, MLSAEConfig
from .init import init_stats, mlsae_config
from .init_from import load_initial, set_weights
from .inputs import fingerprints
from .loop import TrainLoop
from .previous import replacing_run
from .run_dir import (
    PUSHED_FILES,
    RunDir,
    check_folders,
    held,
    load_checkpoint,
    newest_checkpoint,
)
from .settings import history_of
from .state import TrainState
from .summary import encode_seconds, print_summary, write_csv


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


def _train(configs: Sequence[TrainConfig], world: Group) -> dict[Path, MLSAE]:
    config, out, writes = configs[0], shared_folder(configs), world.rank == 0
    with world.raise_together():
        device = _check(configs, world)
        path = newest_checkpoint(configs) if writes and config.resume else None
        inputs = fingerprints(config) if writes else {}
    path, inputs = world.broadcast_object((path, inputs))
    mesh = distributed.make_mesh(world, device, config.shard_latents, config.timeout)

    # What is read: the training so far, the transformer up to its last layer to read, the text.
    with world.raise_together():
        saved = load_checkpoint(path, configs, inputs) if path else None
        history = history_of(config, inputs, saved)
        shape = read_shape(config.data)
        batch_rows, micro_rows = _rows(config, shape.seq_len, mesh)
        saes = [mlsae_config(each, shape) for each in configs]
        initial: list[SavedSAE | None] = [None] * len(saes)
        if saved is None:
            loaded = [load_initial(each, sae) for each, sae in zip(configs, saes, strict=True)]
            saes, initial = [sae for sae, _ in loaded], [start for _, start in loaded]
        elif config.init_from:
            saes = [
                replace(sae, bias="b_enc" in saved["runs"][each.sae.name]["trainer"]["weights"])
                for each, sae in zip(configs, saes, strict=True)
            ]
        if writes:
            check_folders(configs, saes)
        needed = _memory_needed(config, saes, micro_rows * shape.seq_len, device, mesh)
        stream = DataStream(
            config.data, shape, device, mesh,
            micro_rows=micro_rows, seed=config.seed, whole=False, reserved=needed,
        )  # fmt: skip
        check_memory(needed, device)
        heldout = stream.heldout(config.eval_tokens) if writes else None
        _log_backend(stream)
    heldout = world.broadcast_object(heldout)

    # What is trained. The first batch sets b_pre and the first variances, then is trained on.
    states = [
        _new_state(each, sae, stream, history.first_tokens(each), start)
        for each, sae, start in zip(configs, saes, initial, strict=True)
    ]
    batches = stream.batches(batch_rows, saved["batches"] if saved else None)
    first: list[Tensor] = []
    if saved:
        stream.drop = DropRule.from_dict(saved.get("dropped", {}))
    else:
        first = [next(batches)]
        _initialize(configs, states, stream, first[0])

    with ExitStack() as stack:
        stack.enter_context(closing(batches))
        run_dirs = []
        with world.raise_together():
            if writes and saved is None:
                check_folders(configs, saes)  # again: much may have happened while all was loaded
                stack.enter_context(replacing_run(out))
            for each, state in zip(configs, states, strict=True):
                own = saved["runs"][each.sae.name] if saved else None
                run_dirs.append(
                    stack.enter_context(closing(RunDir(each, state, own, writes, stream.drop)))
                )
        loop = TrainLoop(configs, states, run_dirs, stream, batches, heldout, history)
        if saved and path:
            loop.resume(saved, path)
            log_rank0(f"resuming from {path}, after {loop.tokens:,} tokens")
            if config.tokens > saved["settings"]["tokens"]:
                _log_extension(loop)
        loop.run(chain(first, batches))
        validations = loop.validate()

    # Leave folders that stand alone.
    for run_dir, validation in zip(run_dirs, validations, strict=True):
        run_dir.finish(validation, **loop.about())
    dead, encoding = [state.dead_share() for state in states], encode_seconds(loop)
    if writes:
        if len(configs) > 1:
            write_csv(out / "runs.csv", loop, validations, dead)
        print_summary(loop, validations, dead, encoding)
        for each in configs:
            if each.push_to_hub is not None:
                log_rank0(f"pushed: {push_run(each.out, each.push_to_hub, PUSHED_FILES)}")
    return {each.out: state.mlsae for each, state in zip(configs, states, strict=True)}


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


def _rows(config: TrainConfig, seq_len: int, mesh: Mesh) -> tuple[int, int]:
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


def _initialize(
    configs: Sequence[TrainConfig],
    states: Sequence[TrainState],
    stream: DataStream,
    input_ids: Tensor,
) -> None:
    """Set what is dropped, the first variances and, unless it was loaded, b_pre from the first
    batch (B, T)."""
    mlsae = states[0].mlsae
    with stream.mesh.world.raise_together():
        found = stream.resolve_drop(input_ids)
        if found:
            log_rank0(found)
        moments, center = init_stats(mlsae, stream.residuals(input_ids), stream.mesh.data)
    for config, state in zip(configs, states, strict=True):
        state.initialize(moments, None if config.init_from else center)


def _log_extension(loop: TrainLoop) -> None:
    """Say what the learning rates of an extended run are."""
    config, extension = loop.config, loop.history.extensions[-1]
    log_rank0(
        f"extending the run from {extension['from']:,} to {extension['to']:,} tokens: its peak "
        f"learning rate and warm-up stay those of {loop.history.first_tokens(config):,} tokens; "
        f"the rate falls over the last {config.decay:.0%} of {extension['to']:,}"
    )
    for each, state in zip(loop.configs, loop.states, strict=True):
        n_latents, first = state.mlsae.config.n_latents, loop.history.first_tokens(each)
        shorter = replace(each, tokens=extension["from"])
        before, now = (
            learning_rate(config, n_latents, state.tokens, first) for config in (shorter, each)
        )
        log_rank0(f"learning rate of {each.sae.name}: {before:.2e} until here, {now:.2e} from here")


def _log_backend(stream: DataStream) -> None:
    """Say what trains on what."""
    try:
        kernels = backend_name(stream.device)
    except ValueError as error:  # an unknown SPARSE_TOPK_BACKEND
        raise InputError(str(error)) from error
    world, data, latents = stream.mesh
    layout = f", {world.size} processes: {data.size} × tokens, {latents.size} × latents"
    processes = layout if world.size > 1 else ""
    log_rank0(f"training on {stream.device} with the {kernels} kernels{processes}")


def _compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def _k_aux(config: TrainConfig, d_in: int) -> int:
    return config.sae.k_aux or 2 ** round(math.log2(max(d_in / 2, 1)))


def _memory_needed(
    config: TrainConfig,
    saes: Sequence[MLSAEConfig],
    micro_tokens: int,
    device: torch.device,
    mesh: Mesh,
) -> int:
    """Bytes that training all of `saes` takes on `device`, beside the transformer. Raises
    InputError if they have fewer latents than shards."""
    shards, fewest = mesh.latents.size, min(sae.n_latents for sae in saes)
    if fewest < shards:
        raise InputError(
            f"--shard_latents must be at most {fewest} (the number of latents), got {shards}"
        )
    dtype = _compute_dtype(config, device)
    return estimate(saes, micro_tokens, _k_aux(config, saes[0].d_in), dtype, shards)


def _new_state(
    config: TrainConfig,
    sae: MLSAEConfig,
    stream: DataStream,
    first_tokens: int,
    initial: SavedSAE | None,
) -> TrainState:
    """The state of an SAE at the start of its training, from the `initial` weights if given. For
    `first_tokens` see `History`."""
    torch.manual_seed(config.seed)  # so that no SAE's weights depend on what else there is
    mlsae = MLSAE(sae, stream.device, stream.mesh.latents)
    if initial is not None:
        set_weights(mlsae, initial)
    return TrainState(
        mlsae,
        schedule=lambda tokens: learning_rate(config, sae.n_latents, tokens, first_tokens),
        dead_tokens=config.sae.dead_tokens or min(10_000_000, math.ceil(first_tokens / 10)),
        k_aux=_k_aux(config, sae.d_in),
        aux_weight=config.sae.aux_weight,
        max_grad_norm=config.max_grad_norm,
        dtype=_compute_dtype(config, stream.device),
        data=stream.mesh.data,
        name=str(config.out),
    )
