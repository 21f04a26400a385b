"""What a piece of work launches, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .rates import sync


class Launched(NamedTuple):
    """One kernel; on a CPU, one of torch's operators."""

    name: str
    calls: int
    seconds: float


def launched(work: Callable[[], object], device: torch.device) -> list[Launched]:
    """The kernels of one call of `work`, the longest first."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    sync(device)
    with profile(activities=activities) as recorded:
        work()
        sync(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    rows = [
        Launched(
            event.key,
            event.count,
            (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6,
        )
        for event in recorded.key_averages()
        if event.device_type == kind
    ]
    return sorted(rows, key=lambda row: -row.seconds)
