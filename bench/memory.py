"""How much memory a piece of work takes while it runs, beyond what was allocated before. A file of
its own, because `peer_steps` needs it where pytest is not installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `work` had allocated at once, including its results. Torch's allocator
    counts them on a GPU, torch's profiler on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    allocated = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
