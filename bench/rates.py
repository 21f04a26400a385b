"""The machine's rates, FLOP/s and bytes/s, measured in the same run as the work they bound.

Legend: N tokens, D inputs, M latents.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

from .shapes import ProblemShape

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_L2_BYTES = 2**28  # more than a GPU's caches hold


def sync(device: torch.device) -> None:
    """Wait until `device` has finished all work queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The median time of `work` on an idle `device`, after one run to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        sync(device)
        started = time.perf_counter()
        work()
        sync(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def device_seconds(work: Callable[[], object], device: torch.device, seconds: float = 0.2) -> float:
    """The median time of `work` on the device alone, in about `seconds`: by events, with the caches
    overwritten before each round. On a CPU, `median_seconds`."""
    if device.type != "cuda":
        return median_seconds(work, device)
    filler = torch.empty(_L2_BYTES, dtype=torch.uint8, device=device)
    once = median_seconds(work, device, rounds=2)
    rounds = max(3, min(100, round(seconds / max(once, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        filler.zero_()
        start.record()
        work()
        end.record()
    sync(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def matmul_rate(shape: ProblemShape, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of torch's matrix product of the encoder's size, (N, D) @ (D, M), into allocated
    memory. Not cached, because a processor's clock changes with its load."""
    x = torch.randn(shape.n, shape.d, device=device, dtype=dtype)
    W = torch.randn(shape.m, shape.d, device=device, dtype=dtype)
    out = torch.empty(shape.n, shape.m, device=device, dtype=dtype)
    seconds = median_seconds(lambda: torch.mm(x, W.T, out=out), device)
    return 2 * shape.n * shape.d * shape.m / seconds


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy far larger than the caches, counting bytes read and bytes written."""
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, rounds=9)
    return 2 * source.nbytes / seconds
