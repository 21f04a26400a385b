"""Standardize, center and round in Triton, with the moments of x: x is read once.

Bound by memory: a token costs its D numbers of x and D of the result, and D · 12 / R bytes of the
moments of blocks. Nothing waits for the device, and all sums are in a fixed order.

Legend: L layers, N tokens per layer, D inputs, R tokens per block, B blocks per layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_residuals import TokenMoments
from .moments import block_length, empty_blocks, merge_blocks, store_block
from .precision import sum_type

__all__ = ["standardize"]


@triton.jit
def _deviations(x, mean, in_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x − mean of each row, and 0 beyond D."""
    deviations = x - mean[:, None]
    if D < BLOCK_D:
        deviations = tl.where(in_row, deviations, 0.0)
    return deviations


@triton.jit
def standardize_kernel(
    x_ptr,  # (L, N, D)
    center_ptr,  # (D,) or None
    mask_ptr,  # (N,) or None
    centered_ptr,  # (L·N, D) out
    mean_ptr,  # (L·N,) out
    std_ptr,  # (L·N,) out
    block_mean_ptr,  # (L, B, D) out
    block_sq_dev_ptr,  # (L, B, D) out
    N,
    D: tl.constexpr,
    EPS: tl.constexpr,  # or None: nothing is standardized
    R: tl.constexpr,
    ROWS: tl.constexpr,  # tokens loaded at a time
    BLOCK_D: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """One program standardizes one block of tokens of one layer, all columns at once, and sums the
    block's moments."""
    pid_b, pid_l = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    in_row = (offs_d < D)[None, :]
    center = tl.zeros([BLOCK_D], ACC_DTYPE)
    if center_ptr is not None:
        center += tl.load(center_ptr + offs_d, offs_d < D, other=0.0).to(ACC_DTYPE)
    count = tl.zeros([], ACC_DTYPE)
    origin = tl.zeros([BLOCK_D], ACC_DTYPE)
    sum_ = tl.zeros([BLOCK_D], ACC_DTYPE)
    sq_sum = tl.zeros([BLOCK_D], ACC_DTYPE)
    for start in range(0, R, ROWS):
        offs_n = pid_b * R + start + tl.arange(0, ROWS)
        inside = offs_n < N
        keep = inside
        if mask_ptr is not None:
            keep &= tl.load(mask_ptr + offs_n, inside, other=0).to(tl.int1)
        rows = pid_l * N + offs_n
        offs = rows[:, None] * D + offs_d[None, :]
        x = tl.load(x_ptr + offs, keep[:, None] & in_row, other=0.0).to(ACC_DTYPE)
        kept = keep.to(ACC_DTYPE)
        mean = tl.zeros([ROWS], ACC_DTYPE)
        std = tl.full([ROWS], 1.0, ACC_DTYPE)
        standardized = x
        if EPS is not None:
            mean = tl.sum(x, 1) / D
            deviations = _deviations(x, mean, in_row, D, BLOCK_D)
            mean += tl.sum(deviations, 1) / D  # it was off by a rounding
            deviations = _deviations(x, mean, in_row, D, BLOCK_D)
            std = tl.sqrt(tl.sum(deviations * deviations, 1) / (D - 1))
            standardized = deviations * (1.0 / (std + EPS))[:, None]
        # Where a token is not kept, x is 0 here; what is subtracted from it must be too.
        centered = standardized - kept[:, None] * center[None, :]
        centered = centered.to(centered_ptr.dtype.element_ty)
        tl.store(centered_ptr + offs, centered, inside[:, None] & in_row)
        tl.store(mean_ptr + rows, mean, inside)
        tl.store(std_ptr + rows, std, inside)
        n_kept = tl.sum(kept, 0)
        if count == 0:
            origin = tl.sum(x, 0) / tl.maximum(n_kept, 1.0)
        shifted = x - kept[:, None] * origin[None, :]
        sum_ += tl.sum(shifted, 0)
        sq_sum += tl.sum(shifted * shifted, 0)
        count += n_kept
    row = pid_l * tl.num_programs(0) + pid_b
    store_block(block_mean_ptr, block_sq_dev_ptr, row, offs_d, D, count, origin, sum_, sq_sum)


def standardize(
    x: Tensor, center: Tensor | None, mask: Tensor | None, dtype: torch.dtype, eps: float | None
) -> tuple[Tensor, Tensor, Tensor, TokenMoments]:
    """See `torch_residuals.standardize`."""
    (n_layers, n, d), x = x.shape, x.contiguous()
    center = None if center is None else center.contiguous()
    mask = None if mask is None else mask.contiguous()
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    centered = x.new_empty(n_layers * n, d, dtype=dtype)
    mean = x.new_empty(n_layers * n, dtype=acc_dtype)
    std = torch.empty_like(mean)
    tokens, rows, block, warps = standardize_tile(n_layers * n, d)
    means, sq_devs = empty_blocks(x, acc_dtype, tokens)
    with torch.cuda.device_of(x):
        if n:
            standardize_kernel[means.shape[1], n_layers](
                x, center, mask, centered, mean, std, means, sq_devs,
                n, d, eps, tokens, rows, block, sum_type(x), num_warps=warps,
            )  # fmt: skip
        _, moments = merge_blocks(mask, n, tokens, means, sq_devs)
    return centered, mean, std, moments


def standardize_tile(tokens: int, d: int) -> tuple[int, int, int, int]:
    """Tokens per block (R), tokens at a time, columns and warps of one program: a whole row, 8
    columns per thread; 16 above D = 4096, whose threads have few registers. Small blocks keep all
    of a GPU busy, large ones store fewer moments. From the cost model and compiled code, not
    timed."""
    block = triton.next_power_of_2(d)
    rows, per_thread = (2, 8) if block <= 4096 else (1, 16)
    warps = max(1, min(32, block // (32 * per_thread)))
    return block_length(tokens * warps, 64), rows, block, warps
