"""Decode and compare with x in Triton: x̂ is never stored, and x is read once.

The rows of W are gathered as `sparse.gather_sum` does; what follows costs one read of x and one
write of the error, and D · 12 / R bytes per token of the moments of blocks. Nothing waits for the
device, and all sums are in a fixed order. K is an argument and not a constant, as there.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token, R tokens per
block, B blocks per layer, C blocks of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_residuals import TokenMoments
from .moments import block_length, empty_blocks, merge_blocks, store_block
from .precision import sum_type

__all__ = ["decode_error", "reconstruction_error"]


@triton.jit
def decode_error_kernel(
    values_ptr,  # (L·N, K) or None
    indices_ptr,  # (L·N, K) or None
    W_ptr,  # (M, D); without values (L·N, D), the decoded vectors
    b_ptr,  # (D,) or None
    x_ptr,  # (L, N, D)
    mean_ptr,  # (L·N,)
    std_ptr,  # (L·N,)
    mask_ptr,  # (N,) or None
    error_ptr,  # (L·N, D) out
    block_mean_ptr,  # (L, B, D) out
    block_sq_dev_ptr,  # (L, B, D) out
    block_sq_error_ptr,  # (L, B, C) out
    N,
    D,
    K,
    EPS: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,  # rows of W loaded at a time
    BLOCK_D: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """One program takes one block of tokens of one layer, in one block of columns: it decodes each
    token, stores its error, and sums the squares and the moments."""
    pid_b, pid_d, pid_l = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    count = tl.zeros([], ACC_DTYPE)
    origin = tl.zeros([BLOCK_D], ACC_DTYPE)
    sum_ = tl.zeros([BLOCK_D], ACC_DTYPE)
    sq_sum = tl.zeros([BLOCK_D], ACC_DTYPE)
    sq_error = tl.zeros([BLOCK_D], ACC_DTYPE)
    for n in range(pid_b * R, tl.minimum(pid_b * R + R, N)):
        keep = n < N
        if mask_ptr is not None:
            keep = tl.load(mask_ptr + n).to(tl.int1)
        row = pid_l * N + n
        in_row = offs_d < tl.where(keep, D, 0)  # none, where the token is not kept
        x = tl.load(x_ptr + row * D + offs_d, in_row, other=0.0).to(ACC_DTYPE)
        mean = tl.load(mean_ptr + row).to(ACC_DTYPE)
        std = tl.load(std_ptr + row).to(ACC_DTYPE)
        if values_ptr is None:
            x_hat = tl.load(W_ptr + row * D + offs_d, in_row, other=0.0).to(ACC_DTYPE)
        else:
            x_hat = tl.zeros([BLOCK_D], ACC_DTYPE)
            for start_k in range(0, tl.where(keep, K, 0), ROWS):
                offs_k = start_k + tl.arange(0, ROWS)
                in_k = offs_k < K
                indices = tl.load(indices_ptr + row * K + offs_k, in_k, other=0).to(tl.int64)
                values = tl.load(values_ptr + row * K + offs_k, in_k, other=0.0).to(ACC_DTYPE)
                offs = indices[:, None] * D + offs_d[None, :]
                W = tl.load(W_ptr + offs, in_k[:, None] & mask_d[None, :], other=0.0)
                x_hat += tl.sum(values[:, None] * W.to(ACC_DTYPE), 0)
        if b_ptr is not None:
            x_hat += tl.load(b_ptr + offs_d, mask_d, other=0.0).to(ACC_DTYPE)
        # x − μ first: it is exactly 0 for a constant vector
        missed = tl.where(in_row, (x - mean) - x_hat * std, 0.0)
        sq_error += missed * missed
        error = missed
        if EPS is not None:
            error = missed * (1.0 / (std + EPS))
        tl.store(error_ptr + row * D + offs_d, error.to(error_ptr.dtype.element_ty), mask_d)
        origin = tl.where(keep & (count == 0), error, origin)
        shifted = tl.where(keep, error - origin, 0.0)
        sum_ += shifted
        sq_sum += shifted * shifted
        count += tl.where(keep, 1.0, 0.0)
    block = pid_l * tl.num_programs(0) + pid_b
    store_block(block_mean_ptr, block_sq_dev_ptr, block, offs_d, D, count, origin, sum_, sq_sum)
    tl.store(block_sq_error_ptr + block * tl.num_programs(1) + pid_d, tl.sum(sq_error, 0))


def decode_error(
    values: Tensor,
    indices: Tensor,
    W: Tensor,
    b: Tensor | None,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    mask: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor, TokenMoments]:
    """See `torch_residuals.decode_error`."""
    b = None if b is None else b.contiguous()
    return _launch(values.contiguous(), indices.contiguous(), W, b, x, mean, std, mask, eps)


def reconstruction_error(
    x_hat: Tensor, x: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor, TokenMoments]:
    """See `torch_residuals.reconstruction_error`."""
    return _launch(None, None, x_hat, None, x, mean, std, mask, eps)


def _launch(
    values: Tensor | None,
    indices: Tensor | None,
    W: Tensor,
    b: Tensor | None,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    mask: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor, TokenMoments]:
    (n_layers, n, d), k = x.shape, 1 if indices is None else indices.shape[1]
    W, x, mean, std = W.contiguous(), x.contiguous(), mean.contiguous(), std.contiguous()
    mask = None if mask is None else mask.contiguous()
    error = W.new_empty(n_layers * n, d)
    tokens, rows, columns, warps = decode_error_tile(n_layers * n, d, k, W.element_size())
    acc_dtype = torch.promote_types(torch.promote_types(x.dtype, W.dtype), torch.float32)
    means, sq_devs = empty_blocks(x, acc_dtype, tokens)
    sq_errors = sq_devs.new_empty(n_layers, means.shape[1], triton.cdiv(d, columns))
    with torch.cuda.device_of(x):
        if n:
            decode_error_kernel[means.shape[1], sq_errors.shape[2], n_layers](
                values, indices, W, b, x, mean, std, mask, error, means, sq_devs, sq_errors,
                n, d, k, eps, tokens, rows, columns, sum_type(x, W), num_warps=warps,
            )  # fmt: skip
        sq_error, moments = merge_blocks(mask, n, tokens, means, sq_devs, sq_errors)
    assert sq_error is not None
    return error, sq_error, moments


def decode_error_tile(tokens: int, d: int, k: int, element_size: int) -> tuple[int, int, int, int]:
    """Tokens per block (R), rows of W at a time, columns and warps of one program. Columns, rows
    and warps are those that were best for `gather_sum` in bfloat16 on an H100 (2026-11-26, torch
    2.11, Triton 3.6); R is from the cost model, not timed: small blocks keep all of a GPU busy,
    large ones store fewer moments."""
    columns = min(512 // element_size, triton.next_power_of_2(d))
    tokens_per_block = block_length(tokens * triton.cdiv(d, columns), 32)
    return tokens_per_block, min(8, triton.next_power_of_2(k)), columns, 1
