"""Count the launches of a training step, and the bytes that it reads and writes, without a GPU.

    python -m bench.ledger        a table for each training step, with Adam and with NorMuon

The trainer's own code runs on fake tensors, which have shapes and no data. Calls of this package's
ops take the Triton backend, whose kernels are counted instead of launched: an op's launches are
counted as they come, its bytes by its cost (`ledger_costs`), so what an op wastes inside is not
seen. One of torch's operators is one launch, and moves its inputs and outputs; a view and an
allocation are free. Sorts and a few others are several kernels, and count as one here.

What a step asks of the device (`.item()`, `nonzero`, a boolean index) is counted as a wait, and
answered as `Ledger` says.

The time is modelled, not measured: of each call the longest of its bytes at 3.0 TB/s, its products
at 750 TFLOP/s, and its gathered rows at 7 TB/s from the L2 cache, or 2.8 if they exceed 50 MB; one
H100 measured each of these rates alone (2026-11-26). Selection and launches cost no time here.

Legend: N tokens, M latents, K active latents per token.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlsae.planning.gpus import H100
from sparse_topk import auxk, costs, ops

from .ledger_costs import Moved, moved_by_op, moved_by_torch
from .results import table
from .shapes import TRAININGS, TrainShape
from .training import Training

COPY, PRODUCT = H100.bytes_per_second, H100.flop_per_second
_L2_RATE, _RATE, _L2_BYTES = 7e12, 2.8e12, 50e6  # bytes/s of gathered rows, within the cache or not


@dataclass
class Line:
    """The calls of one name."""

    calls: int = 0
    launches: int = 0
    waits: int = 0
    bytes: float = 0.0
    seconds: float = 0.0

    def add(self, moved: Moved) -> None:
        """Add a call's traffic and modelled time."""
        self.bytes += moved.bytes
        rate = _L2_RATE if moved.table <= _L2_BYTES else _RATE
        times = moved.bytes / COPY, moved.flop / PRODUCT, moved.gathered / rate
        self.seconds += max(times)


class Ledger(TorchDispatchMode):
    """Counts what is called while it is on: `lines`, by name.

    `dead` is the answer to which of M latents are dead: how many of them. Other masks have only
    true elements, and a float is 1.
    """

    def __init__(self, n_latents: int = 0, dead: int = 0) -> None:
        super().__init__()
        self.lines: dict[str, Line] = {}
        self.n_latents, self.dead = n_latents, dead
        self._asked: int | None = None  # the storage of the last element that was asked for
        self._op: Line | None = None  # the op of this package that is running
        self._op_flop = 0.0  # of the matrix products that torch does for it

    def total(self) -> Line:
        """The sum of all lines."""
        lines = [astuple(line) for line in self.lines.values()]
        return Line(*map(sum, zip(*lines, strict=True)))

    def line(self, name: str) -> Line:
        """The line of a name, which begins empty."""
        return self.lines.setdefault(name, Line())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sparse_topk":
            return self._run_operator(func, args, kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        line = self._op or self.line(f"torch {func._schema.name.removeprefix('aten::')}")
        answer = self._answer(func, args, line)
        result = func(*args, **kwargs) if answer is None else answer
        moved = moved_by_torch(func, args, kwargs, result)
        if moved is not None:
            line.launches += 1
            if self._op is None:
                line.calls += 1
                line.add(moved)
            else:
                self._op_flop += moved.flop
        return result

    def _run_operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the code behind an operator of this package, which calls the backend."""
        for key in ("CUDA", "CompositeExplicitAutograd"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
                with self:
                    return func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
        raise RuntimeError(f"{func} has no code for a CUDA device")

    def _answer(self, func: Any, args: Any, line: Line) -> Any:
        """The answer to a call that waits for the device; None if it does not."""
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            if not args[0].is_floating_point():
                raise NotImplementedError(f"a step asked the device for a {args[0].dtype}")
            storage = args[0].untyped_storage()._cdata
            line.waits += storage != self._asked  # `tolist` waits once for all elements
            self._asked = storage
            return 1.0
        if name == "aten::nonzero":
            line.waits += 1
            return args[0].new_empty(self._true(args[0]), args[0].ndim, dtype=torch.int64)
        if name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            line.waits += 1
            (mask,) = args[1]
            return args[0].new_empty(self._true(mask), *args[0].shape[mask.ndim :])
        return None

    def _true(self, mask: Tensor) -> int:
        """How many elements of a mask are true."""
        return self.dead if mask.shape == (self.n_latents,) else mask.numel()

    def backend(self) -> Any:
        """The Triton backend, each of whose ops is written down when it is called."""
        from sparse_topk import triton_ops

        names = [name for name in triton_ops.__all__ if name != "CSC"]
        recorded = {name: self._recorded(name, getattr(triton_ops, name)) for name in names}
        return SimpleNamespace(**vars(triton_ops) | recorded)

    def _recorded(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            moved = moved_by_op(name, args, kwargs)
            self._op, self._op_flop = self.line(name), 0.0
            try:
                return op(*args, **kwargs)
            finally:
                if self._op_flop:  # by dense products, not by gathering rows
                    moved = Moved(moved.bytes, self._op_flop)
                self._op.calls += 1
                self._op.add(moved)
                self._op = None

        return call

    def launch(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """Count a kernel. Outside of an op, it moves each of its tensors once."""
        line = self._op or self.line(f"kernel {kernel.fn.__name__}")
        line.launches += 1
        if self._op is None:
            line.calls += 1
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            line.add(Moved(sum(t.nbytes for t in given)))


@contextmanager
def _backend_everywhere(backend: Any) -> Iterator[None]:
    """Let `backend` be chosen in every module of the package that chooses one."""
    choose = ops.backend_for
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("sparse_topk.") and vars(module).get("backend_for") is choose:
                patch = mock.patch.object(module, "backend_for", return_value=backend)
                stack.enter_context(patch)
        yield


@contextmanager
def counting(n_latents: int = 0, dead: int = 0) -> Iterator[Ledger]:
    """A ledger of all that runs inside, on fake tensors, as it would on an H100."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    ledger = Ledger(n_latents, dead)
    backend = ledger.backend()
    chip = SimpleNamespace(multi_processor_count=132)

    choose = auxk.latents_are_few

    def latents_are_few(n_latents: int, k: int, like: Tensor) -> bool:
        size = SimpleNamespace(device=torch.device("cuda"), element_size=like.element_size)
        return choose(n_latents, k, size)  # type: ignore[arg-type]

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        ledger.launch(kernel, *args, **kwargs)

    with (
        _backend_everywhere(backend),
        mock.patch.object(FakeTensor, "is_cuda", True, create=True),
        mock.patch.object(auxk, "latents_are_few", latents_are_few),
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(InterpretedFunction, "run", launch),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=chip),
        warnings.catch_warnings(),
        FakeTensorMode(),
    ):
        # Launchers look whether addresses are aligned, which those of fake tensors always are.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield ledger


def count_step(shape: TrainShape, optimizer: str = "adam") -> Ledger:
    """The ledger of one training step with the optimizer of that name."""
    with counting(shape.m, shape.dead) as ledger:
        training = Training(shape, torch.device("cpu"), optimizer=optimizer)
        with ledger:
            training.step()  # makes what later steps keep
            training.kill()
            ledger.lines.clear()
            training.step()
    return ledger


def must_move(shape: TrainShape, optimizer: str = "adam") -> float:
    """Bytes that the step must read and write: the sum over its ops."""
    return sum(cost.bytes for cost in costs.training_step(shape, 2, optimizer))


def describe(shape: TrainShape, ledger: Ledger, optimizer: str = "adam") -> str:
    """The table of a step, its largest lines first."""
    total, must = ledger.total(), must_move(shape, optimizer)
    bare = costs.topk_encode(shape.encode, 2).flop / PRODUCT
    rows = [
        [name, str(x.calls), str(x.launches), f"{x.bytes / 1e6:,.0f}", f"{1e3 * x.seconds:.2f}"]
        for name, x in sorted(ledger.lines.items(), key=lambda item: -item[1].seconds)
        if x.launches
    ]
    s = shape
    sizes = f"L {s.layers}, N {s.n:,}, D {s.d}, M {s.m}, K {s.k}"
    return "\n".join(
        [
            f"## {shape.name}: {sizes}, {optimizer}",
            f"{total.launches} launches, {total.waits} waits; {total.bytes / 1e9:.2f} GB, "
            f"{total.bytes / must:.2f} times the {must / 1e9:.2f} that must move; "
            f"{1e3 * total.seconds:.2f} ms modelled, {total.seconds / bare:.2f} times the product",
            "",
            table(["what", "calls", "launches", "MB", "ms, modelled"], rows),
            "",
        ]
    )


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args()
    for shape in TRAININGS["cuda"]:
        for optimizer in ("adam", "normuon"):
            ledger = count_step(shape, optimizer)
            print(describe(shape, ledger, optimizer), flush=True)


if __name__ == "__main__":
    main()
