"""What `bench.tune` does: compile the tiles of `tune_table`, or time them. It is apart from the
program, which must first say whether kernels are interpreted."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import torch

from .compiled_build import SHARED_LIMIT, Build, Compiled, compile_for
from .rates import device_seconds
from .record import Record
from .shapes import ProblemShape
from .tune_inputs import Work
from .tune_table import TUNABLES, Tunable

_TINY = ProblemShape("tiny", 4, 256, 512, 8)  # for Triton's interpreter
_SECONDS = 0.1  # to spend on one tile
_PROCESSES = 6  # that compile at a time; each takes up to 2 GB of the GPU's memory


class Case(NamedTuple):
    """A kernel at one of its shapes."""

    tunable: Tunable
    shape: ProblemShape

    def tiles(self) -> list[Any]:
        """The candidates, plain or named tuples."""
        return self.tunable.candidates(self.shape)


def cases(kernels: Sequence[str], kind: str) -> list[Case]:
    """Every shape of the kernels named, or of all. On a CPU there is one shape, tiny."""
    chosen = [t for t in TUNABLES if not kernels or t.kernel in kernels]
    if kind == "cpu":
        return [Case(tunable, _TINY) for tunable in chosen]
    return [Case(tunable, shape) for tunable in chosen for shape in tunable.shapes]


@contextmanager
def tiled(tunable: Tunable, tile: Any) -> Iterator[None]:
    """The kernel has this tile here."""
    with mock.patch.object(tunable.module, tunable.function, return_value=tile):
        yield


def shipped_tile(tunable: Tunable, work: Work) -> Any:
    """The tile that `work` launches its kernel with."""
    choose, returned = getattr(tunable.module, tunable.function), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        returned.append(choose(*args, **kwargs))
        return returned[-1]

    with mock.patch.object(tunable.module, tunable.function, watched):
        work()
    return returned[-1]


# Compiling, without a GPU.


class Job(NamedTuple):
    """One tile, to be compiled for one chip; the shipped one if `shipped`."""

    kernel: str
    shape: str
    tile: str
    chip: int
    build: Build
    shipped: bool


@cache
def jobs(kernels: tuple[str, ...], chips: tuple[int, ...]) -> list[Job]:
    """All that `--dry` compiles; what two shapes have in common once."""
    found: dict[str, Job] = {}
    for tunable, shape in cases(kernels, "cuda"):
        for chip in chips:
            add = [(None, b) for b in tunable.builds(shape, chip)]
            for tile in tunable.candidates(shape):
                with tiled(tunable, tile):
                    add += [(tile, b) for b in tunable.builds(shape, chip)]
            for tile, b in add:
                options = b.divisible, b.num_warps, b.num_stages
                same = f"{b.kernel.fn.__name__} {chip} {b.signature} {b.constexprs} {options}"
                told = "shipped" if tile is None else _told(tile)
                found.setdefault(same, Job(b.name, shape.name, told, chip, b, tile is None))
    return list(found.values())


def compile_jobs(kernels: tuple[str, ...], chips: tuple[int, ...]) -> int:
    """Print registers, spills and shared memory of each, as it is compiled. Returns how many
    neither compile nor fit the chip."""
    line = "{:<44} {:<30} {:>6} {:>5} {:>6} {:>7}  {}"
    print(line.format("kernel", "tile", "chip", "regs", "spills", "shared", ""))
    all_jobs, misfits = jobs(kernels, chips), 0
    tasks = [(kernels, chips, i) for i in range(len(all_jobs))]
    with ProcessPoolExecutor() as pool:
        for job, made in zip(all_jobs, pool.map(_compile, tasks), strict=True):
            chip = f"sm_{job.chip}"
            if isinstance(made, str):
                print(line.format(job.kernel, job.tile, chip, "", "", "", made), flush=True)
                misfits += 1
                continue
            too_large = made.shared > SHARED_LIMIT[job.chip]
            misfits += too_large
            told = "too much shared memory" if too_large else ""
            sizes = made.registers, made.spills, made.shared
            print(line.format(job.kernel, job.tile, chip, *sizes, told), flush=True)
    return misfits


def _compile(task: tuple[tuple[str, ...], tuple[int, ...], int]) -> Compiled | str:
    kernels, chips, i = task
    job = jobs(kernels, chips)[i]
    try:
        return compile_for(job.build, job.chip)
    except Exception as error:  # the compiler's own kinds: a tile that it refuses is a result
        return f"does not compile: {_first_line(error)}"


# Timing.


def compile_on_gpu(kernels: Sequence[str]) -> None:
    """Run every tile once, in several processes, so that Triton's cache has all of them."""
    workers = min(_PROCESSES, os.cpu_count() or 1)
    n_cases = len(cases(kernels, "cuda"))
    tasks = [(tuple(kernels), i, j, workers) for i in range(n_cases) for j in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_run_some, tasks))


def _run_some(task: tuple[tuple[str, ...], int, int, int]) -> None:
    """Run every `step`-th tile of a case once, from the `first` on; the shipped one is first. What
    fails will fail again where it is timed, and be said there."""
    kernels, i, first, step = task
    tunable, shape = case = cases(kernels, "cuda")[i]
    tiles = [None, *case.tiles()][first::step]
    if tiles:
        with suppress(torch.OutOfMemoryError):
            work = tunable.prepare(shape, torch.device("cuda"))
            for tile in tiles:
                with suppress(Exception), nullcontext() if tile is None else tiled(tunable, tile):
                    work()
                    torch.cuda.synchronize()
            del work
        torch.cuda.empty_cache()


def time_cases(record: Record, kernels: Sequence[str], device: torch.device) -> None:
    """Time every case, each in its share of the time that is left."""
    todo = cases(kernels, device.type)
    for i, case in enumerate(todo):
        share = max(0.0, record.time_left()) / (len(todo) - i)
        try:
            _time_case(record, case, device, record.time_left() - share)
        except torch.OutOfMemoryError:
            print(f"left out, out of memory: {case.tunable.kernel}, {case.shape.name}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _time_case(record: Record, case: Case, device: torch.device, until: float) -> None:
    """Time the shipped tile, and then candidates as long as more than `until` seconds are left of
    all."""
    tunable, shape = case
    work = tunable.prepare(shape, device)
    shipped = shipped_tile(tunable, work)
    base = device_seconds(work, device, _SECONDS)
    row = {"kernel": tunable.kernel, "shape": shape.name, "N": shape.n}
    record.add("tiles", {**row, "tile": _told(shipped), "µs": 1e6 * base, "× shipped": 1.0})
    best, fastest, tried = shipped, base, 0
    candidates = [tile for tile in case.tiles() if _told(tile) != _told(shipped)]
    for tile in candidates:
        if record.time_left() <= until:
            break
        tried += 1
        told = {**row, "tile": _told(tile)}
        try:
            with tiled(tunable, tile):
                seconds = device_seconds(work, device, _SECONDS)
        except Exception as error:  # the compiler's and the launcher's own kinds
            record.add(
                "tiles", {**told, "µs": None, "× shipped": None, "failed": _first_line(error)}
            )
            continue
        record.add("tiles", {**told, "µs": 1e6 * seconds, "× shipped": seconds / base})
        if seconds < fastest:
            best, fastest = tile, seconds
    summary = {"shipped": _told(shipped), "µs": 1e6 * base, "best": _told(best)}
    summary |= {"best, µs": 1e6 * fastest, "gain": f"{base / fastest - 1:.1%}"}
    record.add("best", {**row, **summary, "tried": f"{tried} of {len(candidates)}"})


def _told(tile: Any) -> str:
    """A tile in a table: its numbers, whatever they are called."""
    return str(tuple(tile)) if isinstance(tile, tuple) else str(tile)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:100]
