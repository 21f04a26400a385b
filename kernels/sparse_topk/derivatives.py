"""The sparse products as functions of their floats that have derivatives of every order: by
autograd, in forward mode, and under the transforms of torch.func.

The derivatives of each are others of them:

    gather_sum      d values = gather_dot(d_out, W)      d W = scatter_outer(values, d_out)
    gather_dot      d x = gather_sum(d_out, W)           d W = scatter_outer(d_out, x)
    scatter_outer   d values = gather_dot(x, d_out)      d x = gather_sum(values, d_out)

Where nothing asks for derivatives, they are the ops themselves.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .torch_ops import CSC


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a `backward` of an autograd Function refuse `create_graph=True`, and say the way out."""
    first_order = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def refuse_graph(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "a second derivative of a sparse TopK SAE needs torch.func (such as "
                "torch.func.hessian, or torch.func.grad of torch.func.grad); autograd's "
                "create_graph=True gives first derivatives only"
            )
        return first_order(ctx, *grads)

    return refuse_graph


def gather_sum(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """See `torch_ops.gather_sum`."""
    if _is_constant():
        return ops.gather_sum(values, indices, W)
    return _GatherSum.apply(values, indices, W)


def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """See `torch_ops.gather_dot`."""
    if _is_constant():
        return ops.gather_dot(x, indices, W)
    return _GatherDot.apply(x, indices, W)


def scatter_outer(values: Tensor, indices: Tensor, csc: CSC, x: Tensor) -> Tensor:
    """See `torch_ops.scatter_outer`; `csc` is of `indices`."""
    if _is_constant():
        return ops.scatter_outer(values, csc, x)
    return _ScatterOuter.apply(values, indices, *csc, x)


def _is_constant() -> bool:
    """Whether no derivative of the result can be asked for. A compiled backward pass has none."""
    return torch.compiler.is_compiling() or not (torch.is_grad_enabled() or transformed())


class _Product(torch.autograd.Function):
    """One that saves all its arguments."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _GatherSum(_Product):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
        return ops.gather_sum(values, indices, W)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W = ctx.saved_tensors
        d_values = gather_dot(d_out, indices, W) if ctx.needs_input_grad[0] else None
        dW = _scatter(values, indices, d_out, W) if ctx.needs_input_grad[2] else None
        return d_values, None, dW

    @staticmethod
    def jvp(ctx: Any, t_values: Tensor, _: Any, t_W: Tensor) -> Tensor:
        values, indices, W = ctx.saved_tensors
        return gather_sum(t_values, indices, W) + gather_sum(values, indices, t_W)


class _GatherDot(_Product):
    @staticmethod
    def forward(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
        return ops.gather_dot(x, indices, W)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, W = ctx.saved_tensors
        dx = gather_sum(d_out, indices, W) if ctx.needs_input_grad[0] else None
        dW = _scatter(d_out, indices, x, W) if ctx.needs_input_grad[2] else None
        return dx, None, dW

    @staticmethod
    def jvp(ctx: Any, t_x: Tensor, _: Any, t_W: Tensor) -> Tensor:
        x, indices, W = ctx.saved_tensors
        return gather_dot(t_x, indices, W) + gather_dot(x, indices, t_W)


class _ScatterOuter(_Product):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, perm: Tensor, indptr: Tensor, x: Tensor) -> Tensor:
        return ops.scatter_outer(values, CSC(perm, indptr), x)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, _, _, x = ctx.saved_tensors
        d_values = gather_dot(x, indices, d_out) if ctx.needs_input_grad[0] else None
        dx = gather_sum(values, indices, d_out) if ctx.needs_input_grad[4] else None
        return d_values, None, None, None, dx

    @staticmethod
    def jvp(ctx: Any, t_values: Tensor, _i: Any, _p: Any, _r: Any, t_x: Tensor) -> Tensor:
        values, indices, perm, indptr, x = ctx.saved_tensors
        csc = CSC(perm, indptr)
        return scatter_outer(t_values, indices, csc, x) + scatter_outer(values, indices, csc, t_x)


def _scatter(values: Tensor, indices: Tensor, x: Tensor, W: Tensor) -> Tensor:
    return scatter_outer(values, indices, ops.csc_by_latent(indices, len(W)), x)
