"""Adam in Triton, one pass over memory, with rows kept on the unit sphere on request.

Weight, gradient and both moments are read once and all but the gradient written once: 28 bytes a
float32 weight, where the projection, Adam and the norm one after the other move about 60.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sparse import sum_type

__all__ = ["adam_unit_norm_"]


@triton.jit
def _update(w, g, m, v, rate, eps, c1, c2):  # type: ignore[no-untyped-def]
    """Adam's new weight and moments; c1 and c2 are 1 − β₁ and 1 − β₂, `rate` and `eps` hold the
    corrections of both biases."""
    m += (g - m) * c1
    v = v * (1.0 - c2) + g * g * c2
    return w - rate * m / (tl.sqrt(v) + eps), m, v


@triton.jit
def adam_rows_kernel(  # type: ignore[no-untyped-def]
    weight,  # (M, D)
    grad,  # (M, D)
    exp_avg,  # (M, D)
    exp_avg_sq,  # (M, D)
    shadow,  # (M, D) or None
    grad_scale,  # () or None
    D,
    rate,
    eps,
    c1,
    c2,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
):
    """Update one row: the gradient's part along it removed, Adam, and back to norm 1."""
    column = tl.arange(0, BLOCK_D)
    mask = column < D
    at = tl.program_id(0).to(tl.int64) * D + column
    w = tl.load(weight + at, mask, other=0.0).to(SUM)
    g = tl.load(grad + at, mask, other=0.0).to(SUM)
    m = tl.load(exp_avg + at, mask, other=0.0).to(SUM)
    v = tl.load(exp_avg_sq + at, mask, other=0.0).to(SUM)
    if grad_scale is not None:
        g *= tl.load(grad_scale).to(SUM)
    g -= tl.sum(g * w, 0) * w
    w, m, v = _update(w, g, m, v, rate, eps, c1, c2)
    w = tl.where(mask, w, 0.0)  # beyond D, 0 / 0 if eps is 0
    w /= tl.sqrt(tl.sum(w * w, 0))
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask)
    if shadow is not None:
        tl.store(shadow + at, w.to(shadow.dtype.element_ty), mask)


@triton.jit
def adam_flat_kernel(  # type: ignore[no-untyped-def]
    weight,  # (size,), as are the next four
    grad,
    exp_avg,
    exp_avg_sq,
    shadow,  # or None
    grad_scale,  # () or None
    size,
    rate,
    eps,
    c1,
    c2,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    """Update BLOCK weights by Adam."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    w = tl.load(weight + at, mask, other=0.0).to(SUM)
    g = tl.load(grad + at, mask, other=0.0).to(SUM)
    m = tl.load(exp_avg + at, mask, other=0.0).to(SUM)
    v = tl.load(exp_avg_sq + at, mask, other=0.0).to(SUM)
    if grad_scale is not None:
        g *= tl.load(grad_scale).to(SUM)
    w, m, v = _update(w, g, m, v, rate, eps, c1, c2)
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask)
    if shadow is not None:
        tl.store(shadow + at, w.to(shadow.dtype.element_ty), mask)


@torch.no_grad()
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
    """One Adam step in place; with `unit_norm`, on the unit sphere of each row.

    For each row w of `weight` with gradient g:
        g ← grad_scale · g − (grad_scale · g · w) w
        w ← Adam(w, g)           bias-corrected (Kingma and Ba, 2015), `step` counted from 1
        w ← w / |w|              also stored in `shadow`, in its dtype

    weight, grad, exp_avg, exp_avg_sq, shadow (…) of one shape; (M, D) with `unit_norm`.
    grad_scale () on the weight's device. `grad` is left as it was. Computed in float32, or in
    float64 where the weight is of it, with `lr`, `betas` and `eps` rounded to float32.

    Raises ValueError if a tensor to be written is not contiguous.
    """
    for name, t in (("weight", weight), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got the strides {t.stride()}")
    if shadow is not None and not shadow.is_contiguous():
        raise ValueError(f"shadow must be contiguous, got the strides {shadow.stride()}")
    # m̂ / (√v̂ + ε) = m √(1 − β₂ᵗ) / (1 − β₁ᵗ) / (√v + ε √(1 − β₂ᵗ))
    root = math.sqrt(1 - betas[1] ** step)
    scalars = (lr * root / (1 - betas[0] ** step), eps * root, 1 - betas[0], 1 - betas[1])
    tensors = (weight, grad.contiguous(), exp_avg, exp_avg_sq, shadow, grad_scale)
    with torch.cuda.device_of(weight):
        if unit_norm:
            m, d = weight.shape
            block, warps = adam_rows_tile(d)
            adam_rows_kernel[m,](*tensors, d, *scalars, block, sum_type(weight), num_warps=warps)
        else:
            size = weight.numel()
            block, warps = adam_flat_tile()
            adam_flat_kernel[triton.cdiv(size, block),](
                *tensors, size, *scalars, block, sum_type(weight), num_warps=warps
            )
    for written in (weight, exp_avg, exp_avg_sq, shadow):
        if written is not None:  # autograd does not see it, and must refuse a late backward
            torch.autograd.graph.increment_version(written)


def adam_rows_tile(d: int) -> tuple[int, int]:
    """Columns and warps of one program: a whole row, 8 columns a thread. Beyond D = 8192 they are
    more, and registers spill. From the cost model and compiled code, not yet measured on a GPU."""
    block = triton.next_power_of_2(d)
    return block, max(1, min(32, block // 256))


def adam_flat_tile() -> tuple[int, int]:
    """Weights and warps of one program, 8 weights a thread. From the cost model and compiled code,
    not yet measured on a GPU."""
    return 1024, 4
