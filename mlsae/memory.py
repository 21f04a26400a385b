"""Whether a training fits in memory: what it will need, part by part, what is free, what it used.

Legend: L layers, D width of the residual stream, M latents, K active latents per token, V vectors
of a part of a batch: L · micro_tokens.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import InputError
from .model import MLSAEConfig

_KEY_BYTES = 512 * 2**20  # the encoder kernel's limit on keys held at a time
_AUX_BYTES = 2**30  # the limit on what AuxK holds at a time
_TILE_BYTES, _BLOCK_BYTES, _BLOCK_ROWS = 2**22, 2**26, 256  # of scores held by a CPU's encoder:
_CACHED_BYTES = 2**24  # few, with no more weights than so many
_FIRST_VECTORS, _FIT_VECTORS = 2**16, 2**13  # of the first batch: for its center, for the scale


class Memory(NamedTuple):
    """Bytes that training takes in one process, beside the transformer's weights: the parts add up
    to the most that it holds."""

    state: int
    """Weights, gradients and moments of the optimizers; with a copy in the compute dtype."""
    residuals: int
    """The residual stream at a part of a batch."""
    activations: int
    """What a step computes on the way, its workspaces included; or what the start does, if more."""
    validation: int
    """What validation holds beyond a step."""
    checkpoint: int
    """The copy of weights and moments that a checkpoint is written from, in main memory."""
    dead: int
    """What AuxK holds if all latents are dead. Few dead ones take little of it."""

    @property
    def total(self) -> int:
        """All parts: what must be free."""
        return sum(self)

    @property
    def expected(self) -> int:
        """All but `dead`: what a run takes whose latents live."""
        return self.total - self.dead


class _Sizes(NamedTuple):
    """What the formulas depend on."""

    d_in: int
    n_latents: int
    """Of the largest SAE."""
    k: int
    """Of the largest, k_max with batchtopk."""
    k_first: int
    """Of the largest, before the first step, where batchtopk has no threshold."""
    tokens: int
    """Of a part."""
    vectors: int
    """Of a part, of all layers."""
    first: int
    """Vectors of the first batch that its center is of."""
    itemsize: int
    """Bytes of a number that the SAE computes with."""
    model_itemsize: int
    """Bytes of a number of the residual stream."""


def estimate(
    configs: Sequence[MLSAEConfig],
    micro_tokens: int,
    dtype: torch.dtype,
    shards: int = 1,
    optimizers: Sequence[str] = ("adam", "adam"),
) -> int:
    """Bytes that training takes at its peak on a GPU, without the transformer's weights: the total
    of `parts`, with its defaults."""
    return parts(configs, micro_tokens, dtype, shards, optimizers).total


def parts(
    configs: Sequence[MLSAEConfig],
    micro_tokens: int,
    dtype: torch.dtype,
    shards: int = 1,
    optimizers: Sequence[str] = ("adam", "adam"),
    *,
    device_type: str = "cuda",
    batch_tokens: int | None = None,
    model_dtype: torch.dtype = torch.float32,
) -> Memory:
    """What training takes in one process, without the transformer's weights.

    `optimizers` are the names of those of W_enc and W_dec. Weights, gradients and Adam's two
    moments take 16 B per parameter, of all SAEs that train side by side; with NorMuon, which has
    one, 12. A copy of the weights in a compute dtype other than float32 comes to that. The rest is
    held for one SAE at a time, so the largest counts. While a matrix is orthogonalized, its
    direction and its update are held in the compute dtype, and the activations are not.

    On a GPU the rest is a bound, since the step of today has run on none: of the V vectors of a
    part, each has 60 B for each of its K selections (k_max with batchtopk, whose ranking of all of
    them takes no more than the rest of the step), and about 12 float32 copies of its D elements, 7
    of which only validation holds. To that come the encoder's and AuxK's workspaces.

    With `shards` of the latents, a process holds its part of the parameters and of the scores, and
    another 40 B for each selection, which the shards make together. At the start it holds one
    weight matrix of the largest SAE as a whole, for a moment.

    On a CPU it is what torch was seen to allocate (see `_cpu`), of batches of `batch_tokens`, by
    default one part.
    """
    parameters = [2 * config.n_latents * config.d_in / shards for config in configs]
    moments = sum(1 if name == "normuon" else 2 for name in optimizers) / len(optimizers)
    per_parameter = 8 + 4 * moments + (0 if dtype == torch.float32 else dtype.itemsize)
    n_latents, k = max(c.n_latents for c in configs), max(c.k_max or c.k for c in configs)
    n_layers, d_in = len(configs[0].layers), configs[0].d_in
    vectors, state = n_layers * micro_tokens, per_parameter * sum(parameters)
    dead = min(_AUX_BYTES, 2 * dtype.itemsize * vectors * n_latents / shards)
    # a direction and an update, each of one of the two weights
    update = dtype.itemsize * max(parameters) if "normuon" in optimizers else 0
    if device_type == "cpu":
        first = min(_FIRST_VECTORS, n_layers * (batch_tokens or micro_tokens))
        itemsizes = dtype.itemsize, model_dtype.itemsize
        k_first = max(c.k for c in configs)
        sizes = _Sizes(d_in, n_latents, k, k_first, micro_tokens, vectors, first, *itemsizes)
        residuals, activations, validation = _cpu(sizes)
    else:
        copy = 4 * vectors * d_in
        selections = (60 if shards == 1 else 100) * vectors * k
        keys = min(_KEY_BYTES, vectors * n_latents / shards / 4)
        residuals, activations, validation = copy, 4 * copy + selections + keys, 7 * copy
    activations = max(activations, update - residuals - validation - dead)
    running = state + residuals + activations + validation + dead
    starting = 8 * sum(parameters) + 4 * n_latents * d_in
    activations += max(0, starting - running)
    checkpoint = (4 + 4 * moments) * sum(parameters) * shards if device_type == "cpu" else 0
    return Memory(*map(math.ceil, (state, residuals, activations, validation, checkpoint, dead)))


class _Live(NamedTuple):
    """Bytes that torch has allocated on a CPU at the peak of each phase, beside the state."""

    start: float
    step: float
    """Beside the residuals."""
    validation: float


def _cpu(s: _Sizes) -> tuple[float, float, float]:
    """Bytes of residuals; of start and step; of what validation adds.

    Freed memory stays in the process, in pieces that the next phase uses again (see
    `sparse_topk.keep_freed_memory`); only the encoder's block, which is large, finds none that
    fits. So the largest phase counts, and of the two others that block.
    """
    residuals, live = s.model_itemsize * s.vectors * s.d_in, _live(s)
    block = _encoding(s, s.vectors, s.k)
    first_block = _encoding(s, min(s.first, _FIT_VECTORS), s.k_first)
    start, step = live.start + block, residuals + live.step + first_block
    both = max(start, step)
    validation = live.validation + first_block + block
    return residuals, both - residuals, max(0, validation - both)


def _live(s: _Sizes) -> _Live:
    """What is held at the peak of each phase, in copies of the vectors (V, D):

    start        the vectors of the center and, of 2¹³ of them, two copies while it encodes; or
                 4 of a part beside them, as it is read
    step         the centered vectors and the codes, while it encodes;
                 these and the error, and 29 B per selection, in the backward
    validation   the residuals read, kept, standardized and centered, while it encodes;
                 7 with what is reconstructed
    """
    copy, codes = s.vectors * s.d_in, (s.itemsize + 8) * s.vectors * s.k
    block = _encoding(s, s.vectors, s.k)
    fitted, first = min(s.first, _FIT_VECTORS), 4 * s.first * s.d_in
    fitting = 8.0 * fitted * s.d_in + (s.itemsize + 8) * fitted * s.k_first
    fitting += _encoding(s, fitted, s.k_first)
    forward = s.itemsize * copy + codes + block
    backward = 2 * s.itemsize * copy + codes + 29 * s.vectors * s.k
    reading = 16 * s.model_itemsize * s.tokens * s.d_in  # within a block of the transformer
    return _Live(
        start=first + max(fitting, 16 * copy, 2 * first),
        step=max(forward, backward, reading),
        validation=codes + max(16 * copy + block, 28 * copy),
    )


def _encoding(s: _Sizes, vectors: int, k: int) -> float:
    """Bytes that the encoder holds on a CPU beside its result: the scores of a block of rows, and
    what finds the `k` largest (see `sparse_topk.torch_encode`)."""
    cached = s.n_latents * s.d_in * s.itemsize <= _CACHED_BYTES
    held = _TILE_BYTES if cached else _BLOCK_BYTES
    rows = min(vectors, max(_BLOCK_ROWS, held // (s.n_latents * s.itemsize)))
    group = 2 ** max(0, round(math.log2(0.6 * s.n_latents / k) / 2))
    selection = 35.0 * k
    if group > 1:  # the maxima, and the candidates with their latents, and places in several tiles
        tiles = rows * s.n_latents * s.itemsize > _TILE_BYTES
        selection += 4 * s.n_latents / group + (20 if tiles else 12) * (k + 1) * group
    return rows * (s.n_latents * max(4, s.itemsize) + selection)


def encoding(config: MLSAEConfig, vectors: int, device_type: str) -> int:
    """Bytes that encoding `vectors` in float32 holds beside its result."""
    k = config.k_max or config.k
    if device_type != "cpu":
        return min(_KEY_BYTES, vectors * config.n_latents // 4) + 60 * vectors * k
    sizes = _Sizes(config.d_in, config.n_latents, k, k, vectors, vectors, vectors, 4, 4)
    return math.ceil(_encoding(sizes, vectors, k))


def check_memory(needed: int, device: torch.device) -> None:
    """Raise InputError if `device` has fewer than `needed` bytes free."""
    free = available(device)
    if free is not None and free < needed:
        raise InputError(
            f"the run needs about {needed / 1e9:.1f} GB of {device.type} memory, and "
            f"{free / 1e9:.1f} GB is free; make it smaller with --micro_tokens (the vectors held "
            "at a time), --sae.expansion (weights and optimizer; or fewer SAEs at once) or "
            "--layers; or shard the latents with --shard_latents"
        )


def available(device: torch.device) -> int | None:
    """Bytes free on `device`; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def resident() -> int:
    """Bytes of main memory that this process holds now; what it has held at most where the system
    does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return peak(torch.device("cpu"))
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak(device: torch.device) -> int:
    """The most bytes that this process has held on `device` so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
