"""Moments of tokens, from those of blocks: the end of `standardize` and of `decode_error`.

A block's sums are in float32 (in float64 if x is), about its first kept token. So they lose nothing
to a large mean, and to a first token far from the others only as many times a rounding as there are
tokens in the block. Blocks are merged in float64, in a fixed order.

Legend: L layers, N tokens per layer, D inputs, R tokens per block, B blocks per layer, C blocks of
columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_residuals import TokenMoments


@triton.jit
def store_block(
    block_mean_ptr,  # (L, B, D) out
    block_sq_dev_ptr,  # (L, B, D) out
    row,  # int64, of (L·B, D)
    offs_d,
    D,
    count,  # kept tokens
    origin,
    sum_,  # Σ (value − origin)
    sq_sum,  # Σ (value − origin)²
):
    """Store the mean of a block's tokens and their squared deviation from it."""
    shift = sum_ / tl.maximum(count, 1.0)
    offs = row * D + offs_d
    tl.store(block_mean_ptr + offs, origin.to(tl.float64) + shift.to(tl.float64), offs_d < D)
    tl.store(block_sq_dev_ptr + offs, sq_sum - sum_ * shift, offs_d < D)


@triton.jit
def _counts(mask_ptr, offs_b, N, R: tl.constexpr):
    """How many tokens of the blocks `offs_b` are kept, in float64."""
    if mask_ptr is None:
        counts = tl.minimum(tl.maximum(N - offs_b * R, 0), R)
    else:
        offs_n = offs_b[:, None] * R + tl.arange(0, R)[None, :]
        counts = tl.sum(tl.load(mask_ptr + offs_n, offs_n < N, other=0).to(tl.int32), 1)
    return counts.to(tl.float64)


@triton.jit
def merge_blocks_kernel(
    mask_ptr,  # (N,) or None
    block_mean_ptr,  # (L, B, D)
    block_sq_dev_ptr,  # (L, B, D)
    block_sq_error_ptr,  # (L, B·C) or None
    n_tokens_ptr,  # () out
    mean_ptr,  # (L, D) out
    sq_dev_ptr,  # (L, D) out
    sq_error_ptr,  # (L,) out, or None
    N,
    D,
    BC,  # B · C
    R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program merges the blocks of one layer, in one block of columns; the first of a layer
    also sums its squared errors."""
    pid_l = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    B = tl.cdiv(N, R)
    n_tokens = tl.zeros([BLOCK_B], tl.float64)
    total = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        inside = (offs_b < B)[:, None] & (offs_d < D)[None, :]
        offs = (pid_l * B + offs_b)[:, None] * D + offs_d[None, :]
        counts = _counts(mask_ptr, offs_b, N, R)
        n_tokens += counts
        total += tl.sum(counts[:, None] * tl.load(block_mean_ptr + offs, inside, other=0.0), 0)
    n = tl.sum(n_tokens, 0)
    mean = total / tl.maximum(n, 1.0)
    sq_dev = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        inside = (offs_b < B)[:, None] & (offs_d < D)[None, :]
        offs = (pid_l * B + offs_b)[:, None] * D + offs_d[None, :]
        counts = _counts(mask_ptr, offs_b, N, R)
        delta = tl.load(block_mean_ptr + offs, inside, other=0.0) - mean[None, :]
        within = tl.load(block_sq_dev_ptr + offs, inside, other=0.0).to(tl.float64)
        sq_dev += tl.sum(within + counts[:, None] * delta * delta, 0)
    tl.store(mean_ptr + pid_l * D + offs_d, mean, offs_d < D)
    tl.store(sq_dev_ptr + pid_l * D + offs_d, sq_dev, offs_d < D)
    if tl.program_id(1) == 0:
        if pid_l == 0:
            tl.store(n_tokens_ptr, n)
        if sq_error_ptr is not None:
            sq_error = tl.zeros([BLOCK_B * BLOCK_D], tl.float64)
            for start in range(0, BC, BLOCK_B * BLOCK_D):
                offs = start + tl.arange(0, BLOCK_B * BLOCK_D)
                part = tl.load(block_sq_error_ptr + pid_l * BC + offs, offs < BC, other=0.0)
                sq_error += part.to(tl.float64)
            tl.store(sq_error_ptr + pid_l, tl.sum(sq_error, 0))


def empty_blocks(x: Tensor, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """Room for the means (L, B, D), float64, and the squared deviations, of blocks of `tokens`."""
    n_layers, n, d = x.shape
    means = x.new_empty(n_layers, triton.cdiv(n, tokens), d, dtype=torch.float64)
    return means, torch.empty_like(means, dtype=dtype)


def merge_blocks(
    mask: Tensor | None,
    n: int,
    tokens: int,
    means: Tensor,
    sq_devs: Tensor,
    sq_errors: Tensor | None = None,
) -> tuple[Tensor | None, TokenMoments]:
    """Σ of the squared errors (L, B, C) per layer, (L,) float64, if there are any; and the moments
    of all N tokens from those of blocks of `tokens`, (L, B, D)."""
    n_layers, n_blocks, d = means.shape
    n_tokens = means.new_empty(())
    mean = means.new_empty(n_layers, d)
    sq_dev = torch.empty_like(mean)
    sq_error = None if sq_errors is None else means.new_empty(n_layers)
    per_layer = 0 if sq_errors is None else n_blocks * sq_errors.shape[2]
    rows, columns, warps = merge_blocks_tile()
    merge_blocks_kernel[n_layers, triton.cdiv(d, columns)](
        mask, means, sq_devs, sq_errors, n_tokens, mean, sq_dev, sq_error,
        n, d, per_layer, tokens, rows, columns, num_warps=warps,
    )  # fmt: skip
    return sq_error, TokenMoments(n_tokens, mean, sq_dev)


def block_length(warps: int, most: int) -> int:
    """Tokens per block (R), a power of two in [8, most], where blocks of one token would have
    `warps` warps in all: 4096 warps at least, of which an H100 holds some 2600 at a time."""
    return 1 << max(3, min(most, warps // 4096).bit_length() - 1)


def merge_blocks_tile() -> tuple[int, int, int]:
    """Blocks at a time, columns and warps of one program: few columns, 64 bytes of each row at
    least, so that many programs wait for memory at once. From the cost model, not timed."""
    return 128, 16, 8
