"""How a benchmark is timed, and where its timings go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sparse_topk import keep_freed_memory
from sparse_topk.costs import Cost

from . import results
from .memory import peak_bytes
from .rates import copy_bandwidth, matmul_rate, sync
from .shapes import ProblemShape

_SECONDS = {"cpu": 0.8, "cuda": 0.3}  # to spend on one timing
_ROUNDS = {"cpu": (3, 20), "cuda": (10, 100)}  # least and most
_CACHE_BYTES = {"cpu": 2**26, "cuda": 2**28}  # more than the caches hold

_ROWS: list[results.Timing] = []
_RATES: dict[str, float] = {}

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        action="store_true",
        help="Write the timings to bench/results/<device>.json, which bench.report draws.",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--save-results") and _ROWS:
        run = results.BenchRun(results.describe_machine(), _RATES, _ROWS, {})
        print(f"\nresults: {results.save('suite', run)}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    keep_freed_memory()  # for tensors on a CPU, as the trainer does; both impls profit
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _free_memory(device: torch.device) -> Iterator[None]:
    """Each benchmark starts with the memory of the one before it freed."""
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def measure(benchmark: BenchmarkFixture, device: torch.device) -> Measure:
    """A function that times `work(*prepare())` against the summed rooflines of `costs`, its parts
    in sequence, and keeps the timing. Before each round it calls `prepare` and overwrites the
    caches; neither is timed. It skips work that does not fit in the GPU's memory."""

    def run(
        name: str,
        impl: str,
        shape: ProblemShape,
        dtype: torch.dtype,
        work: Callable[..., object],
        prepare: Callable[[], tuple[Any, ...]],
        costs: tuple[Cost, ...],
        axis: str | None = None,
    ) -> None:
        rate, bandwidth = matmul_rate(shape, dtype, device), copy_bandwidth(device)
        cache_filler = torch.empty(_CACHE_BYTES[device.type], dtype=torch.uint8, device=device)

        def timed(*arguments: Any) -> None:
            work(*arguments)
            sync(device)

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            arguments = prepare()
            cache_filler.fill_(0)
            sync(device)
            return arguments, {}

        try:
            timed(*prepare())  # compiles and allocates
            arguments = prepare()
            peak = peak_bytes(lambda: work(*arguments), device)
            arguments = prepare()
            started = time.perf_counter()
            timed(*arguments)
            once = time.perf_counter() - started
        except torch.OutOfMemoryError:
            pytest.skip(f"{impl} does not fit in this GPU's memory at this shape")
        least, most = _ROUNDS[device.type]
        rounds = max(least, min(most, round(_SECONDS[device.type] / once)))
        dtype_name = str(dtype).removeprefix("torch.")
        benchmark.group = f"{name}, {shape.name}, {dtype_name}"
        benchmark.pedantic(timed, setup=setup, rounds=rounds, iterations=1)

        stats = benchmark.stats.stats  # type: ignore[union-attr]
        flop, n_bytes = sum(c.flop for c in costs), sum(c.bytes for c in costs)
        roofline = sum(c.roofline(rate, bandwidth) for c in costs)
        timing = results.Timing(
            name, impl, *shape, dtype_name, stats.median, stats.min, rounds,
            flop, n_bytes, roofline, peak, axis,
        )  # fmt: skip
        benchmark.extra_info |= _derived(timing)
        _ROWS.append(timing)
        _RATES["copy, GB/s"] = bandwidth / 1e9
        if axis is None:
            _RATES[f"matmul {shape.name} {dtype_name}, TFLOP/s"] = rate / 1e12

    return run


def _derived(timing: results.Timing) -> dict[str, float]:
    """What pytest-benchmark shows beside the times."""
    return {
        "times the roofline": round(timing.seconds / timing.roofline, 3),
        "roofline, ms": round(1e3 * timing.roofline, 3),
        "GFLOP": round(timing.flop / 1e9, 3),
        "MB": round(timing.bytes / 1e6, 3),
        "TFLOP/s": round(timing.flop / timing.seconds / 1e12, 3),
        "GB/s": round(timing.bytes / timing.seconds / 1e9, 1),
        "peak, MB": round(timing.peak_bytes / 1e6, 1),
    }
