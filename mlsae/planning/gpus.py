"""GPUs: their published peaks, and what one of them was measured to reach.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sparse_topk import costs
from sparse_topk.costs import Cost, TrainShape

from ..errors import InputError


class GPU(NamedTuple):
    """The peaks that the maker publishes, without sparsity."""

    name: str
    memory: float
    """Bytes."""
    half: float
    """FLOP/s of products in bfloat16, with sums in float32."""
    single: float
    """FLOP/s in float32, without TF32."""
    bandwidth: float
    """Bytes/s of memory."""


PEAKS = {
    gpu.name: gpu
    for gpu in (
        GPU("h100", 80e9, 989e12, 67e12, 3.35e12),  # SXM
        GPU("h100-pcie", 80e9, 756e12, 51e12, 2.0e12),
        GPU("h200", 141e9, 989e12, 67e12, 4.8e12),
        GPU("b200", 180e9, 2250e12, 75e12, 8.0e12),
        GPU("a100-40gb", 40e9, 312e12, 19.5e12, 1.555e12),
        GPU("a100-80gb", 80e9, 312e12, 19.5e12, 2.039e12),
        GPU("l40s", 48e9, 362e12, 91.6e12, 0.864e12),
        GPU("l4", 24e9, 121e12, 30.3e12, 0.3e12),
        GPU("rtx-a6000", 48e9, 155e12, 38.7e12, 0.768e12),
        GPU("rtx3090", 24e9, 71e12, 35.6e12, 0.936e12),
        GPU("rtx4090", 24e9, 165e12, 82.6e12, 1.008e12),
    )
}
"""By name. From the makers' data sheets; not measured here."""


class Rates(NamedTuple):
    """What a GPU reaches, rather than its peaks."""

    flop_per_second: float
    """Of products in bfloat16."""
    bytes_per_second: float
    """Of a copy, bytes read and written together."""


MEASURED = "h100"
H100 = Rates(750e12, 3.0e12)
"""Each measured alone on one H100 80GB SXM, torch 2.11, 2026-11-26."""

STEPS = (
    (TrainShape("pythia-70m", 6, 16384, 512, 32768, 32), 20.3e-3),
    (TrainShape("pythia-1.4b", 24, 1024, 2048, 131072, 32), 38.6e-3),
)
"""Training steps with Adam and their seconds, on that H100, at commit ec756b1 (docs/speed.md). The
step has been written anew since, and not been timed again."""
TRANSFORMER_SHARE = 0.41
"""Of the peak in float32 that the transformer's forward reached there: 6 M tokens of Pythia-70m's
sizes, in rows of 2,048, in 27.4 % of 40 s; 50 MFLOP per token (docs/speed.md)."""
HOST_SECONDS = 4.8e-3
"""Of a part of a batch, at least: what the host took to launch the smallest step timed there."""
TEXT_RATE, TEXT_CORES = 0.92e6, 16
"""Tokens/s that text was tokenized at, beside the training, and on how many cores."""
SINGLE_FACTOR = 3.93 / 0.737
"""How much longer an encode takes in float32 than in bfloat16: N 8192, D 512, M 32768, K 32."""
DISK_RATE = 0.5e9
"""Bytes/s of a checkpoint there: 400 MB in 0.8 s."""


def gpu_named(name: str) -> GPU:
    """The GPU of that name. Raises InputError if it is none of `PEAKS`."""
    if name.lower() not in PEAKS:
        raise InputError(
            f"--gpu must be one of {', '.join(PEAKS)}, got {name!r}; or leave it out to measure "
            "the device that is here"
        )
    return PEAKS[name.lower()]


def rates_of(gpu: GPU, itemsize: int = 2) -> Rates:
    """What `gpu` reaches, if it reaches the same share of its peaks as the H100; with products of
    numbers of `itemsize` bytes."""
    h100 = PEAKS[MEASURED]
    slower = SINGLE_FACTOR if itemsize == 4 else 1
    return Rates(
        H100.flop_per_second * gpu.half / h100.half / slower,
        H100.bytes_per_second * gpu.bandwidth / h100.bandwidth,
    )


def roofline(parts: tuple[Cost, ...], rates: Rates) -> float:
    """The least seconds of pieces of work, one after the other."""
    return sum(part.roofline(*rates) for part in parts)


def efficiency(d_in: int) -> float:
    """Which share of the roofline's speed a training step reaches: that of the steps timed, and
    between them, by the logarithm of the width of the residual stream, what lies between."""
    low, high = (
        (math.log(shape.d), roofline(costs.training_step(shape, 2), H100) / seconds)
        for shape, seconds in STEPS
    )
    at = (math.log(d_in) - low[0]) / (high[0] - low[0])
    return low[1] + (high[1] - low[1]) * min(1.0, max(0.0, at))
