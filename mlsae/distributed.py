"""Several processes that train together: the few torch.distributed calls.

    with session(timeout=600) as world:  # as `torchrun` started them
        mesh = make_mesh(world, device, shards=2)
        mesh.data.sum_(tensor)

A process that is alone has groups of one, whose methods return at once and send nothing.

Legend: S processes of a group.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from .errors import InputError, first_line


class LostContactError(RuntimeError):
    """Another process of the run has ended, or does not answer within the timeout."""


class Group:
    """Processes that share a task, each with a `rank` in it. Every one of them must make the same
    calls in the same order; each raises LostContactError if that fails.

    Tensors on the CPU travel by gloo, those on a GPU by NCCL.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.size = dist.get_world_size(group) if group else 1
        self.rank = dist.get_rank(group) if group else 0
        self._group = group

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place: the same bits in each."""
        if self.size > 1:
            with _contact():
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def sum_all_(self, tensors: Sequence[Tensor]) -> None:
        """`sum_` of each. All are on their way before the first one is waited for."""
        if self.size > 1:
            with _contact():
                works = [dist.all_reduce(t, group=self._group, async_op=True) for t in tensors]
                for work in works:
                    work.wait()

    def max_(self, tensor: Tensor) -> Tensor:
        """The maximum over the processes, in place."""
        if self.size > 1:
            with _contact():
                dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Every process's tensor (…), all of one shape → (S, …)."""
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty(self.size, *tensor.shape)
        with _contact():
            dist.all_gather(list(gathered), tensor.contiguous(), group=self._group)
        return gathered

    def exchange(self, blocks: Tensor) -> Tensor:
        """Block s of (S, …) goes to process s; block s of the result (S, …) comes from it."""
        if self.size == 1:
            return blocks
        received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        with _contact():
            dist.all_to_all_single(received, blocks.contiguous(), group=self._group)
        return received

    def collect(self, part: Tensor, lengths: Sequence[int]) -> Tensor:
        """The parts (lengths[s], …) of all processes, one below the other, on the CPU of the first;
        the others keep their own. The first one's device holds one more part for the while."""
        if self.size == 1:
            return part
        if self.rank > 0:
            with _contact():
                dist.send(part.contiguous(), group=self._group, group_dst=0)
            return part
        parts = [part.cpu()]
        for s, length in enumerate(lengths[1:], start=1):
            buffer = part.new_empty(length, *part.shape[1:])
            with _contact():
                dist.recv(buffer, group=self._group, group_src=s)
            parts.append(buffer.cpu())
        return torch.cat(parts)

    def total(self, number: int) -> int:
        """The sum of the processes' numbers."""
        return int(self.sum_(torch.tensor(number))) if self.size > 1 else number

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return int(self.max_(torch.tensor(number))) if self.size > 1 else number

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in all of them."""
        if self.size > 1:
            with _contact():
                dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor

    def share(self, value: Any) -> Any:
        """The first process's value, anything that pickles, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        with _contact():
            dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """What may fail in some of the processes ends all of them, and is said once: an InputError
        in any leaves the block as InputError in the first one, and as SystemExit(2) in the rest."""
        if self.size == 1:
            yield
            return
        message = None
        try:
            yield
        except InputError as error:
            message = str(error)
        messages: list[str | None] = [None] * self.size
        with _contact():
            dist.all_gather_object(
                messages, message and f"{socket.gethostname()}\n{message}", group=self._group
            )
        failed = [(rank, *said.split("\n", 1)) for rank, said in enumerate(messages) if said]
        if not failed:
            return
        rank, host, said = failed[0]
        if self.rank > 0:
            sys.exit(2)
        everywhere = len({text for _, _, text in failed}) == 1 and len(failed) == self.size
        raise InputError(said if everywhere else f"on rank {rank} ({host}): {said}")


class Mesh(NamedTuple):
    """The groups that a process belongs to."""

    world: Group
    data: Group
    """Processes with the same latents, each with rows of its own."""
    latents: Group
    """Processes with the same rows, each with latents of its own: neighbors in rank, so that
    they sit on one node."""


ALONE = Mesh(Group(), Group(), Group())


def launched() -> bool:
    """Whether this process is one of several, as `torchrun` starts them, or Slurm with RANK and
    WORLD_SIZE set."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int | None:
    """The number of this process on its node; None where it was not launched as one of several."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else None


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device that `--device` names. A CUDA device has its index and becomes the current one;
    plain "cuda" on a node of several processes is the GPU numbered `local_rank`.

    Raises InputError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.empty(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device must be auto, cpu, or a CUDA device that is there, got {name!r}: "
            f"{first_line(error)}"
        ) from error
    return device


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not launched() or os.environ["RANK"] == "0"


def log_rank0(message: str) -> None:
    """Print to the terminal, not among the results; of several processes, the first one does."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


@contextmanager
def session(timeout: float) -> Iterator[Group]:
    """All processes of the run; a process that was not launched as one of several is alone.

    A call that the others do not join within `timeout` seconds fails, so nothing hangs. After an
    error this process leaves without a word, as to take leave of the others could take as long.
    """
    if not launched():
        yield Group()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _contact():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield Group(dist.group.WORLD)
    except SystemExit:  # of all processes, by agreement
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def check_shards(world: Group, shards: int) -> None:
    """Raise InputError if `shards` does not divide the number of processes."""
    if world.size % shards:
        raise InputError(
            f"--shard_latents must divide the number of processes, {world.size}, got {shards}; "
            "torchrun --nproc_per_node N -m mlsae.train … starts N of them"
        )


def make_mesh(world: Group, device: torch.device, shards: int, timeout: float) -> Mesh:
    """The processes as a grid of data × latents, on torch's own device mesh. `shards` divides
    their number; `timeout` is the session's, in seconds."""
    if world.size == 1:
        return ALONE
    shape = (world.size // shards, shards)
    with _contact():
        grid = init_device_mesh(device.type, shape, mesh_dim_names=("data", "latents"))
    groups = [grid.get_group(name) for name in ("data", "latents")]
    for group in groups:  # which a mesh does not hand down
        _set_pg_timeout(timedelta(seconds=timeout), group)
    return Mesh(world, *map(Group, groups))


def shares(n: int, size: int) -> list[slice]:
    """The parts of n rows that `size` processes have: contiguous, in the order of the ranks,
    without gap or overlap; none is longer by more than one, and the first is never shorter."""
    ends = [-(-n * rank // size) for rank in range(size + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


@contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = first_line(error)
        raise LostContactError(f"lost contact with another process: {reason}") from error
