"""Several processes that train together: the few torch.distributed calls.

    with session(timeout=600) as world:  # as `torchrun` started them
        mesh = make_mesh(world, device, shards=2)
        mesh.data.sum_(tensor)

A process on its own has groups of size 1, whose methods return at once and send nothing.

Legend: S processes of a group.
"""

from __future__ import annotations

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
from .launcher import LostContactError, launched
from .launcher import is_rank0 as is_rank0  # who needs this file has them from here, too
from .launcher import local_rank as local_rank
from .launcher import log_rank0 as log_rank0


class Group:
    """A group of processes, each with a `rank` in it. Its methods are collective: every process of
    the group must make the same calls in the same order. They raise LostContactError if another
    process is gone.

    Tensors on the CPU travel by gloo, those on a GPU by NCCL.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.size = dist.get_world_size(group) if group else 1
        self.rank = dist.get_rank(group) if group else 0
        self._group = group

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place. Every process gets the same bits."""
        if self.size > 1:
            with _raise_lost_contact():
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def sum_all_(self, tensors: Sequence[Tensor]) -> None:
        """`sum_` of each tensor. All are sent before the first result is waited for."""
        if self.size > 1:
            with _raise_lost_contact():
                works = [dist.all_reduce(t, group=self._group, async_op=True) for t in tensors]
                for work in works:
                    work.wait()

    def max_(self, tensor: Tensor) -> Tensor:
        """Maximum over the processes, in place."""
        if self.size > 1:
            with _raise_lost_contact():
                dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every process's tensor (…), all of one shape → (S, …)."""
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty(self.size, *tensor.shape)
        with _raise_lost_contact():
            dist.all_gather(list(gathered), tensor.contiguous(), group=self._group)
        return gathered

    def all_cat(self, tensor: Tensor) -> Tensor:
        """The matrices (R, N) of all processes, each of its own N, side by side in the order of
        their ranks → (R, ΣN)."""
        if self.size == 1:
            return tensor
        lengths = self.all_gather(torch.tensor(tensor.shape[1], device=tensor.device)).tolist()
        padded = tensor.new_zeros(len(tensor), max(lengths))
        padded[:, : tensor.shape[1]] = tensor
        parts = zip(self.all_gather(padded), lengths, strict=True)
        return torch.cat([part[:, :length] for part, length in parts], 1)

    def all_to_all(self, blocks: Tensor) -> Tensor:
        """Send block s of (S, …) to process s, and receive block s of the result (S, …) from it."""
        if self.size == 1:
            return blocks
        received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        with _raise_lost_contact():
            dist.all_to_all_single(received, blocks.contiguous(), group=self._group)
        return received

    def collect_on_rank0(self, part: Tensor, lengths: Sequence[int]) -> Tensor:
        """Concatenate the parts (lengths[s], …) of all processes on rank 0's CPU; the other ranks
        get their own part back. While it runs, rank 0's device holds one more part."""
        if self.size == 1:
            return part
        if self.rank > 0:
            with _raise_lost_contact():
                dist.send(part.contiguous(), group=self._group, group_dst=0)
            return part
        parts = [part.cpu()]
        for s, length in enumerate(lengths[1:], start=1):
            buffer = part.new_empty(length, *part.shape[1:])
            with _raise_lost_contact():
                dist.recv(buffer, group=self._group, group_src=s)
            parts.append(buffer.cpu())
        return torch.cat(parts)

    def sum_int(self, number: int) -> int:
        """The sum of the processes' numbers."""
        return int(self.sum_(torch.tensor(number))) if self.size > 1 else number

    def max_int(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return int(self.max_(torch.tensor(number))) if self.size > 1 else number

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with rank 0's."""
        if self.size > 1:
            with _raise_lost_contact():
                dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, which may be anything that pickles."""
        if self.size == 1:
            return value
        values = [value]
        with _raise_lost_contact():
            dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """If any process raises InputError inside the block, end all of them and print one message:
        rank 0 leaves the block with InputError, every other rank with SystemExit(2)."""
        if self.size == 1:
            yield
            return
        own_message = None
        try:
            yield
        except InputError as error:
            own_message = f"{socket.gethostname()}\n{error}"
        messages: list[str | None] = [None] * self.size
        with _raise_lost_contact():
            dist.all_gather_object(messages, own_message, group=self._group)
        failures = [(rank, *text.split("\n", 1)) for rank, text in enumerate(messages) if text]
        if not failures:
            return
        if self.rank > 0:
            sys.exit(2)
        rank, host, message = failures[0]
        on_all_ranks = len(failures) == self.size and len({text for *_, text in failures}) == 1
        raise InputError(message if on_all_ranks else f"on rank {rank} ({host}): {message}")


class Mesh(NamedTuple):
    """The groups that a process belongs to."""

    world: Group
    data: Group
    """Processes with the same latents, each with its own rows of text."""
    latents: Group
    """Processes with the same rows of text, each with its own latents. Their ranks are adjacent,
    so that they sit on one node."""


ALONE = Mesh(Group(), Group(), Group())


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
            "--device must be auto, cpu, or a CUDA device of this machine, "
            f"got {name!r}: {first_line(error)}"
        ) from error
    return device


@contextmanager
def session(timeout: float) -> Iterator[Group]:
    """The group of all processes of the run; of size 1 if no launcher started this process.

    A collective call that another process does not join within `timeout` seconds fails, so nothing
    hangs. On error the process group is not destroyed: teardown could block for the whole timeout.
    """
    if not launched():
        yield Group()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _raise_lost_contact():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield Group(dist.group.WORLD)
    except SystemExit:  # every process raises it (`raise_together`, signals), so teardown is safe
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
    """Arrange the processes as a grid of data × latents, on torch's device mesh. `shards` divides
    their number; `timeout` is the session's, in seconds."""
    if world.size == 1:
        return ALONE
    shape = (world.size // shards, shards)
    with _raise_lost_contact():
        grid = init_device_mesh(device.type, shape, mesh_dim_names=("data", "latents"))
    groups = [grid.get_group(name) for name in ("data", "latents")]
    for group in groups:  # a mesh gives its groups torch's default timeout, not the session's
        _set_pg_timeout(timedelta(seconds=timeout), group)
    return Mesh(world, *map(Group, groups))


def splits(n: int, size: int) -> list[slice]:
    """Split n rows among `size` processes, in the order of their ranks: contiguous slices without
    gap or overlap, whose lengths differ by at most one. No slice is longer than the first."""
    ends = [-(-n * rank // size) for rank in range(size + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


@contextmanager
def _raise_lost_contact() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        message = f"lost contact with another process: {first_line(error)}"
        raise LostContactError(message) from error
