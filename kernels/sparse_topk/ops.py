"""The ops, each run by one of two backends: plain torch, or Triton on a CUDA device.

This is the one door to both backends, `torch_ops` and `triton_ops`. The products are torch
operators, `torch.ops.sparse_topk.*` (`_ops` has the namespace): torch.compile takes each as one
node of its graph, whatever is inside. Each has a fake twin, which gives the shape and dtype of the
result without computing it.

SPARSE_TOPK_BACKEND chooses the backend: "auto" (the default) takes Triton for tensors on a CUDA
device and torch elsewhere, "torch" and "triton" take the one named. Triton is imported when it is
first needed. If the import fails, so does the call; there is no silent fallback.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

# No `from __future__ import annotations` here: torch reads the operators' schemas off them.

import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import torch_ops
from ._ops import add_op_namespace_prefix
from .torch_ops import CSC

_CHOICES = ("auto", "torch", "triton")


def backend_name(device: torch.device | str) -> str:
    """The name of the backend for tensors on `device`: "torch" or "triton".

    Raises ValueError if SPARSE_TOPK_BACKEND is none of "auto", "torch" and "triton".
    """
    choice = os.environ.get("SPARSE_TOPK_BACKEND", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"SPARSE_TOPK_BACKEND must be one of {_CHOICES}, got {choice!r}")
    if choice == "auto":
        return "triton" if torch.device(device).type == "cuda" else "torch"
    return choice


def backend_for(tensor: Tensor) -> ModuleType:
    """The module whose ops to call for `tensor` and for others on its device.

    Raises ValueError as `backend_name` does, and RuntimeError if SPARSE_TOPK_BACKEND is "triton"
    and `tensor` is not on a CUDA device, unless Triton's interpreter is on.
    """
    if backend_name(tensor.device) == "torch":
        return torch_ops
    from . import triton_ops

    if tensor.device.type != "cuda":
        from triton import knobs

        if not knobs.runtime.interpret:
            raise RuntimeError(
                f"SPARSE_TOPK_BACKEND is 'triton', and the tensor is on {tensor.device}: Triton "
                "needs a CUDA device, or its interpreter, with TRITON_INTERPRET=1 from the start"
            )
    return triton_ops


@torch.library.custom_op(add_op_namespace_prefix("topk_encode"), mutates_args=())
def topk_encode(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.topk_encode`."""
    return backend_for(x).topk_encode(x, W, b, k, relu)


@topk_encode.register_fake
def _(x: Tensor, W: Tensor, b: Tensor | None, k: int, relu: bool = False) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)


@torch.library.custom_op(add_op_namespace_prefix("gather_sum"), mutates_args=())
def gather_sum(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """See `torch_ops.gather_sum`."""
    return backend_for(W).gather_sum(values, indices, W)


@gather_sum.register_fake
def _(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return W.new_empty(len(indices), W.shape[1])


@torch.library.custom_op(add_op_namespace_prefix("gather_dot"), mutates_args=())
def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """See `torch_ops.gather_dot`."""
    return backend_for(W).gather_dot(x, indices, W)


@gather_dot.register_fake
def _(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return x.new_empty(indices.shape)


@torch.library.custom_op(add_op_namespace_prefix("csc_by_latent"), mutates_args=())
def _csc_by_latent(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    perm, indptr = backend_for(indices).csc_by_latent(indices, n_latents)
    return perm, indptr


@_csc_by_latent.register_fake
def _(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    return indices.new_empty(indices.numel()), indices.new_empty(n_latents + 1)


@torch.library.custom_op(add_op_namespace_prefix("scatter_outer"), mutates_args=())
def _scatter_outer(
    values: Tensor, perm: Tensor, indptr: Tensor, x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    return backend_for(x).scatter_outer(values, CSC(perm, indptr), x, dtype=dtype)


@_scatter_outer.register_fake
def _(
    values: Tensor, perm: Tensor, indptr: Tensor, x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    return x.new_empty(len(indptr) - 1, x.shape[1], dtype=dtype)


@torch.library.custom_op(add_op_namespace_prefix("scatter_outer_"), mutates_args=("out",))
def _scatter_outer_(values: Tensor, perm: Tensor, indptr: Tensor, x: Tensor, out: Tensor) -> None:
    backend_for(x).scatter_outer(values, CSC(perm, indptr), x, out)


@_scatter_outer_.register_fake
def _(values: Tensor, perm: Tensor, indptr: Tensor, x: Tensor, out: Tensor) -> None:
    pass


@torch.library.custom_op(add_op_namespace_prefix("keep_topk_"), mutates_args=("z",))
def keep_topk_(z: Tensor, k: int) -> None:
    """See `torch_ops.keep_topk_`."""
    backend_for(z).keep_topk_(z, k)


@keep_topk_.register_fake
def _(z: Tensor, k: int) -> None:
    pass


@torch.library.custom_op(add_op_namespace_prefix("aux_residual"), mutates_args=())
def aux_residual(
    e_hat: Tensor, error: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.aux_residual`."""
    return backend_for(error).aux_residual(e_hat, error, weight, scale)


@aux_residual.register_fake
def _(e_hat: Tensor, error: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(error)


@torch.library.custom_op(add_op_namespace_prefix("sum_by_latent"), mutates_args=())
def _sum_by_latent(values: Tensor, indices: Tensor, perm: Tensor, indptr: Tensor) -> Tensor:
    return backend_for(values).sum_by_latent(values, indices, CSC(perm, indptr))


@_sum_by_latent.register_fake
def _(values: Tensor, indices: Tensor, perm: Tensor, indptr: Tensor) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.new_empty(len(indptr) - 1, dtype=dtype)


# Under torch.vmap, those that compute each token alone take a batch as more tokens, as long as the
# weights are not batched; the others run once for each of the batch.


def _vmap_tokens(operator: Any, n_per_token: int) -> None:
    """The first `n_per_token` arguments of the operator have one row per token."""

    def fold(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if any(dim is not None for dim in in_dims[n_per_token:]):
            return _one_by_one(operator, info.batch_size, in_dims, args)
        rows = [
            (a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)).flatten(0, 1)
            for a, d in zip(args[:n_per_token], in_dims, strict=False)
        ]
        out = operator(*rows, *args[n_per_token:])
        unfold = lambda t: t.unflatten(0, (info.batch_size, -1))  # noqa: E731
        return (unfold(out), 0) if isinstance(out, Tensor) else (tuple(map(unfold, out)), (0, 0))

    operator.register_vmap(fold)


def _vmap_each(operator: Any) -> None:
    operator.register_vmap(
        lambda info, in_dims, *args: _one_by_one(operator, info.batch_size, in_dims, args)
    )


def _one_by_one(
    operator: Any, n: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    outs = [
        operator(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(n)
    ]
    if isinstance(outs[0], Tensor):
        return torch.stack(outs), 0
    return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])


_vmap_tokens(topk_encode, 1)
_vmap_tokens(gather_sum, 2)
_vmap_tokens(gather_dot, 2)
for _operator in (_csc_by_latent, _scatter_outer, _sum_by_latent):
    _vmap_each(_operator)

# An operator's arguments are tensors and numbers, so these three take the CSC apart.


def csc_by_latent(indices: Tensor, n_latents: int) -> CSC:
    """See `torch_ops.csc_by_latent`."""
    return CSC(*_csc_by_latent(indices, n_latents))


def scatter_outer(
    values: Tensor,
    csc: CSC,
    x: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `torch_ops.scatter_outer`."""
    if out is None:
        return _scatter_outer(values, csc.perm, csc.indptr, x, dtype)
    _scatter_outer_(values, csc.perm, csc.indptr, x, out)
    return out


def sum_by_latent(values: Tensor, indices: Tensor, csc: CSC) -> Tensor:
    """See `torch_ops.sum_by_latent`."""
    return _sum_by_latent(values, indices, csc.perm, csc.indptr)


def adam_unit_norm_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    unit_norm: bool,
    grad_scale: Tensor | None = None,
    shadow: Tensor | None = None,
) -> None:
    """See `torch_ops.adam_unit_norm_`. A plain function: an optimizer's step is not compiled, and
    an operator would cost each weight the time to dispatch it."""
    backend_for(weight).adam_unit_norm_(
        weight, grad, exp_avg, exp_avg_sq, step,
        lr=lr, betas=betas, eps=eps, unit_norm=unit_norm, grad_scale=grad_scale, shadow=shadow,
    )  # fmt: skip


def tangent_momentum_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    beta: float,
    unit_norm: bool,
    dtype: torch.dtype,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """See `torch_optim.tangent_momentum_`."""
    direction: Tensor = backend_for(weight).tangent_momentum_(
        weight, grad, exp_avg,
        beta=beta, unit_norm=unit_norm, dtype=dtype, grad_scale=grad_scale,
    )  # fmt: skip
    return direction


def apply_rows_(
    weight: Tensor,
    update: Tensor,
    row_sq: Tensor,
    *,
    lr: float,
    beta: float,
    bias_correction: float,
    eps: float,
    unit_norm: bool,
    shadow: Tensor | None = None,
) -> None:
    """See `torch_optim.apply_rows_`."""
    backend_for(weight).apply_rows_(
        weight, update, row_sq, lr=lr, beta=beta, bias_correction=bias_correction, eps=eps,
        unit_norm=unit_norm, shadow=shadow,
    )  # fmt: skip
