"""Whether a run fits: what it will need, what there is, and what it needed.

Legend: L layers, D width of the residual stream, M latents, K active latents a token.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import InputError
from .model import MLSAEConfig

_SCORES_BYTES = 512 * 2**20  # at most, of the encoder's workspace


def estimate(
    configs: Sequence[MLSAEConfig],
    micro_tokens: int,
    k_aux: int,
    dtype: torch.dtype,
    shards: int = 1,
) -> int:
    """Bytes that training takes at its peak in a process, beside the transformer's weights.

    Weights, gradients and Adam's two moments: 16 B a parameter, of all SAEs that train beside one
    another. The rest is one SAE's at a time, so of the largest: with a compute dtype of b bytes,
    2·b a parameter for the cast weights and their gradients. For each of the L · micro_tokens
    vectors of a part about 12 float32 copies of its D elements (input, standardized,
    reconstruction, errors, gradients), and 60 B for each of its K + k_aux selections; and the
    scores of a block.

    With `shards` of the latents, a process has a part of the parameters and of the scores, and of
    each vector some 40 B more for each selection, to make it with the others. At the start it has,
    for a moment, one whole matrix of weights of the largest SAE.
    """
    parameters = [2 * config.n_latents * config.d_in / shards for config in configs]
    cast = 0 if dtype == torch.float32 else 2 * dtype.itemsize
    vectors = len(configs[0].layers) * micro_tokens
    n_latents, k = max(c.n_latents for c in configs), max(c.k for c in configs)
    scores = min(_SCORES_BYTES, vectors * n_latents / shards * dtype.itemsize)
    selection = 60 if shards == 1 else 100
    activations = vectors * (48 * configs[0].d_in + selection * (k + k_aux))
    running = 16 * sum(parameters) + cast * max(parameters) + activations + scores
    starting = 8 * sum(parameters) + 4 * n_latents * configs[0].d_in
    return math.ceil(max(running, starting))


def check_memory(needed: int, device: torch.device) -> None:
    """Raise InputError if `device` has fewer than `needed` bytes free."""
    free = available(device)
    if free is not None and free < needed:
        raise InputError(
            f"the run needs about {needed / 1e9:.1f} GB of {device.type} memory, and "
            f"{free / 1e9:.1f} GB is free; make it smaller with --micro_tokens (the vectors held "
            "at a time), --sae.expansion (weights and optimizer; or fewer SAEs at once), "
            "--sae.k_aux or --layers; or share the latents out with --shard_latents"
        )


def available(device: torch.device) -> int | None:
    """Bytes free on `device`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def peak(device: torch.device) -> int:
    """The most bytes that this process has had on `device` so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
