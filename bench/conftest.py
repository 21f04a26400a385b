"""How a piece of work is timed, and what becomes of the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sparse_topk import keep_freed_memory

from . import results
from .costs import Cost
from .limits import copy_bandwidth, matmul_rate, sync
from .memory import peak_bytes
from .shapes import Shape

_SECONDS = {"cpu": 0.8, "cuda": 0.3}  # to spend on a row
_ROUNDS = {"cpu": (3, 20), "cuda": (10, 100)}
_CACHE_BYTES = {"cpu": 2**26, "cuda": 2**28}  # more than the caches hold

_ROWS: list[results.Row] = []
_LIMITS: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        action="store_true",
        help="Write the rows to bench/results/<device>.json, which bench.report draws.",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--save-results") and _ROWS:
        run = results.Run(results.describe_machine(), _LIMITS, _ROWS, {})
        print(f"\nresults: {results.save('suite', run)}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    keep_freed_memory()  # on a CPU; as the trainer does, and for whoever is compared
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _freed(device: torch.device) -> Iterator[None]:
    """Each row begins with the memory that no other holds."""
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


Measure = Callable[..., None]


@pytest.fixture
def measure(benchmark: BenchmarkFixture, device: torch.device) -> Measure:
    """A function that times `work(*prepare())` against the floor of `costs`, which follow one
    another, and keeps the row. `prepare` is called before each round, and is not timed; the caches
    are then overwritten. Work that does not fit in the GPU's memory is skipped."""

    def run(
        name: str,
        side: str,
        shape: Shape,
        dtype: torch.dtype,
        work: Callable[..., object],
        prepare: Callable[[], tuple[Any, ...]],
        costs: tuple[Cost, ...],
        axis: str | None = None,
    ) -> None:
        rate, bandwidth = matmul_rate(shape, dtype, device), copy_bandwidth(device)
        spoiler = torch.empty(_CACHE_BYTES[device.type], dtype=torch.uint8, device=device)

        def timed(*arguments: Any) -> None:
            work(*arguments)
            sync(device)

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            arguments = prepare()
            spoiler.fill_(0)
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
            pytest.skip(f"{side} does not fit in this GPU's memory at this shape")
        least, most = _ROUNDS[device.type]
        rounds = max(least, min(most, round(_SECONDS[device.type] / once)))
        dtype_name = str(dtype).removeprefix("torch.")
        benchmark.group = f"{name}, {shape.name}, {dtype_name}"
        benchmark.pedantic(timed, setup=setup, rounds=rounds, iterations=1)

        stats = benchmark.stats.stats  # type: ignore[union-attr]
        cost = Cost(sum(c.flop for c in costs), sum(c.bytes for c in costs))
        floor = sum(c.floor(rate, bandwidth) for c in costs)
        benchmark.extra_info |= {
            "times the floor": round(stats.median / floor, 3),
            "floor, ms": round(1e3 * floor, 3),
            "GFLOP": round(cost.flop / 1e9, 3),
            "MB": round(cost.bytes / 1e6, 3),
            "TFLOP/s": round(cost.flop / stats.median / 1e12, 3),
            "GB/s": round(cost.bytes / stats.median / 1e9, 1),
            "peak, MB": round(peak / 1e6, 1),
        }
        if axis is None:
            _LIMITS[f"matmul {shape.name} {dtype_name}, TFLOP/s"] = rate / 1e12
        _LIMITS["copy, GB/s"] = bandwidth / 1e9
        _ROWS.append(
            results.Row(
                name, side, *shape, dtype_name, stats.median, stats.min, rounds,
                cost.flop, cost.bytes, floor, peak, axis,
            )
        )  # fmt: skip

    return run
