"""Time a training step of an MLSAE and the encodes of an SAE, beside the bare matrix product.

    python -m bench.step                    on a GPU, in about 90 seconds
    python -m bench.step --device cpu       tiny sizes, to see that the program runs

Prints each row when it is known, and all tables at the end; writes
bench/results/<device>-step.json. "Launches" are kernels, and torch's operators on a CPU. "× mm" is
by one bf16 torch.mm of the encoder's size, timed in the same process. A step is timed by the clock,
from an idle device to an idle device; the rest by events, with the caches overwritten.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_topk import keep_freed_memory, ops

from .memory import peak_bytes
from .options import chosen_device, options
from .profiling import Launched, launched
from .rates import device_seconds, median_seconds
from .record import Record
from .shapes import ENCODES, FEW_TOKENS, TRAININGS, ProblemShape, TrainShape
from .training import Training

_KERNELS = 15  # rows of a kernel table


def inputs(shape: ProblemShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random x (N, D), and W (M, D) with rows of norm 1, in bfloat16."""
    torch.manual_seed(0)
    x = torch.randn(shape.n, shape.d, device=device, dtype=torch.bfloat16)
    W = torch.randn(shape.m, shape.d, device=device, dtype=torch.bfloat16)
    return x, normalize(W, dim=1)


def bare_product(shape: ProblemShape, device: torch.device) -> float:
    """Seconds of torch.mm of the encoder's size, into allocated memory."""
    x, W = inputs(shape, device)
    out = x.new_empty(shape.n, shape.m)
    return device_seconds(lambda: torch.mm(x, W.T, out=out), device)


def encoders(x: Tensor, W: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """Ways to the K largest of each row of x Wᵀ. The others store all N · M scores."""
    ways: dict[str, Callable[[], object]] = {
        "sparse_topk": lambda: ops.topk_encode(x, W, None, k, relu=True),
        "torch.mm + torch.topk": lambda: (x @ W.T).topk(k, sorted=False),
    }
    try:
        import flashinfer
    except ImportError:
        return ways
    return ways | {"torch.mm + flashinfer.top_k": lambda: flashinfer.top_k(x @ W.T, k)}


def time_encode(
    record: Record, section: str, shape: ProblemShape, device: torch.device, unit: str
) -> None:
    """A row for each way to encode; times in `unit`, "ms" or "µs"."""
    per_second = {"ms": 1e3, "µs": 1e6}[unit]
    bare = bare_product(shape, device)
    sizes = {"shape": shape.name, "N": shape.n, "D": shape.d, "M": shape.m, "K": shape.k}
    record.add(section, {**sizes, "by": "torch.mm", unit: per_second * bare, "× mm": 1.0})
    x, W = inputs(shape, device)
    for name, work in encoders(x, W, shape.k).items():
        seconds = device_seconds(work, device)
        record.add(
            section,
            {
                **sizes,
                "by": name,
                unit: per_second * seconds,
                "× mm": seconds / bare,
                "launches": _count(launched(work, device)),
                "peak, MB": peak_bytes(work, device) / 1e6,
            },
        )


def time_step(record: Record, shape: TrainShape, device: torch.device, optimizer: str) -> None:
    """A row of one training step with the optimizer of that name, and the table of its kernels."""
    bare = bare_product(shape.encode, device)
    training = Training(shape, device, optimizer=optimizer)
    training.step()  # compiles, and makes what later steps keep

    def work() -> None:
        training.kill()
        training.step()

    seconds = median_seconds(work, device, rounds=10)
    training.kill()
    kernels = launched(training.step, device)
    busy = sum(kernel.seconds for kernel in kernels)
    record.add(
        "training step",
        {
            "step": shape.name,
            "optimizer": optimizer,
            "L": shape.layers,
            "N": shape.n,
            "D": shape.d,
            "M": shape.m,
            "K": shape.k,
            "ms": 1e3 * seconds,
            "× mm": seconds / bare,
            "mm, ms": 1e3 * bare,
            "tokens/s": round(shape.n / seconds),
            "launches": _count(kernels),
            "kernels, ms": 1e3 * busy,
            "peak, MB": peak_bytes(work, device) / 1e6,
        },
    )
    for kernel in kernels[:_KERNELS]:
        record.add(
            f"kernels of a step, {shape.name}, {optimizer}",
            {
                "kernel": kernel.name[:60],
                "calls": kernel.calls,
                "ms": 1e3 * kernel.seconds,
                "share": f"{kernel.seconds / busy:.1%}",
            },
        )


def time_captured(record: Record, shape: TrainShape, device: torch.device) -> None:
    """Forward and backward of one part, launched one by one and replayed as a CUDA graph; or why
    they cannot be captured."""
    training = Training(shape, device)
    training.step()
    training.kill()
    training.open_step()
    plain = median_seconds(training.micro_step, device, rounds=10)
    row = {"step": shape.name, "launched, ms": 1e3 * plain}
    try:
        replayed = median_seconds(capture(training.micro_step), device, rounds=10)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0][:120]
        record.add("CUDA graph of a part", {**row, "replayed, ms": None, "not captured": why})
    else:
        record.add("CUDA graph of a part", {**row, "replayed, ms": 1e3 * replayed})


def capture(work: Callable[[], object]) -> Callable[[], None]:
    """A function that replays what `work` launches. Raises RuntimeError if it waits for the device,
    or there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a CUDA device")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for, before a capture
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _count(kernels: list[Launched]) -> int:
    return sum(kernel.calls for kernel in kernels)


def run(record: Record, device: torch.device) -> None:
    """All rows, the most wanted first, as long as there is time. What does not fit in the device's
    memory is left out, and said."""
    kind = device.type
    parts: list[tuple[str, Callable[[], None]]] = []
    for optimizer, step in product(("adam", "normuon"), TRAININGS[kind]):
        timed = partial(time_step, record, step, device, optimizer)
        parts.append((f"{step.name} with {optimizer}", timed))
    for shape in ENCODES[kind]:
        parts.append((shape.name, partial(time_encode, record, "encode", shape, device, "ms")))
    for shape in FEW_TOKENS[kind]:
        few = partial(time_encode, record, "few tokens", shape, device, "µs")
        parts.append((f"{shape.name} of {shape.n} tokens", few))
    for step in TRAININGS[kind]:
        parts.append((f"graph of {step.name}", partial(time_captured, record, step, device)))
    for name, work in parts:
        if record.time_left() <= 0:
            print(f"left out, out of time: {name}", flush=True)
            continue
        try:
            work()
        except torch.OutOfMemoryError:
            print(f"left out, out of memory: {name}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """The program."""
    parser = options("step", __doc__, 90)
    arguments = parser.parse_args()
    device = chosen_device(parser, arguments.device)
    keep_freed_memory()
    record = Record("step", arguments.out, arguments.device, arguments.seconds)
    run(record, device)
    print(f"\n{record.tables()}\nwritten: {record.path}")


if __name__ == "__main__":
    main()
