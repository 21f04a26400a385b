"""`adam_unit_norm_` on DTensors, as FSDP2's `fully_shard` makes of parameters.

Each process updates its own shard. Where a row is split among processes, the sums over its elements
are sums over the processes too. Apart from `optim`, because torch.distributed is imported only by
those who have DTensors.

Legend: D inputs, M latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops


def whole(tensor: Tensor) -> Tensor:
    """The tensor whose parts a DTensor's processes hold. Collective."""
    return tensor.full_tensor()  # type: ignore[attr-defined]


def check_placements(p: Tensor, name: str, unit_norm: bool) -> None:
    """Raise ValueError unless p is a DTensor that `adam_unit_norm_` can update."""
    from torch.distributed.tensor import DTensor

    if not isinstance(p, DTensor):
        raise ValueError(
            f"a parameter must be a torch.Tensor or a DTensor, since it is updated in its memory, "
            f"and {name} is a {type(p).__name__}; train it with torch.optim.Adam, or make the "
            "optimizer before it is wrapped"
        )
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(
            f"a parameter must be replicated or sharded, and {name} has the placements "
            f"{p.placements}: a sum that is still to be done; redistribute it"
        )
    if unit_norm and not _has_whole_rows(p) and not _is_split_in_columns(p):
        raise ValueError(
            "a unit_norm parameter must be replicated or sharded by rows, Shard(0), or by columns, "
            f"Shard(1), on a mesh of one dimension, and {name} has the placements {p.placements} "
            f"on a mesh of shape {tuple(p.device_mesh.shape)}; shard it by rows, the default of "
            "fully_shard, or train it with torch.optim.Adam"
        )


@torch.no_grad()
def adam_unit_norm_(
    weight: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    step: int,
    *,
    unit_norm: bool,
    **settings: Any,
) -> None:
    """See `torch_ops.adam_unit_norm_`; weight, grad and moments are DTensors. Collective if rows
    are split."""
    grad = grad.redistribute(weight.device_mesh, weight.placements)
    split = unit_norm and not _has_whole_rows(weight)
    if split:
        grad = grad - (grad * weight).sum(1, keepdim=True) * weight
    w, g, m, v = (t.to_local() for t in (weight, grad, exp_avg, exp_avg_sq))
    ops.adam_unit_norm_(w, g, m, v, step, unit_norm=unit_norm and not split, **settings)
    if split:
        norms = whole(torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float64))
        w.div_(norms.where(norms != 0, 1))


def check_whole_rows(p: Any) -> None:
    """Raise ValueError unless every row of the DTensor p (M, D) is held whole, as `NorMuon` needs
    it."""
    if not _has_whole_rows(p):
        raise ValueError(
            f"NorMuon needs whole rows, and a parameter of shape {tuple(p.shape)} has the "
            f"placements {p.placements}; shard it by rows, the default of fully_shard, or give its "
            "group orthogonal=False"
        )


def own_rows(
    weight: Any, grad: Any, *state: Any
) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """This process's rows of a weight, its gradient and its state; and what adds up a matrix (D, D)
    over the processes that hold other rows."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    grad = grad.redistribute(weight.device_mesh, weight.placements)
    placements = [Partial() if p.is_shard() else Replicate() for p in weight.placements]

    def sum_rows(gram: Tensor) -> Tensor:
        return whole(DTensor.from_local(gram, weight.device_mesh, placements))

    return [t.to_local() for t in (weight, grad, *state)], sum_rows


def _has_whole_rows(p: Any) -> bool:
    return all(placement.is_replicate() or placement.is_shard(0) for placement in p.placements)


def _is_split_in_columns(p: Any) -> bool:
    return len(p.placements) == 1 and p.placements[0].is_shard(1)
