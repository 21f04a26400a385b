"""Whether a training fits in memory: what it will need, what is free, and what it used.

Legend: L layers, D width of the residual stream, M latents, K active latents per token.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import InputError
from .model import MLSAEConfig

_KEY_BYTES = 512 * 2**20  # the encoder kernel's limit on keys held at a time
_AUX_BYTES = 2**30  # the limit on what AuxK holds at a time


def estimate(
    configs: Sequence[MLSAEConfig],
    micro_tokens: int,
    dtype: torch.dtype,
    shards: int = 1,
    optimizers: Sequence[str] = ("adam", "adam"),
) -> int:
    """Bytes that training takes at its peak in one process, without the transformer's weights.

    `optimizers` are the names of those of W_enc and W_dec. Weights, gradients and Adam's two
    moments take 16 B per parameter, of all SAEs that train side by side; with NorMuon, which has
    one, 12. A copy of the weights in a compute dtype other than float32 comes to that. The rest is
    held for one SAE at a time, so the largest counts. While a matrix is orthogonalized, its
    direction and its update are held in the compute dtype, and the activations are not. Of the
    L · micro_tokens vectors of a part, each has 60 B for each of its K selections (k_max with
    batchtopk, whose ranking of all of them takes no more than the rest of the step), and about 12
    float32 copies of its D elements: so many in validation, and fewer in a step. To that come the
    encoder's and AuxK's workspaces.

    With `shards` of the latents, a process holds its part of the parameters and of the scores, and
    another 40 B for each selection, which the shards make together. At the start it holds one
    weight matrix of the largest SAE as a whole, for a moment.
    """
    parameters = [2 * config.n_latents * config.d_in / shards for config in configs]
    moments = sum(1 if name == "normuon" else 2 for name in optimizers) / len(optimizers)
    per_parameter = 8 + 4 * moments + (0 if dtype == torch.float32 else dtype.itemsize)
    vectors = len(configs[0].layers) * micro_tokens
    n_latents, k = max(c.n_latents for c in configs), max(c.k_max or c.k for c in configs)
    scores = vectors * n_latents / shards
    workspace = min(_KEY_BYTES, scores / 4) + min(_AUX_BYTES, 2 * dtype.itemsize * scores)
    selection = 60 if shards == 1 else 100
    activations = vectors * (48 * configs[0].d_in + selection * k)
    # a direction and an update, each of one of the two weights
    update = dtype.itemsize * max(parameters) if "normuon" in optimizers else 0
    running = per_parameter * sum(parameters) + max(activations + workspace, update)
    starting = 8 * sum(parameters) + 4 * n_latents * configs[0].d_in
    return math.ceil(max(running, starting))


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
