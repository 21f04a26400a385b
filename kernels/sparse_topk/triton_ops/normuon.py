"""What NorMuon does beside its matrix products, in Triton: two passes over memory.

Per float32 weight, with directions and updates in bfloat16: the momentum reads gradient and moment,
and the weight if its rows are kept at norm 1, and writes the moment and the direction, 18 bytes;
the step reads weight and update and writes the weight, 10 bytes.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam import check_contiguous, unit_row
from .adam import row_tile as row_tile  # tuned here apart from Adam
from .precision import sum_type

__all__ = ["apply_rows_", "tangent_momentum_"]


@triton.jit
def tangent_momentum_kernel(
    weight_ptr,  # (M, D), read with UNIT_NORM only
    grad_ptr,  # (M, D)
    exp_avg_ptr,  # (M, D)
    direction_ptr,  # (M, D)
    grad_scale_ptr,  # () or None
    D,
    beta,
    rest,  # 1 − β
    UNIT_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """One program computes one row's momentum and direction."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs = tl.program_id(0).to(tl.int64) * D + offs_d
    g = tl.load(grad_ptr + offs, mask_d, other=0.0).to(ACC_DTYPE)
    m = tl.load(exp_avg_ptr + offs, mask_d, other=0.0).to(ACC_DTYPE)
    if grad_scale_ptr is not None:
        g *= tl.load(grad_scale_ptr).to(ACC_DTYPE)
    if UNIT_NORM:
        w = tl.load(weight_ptr + offs, mask_d, other=0.0).to(ACC_DTYPE)
        g -= tl.sum(g * w, 0) * w
    m += (g - m) * rest
    n = g + (m - g) * beta
    tl.store(exp_avg_ptr + offs, m.to(exp_avg_ptr.dtype.element_ty), mask_d)
    tl.store(direction_ptr + offs, n.to(direction_ptr.dtype.element_ty), mask_d)


@triton.jit
def apply_rows_kernel(
    weight_ptr,  # (M, D)
    update_ptr,  # (M, D)
    row_sq_ptr,  # (M, 1)
    shadow_ptr,  # (M, D) or None
    D,
    lr,
    rest,  # 1 − β
    bias_correction,
    eps,
    UNIT_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """One program updates one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs = row * D + offs_d
    w = tl.load(weight_ptr + offs, mask_d, other=0.0).to(ACC_DTYPE)
    u = tl.load(update_ptr + offs, mask_d, other=0.0).to(ACC_DTYPE)
    r = tl.load(row_sq_ptr + row).to(ACC_DTYPE)
    r += (tl.sum(u * u, 0) / D - r) * rest
    w -= lr / (tl.sqrt(r / bias_correction) + eps) * u
    w = tl.where(mask_d, w, 0.0)  # beyond D, 0 / 0 if eps is 0
    if UNIT_NORM:
        w = unit_row(w)
    tl.store(row_sq_ptr + row, r.to(row_sq_ptr.dtype.element_ty))
    tl.store(weight_ptr + offs, w.to(weight_ptr.dtype.element_ty), mask_d)
    if shadow_ptr is not None:
        tl.store(shadow_ptr + offs, w.to(shadow_ptr.dtype.element_ty), mask_d)


@torch.no_grad()
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
    """See `torch_optim.tangent_momentum_`. Raises ValueError as `apply_rows_` does."""
    check_contiguous(weight=weight, exp_avg=exp_avg)
    m, d = grad.shape
    direction = torch.empty_like(exp_avg, dtype=dtype)
    if m and d:
        block, warps = row_tile(d)
        with torch.cuda.device_of(weight):
            tangent_momentum_kernel[m,](
                weight, grad.contiguous(), exp_avg, direction, grad_scale, d, beta, 1 - beta,
                unit_norm, block, sum_type(weight), num_warps=warps,
            )  # fmt: skip
    torch.autograd.graph.increment_version(exp_avg)
    return direction


@torch.no_grad()
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
    """See `torch_optim.apply_rows_`.

    Computed in float32, or in float64 if the weight has it, with the scalars rounded to float32.
    Raises ValueError if a tensor to be written is not contiguous.
    """
    check_contiguous(weight=weight, row_sq=row_sq, shadow=shadow)
    m, d = weight.shape
    if m and d:
        block, warps = row_tile(d)
        with torch.cuda.device_of(weight):
            apply_rows_kernel[m,](
                weight, update.contiguous(), row_sq, shadow, d, lr, 1 - beta, bias_correction, eps,
                unit_norm, block, sum_type(weight), num_warps=warps,
            )  # fmt: skip
    for written in (weight, row_sq, shadow):
        if written is not None:  # autograd does not see it, and must refuse a late backward
            torch.autograd.graph.increment_version(written)
