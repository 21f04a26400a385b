"""Where the time of a run goes, stage by stage."""

from __future__ import annotations

import time

import torch

_EVENTS_AT_ONCE = 512  # on a GPU: more than between two log lines, and few enough to hold


class StageTimer:
    """Seconds spent in each stage. `lap(stage)` ends a stage, which is given the time since the
    last lap.

    On a GPU, laps are events in its stream, so that nothing waits for them; the GPU's idle time
    counts for the stage that let it wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._laps: list[tuple[str, torch.cuda.Event]] = []
        self._last = time.perf_counter()
        if self._cuda:
            self._last_event = self._event()

    def lap(self, stage: str) -> None:
        """End a stage."""
        if self._cuda:
            self._laps.append((stage, self._event()))
            if len(self._laps) >= _EVENTS_AT_ONCE:
                self._collect()
            return
        now = time.perf_counter()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage so far."""
        self._collect()
        return dict(self._seconds)

    def add(self, seconds: dict[str, float]) -> None:
        """Add the stages of an earlier part of the run, and start the next lap."""
        for stage, time_spent in seconds.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time_spent
        self._last = time.perf_counter()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self) -> None:
        for stage, event in self._laps:
            event.synchronize()
            milliseconds = self._last_event.elapsed_time(event)
            self._seconds[stage] = self._seconds.get(stage, 0.0) + milliseconds / 1e3
            self._last_event = event
        self._laps.clear()


class Every:
    """Whether another `interval` of tokens has been passed since the last call."""

    def __init__(self, interval: float, tokens: int) -> None:
        self._interval, self._count = interval, tokens // interval

    def passed(self, tokens: int) -> bool:
        """Whether `tokens` lies in another interval than at the last call."""
        before, self._count = self._count, tokens // self._interval
        return self._count > before
