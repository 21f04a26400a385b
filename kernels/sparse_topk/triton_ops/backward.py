"""From the error back to the scores, in one pass: `gather_dot` with an epilogue.

The gradient with respect to the decoder's output is a number per token times the error, so it is
never stored: the number goes into what is as small as the codes.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import sum_type
from .sparse import gather_dot_tile

__all__ = ["decode_backward"]


@triton.jit
def decode_backward_kernel(
    error_ptr,  # (L·N, D)
    indices_ptr,  # (L·N, K)
    W_ptr,  # (M, D)
    values_ptr,  # (L·N, K)
    std_ptr,  # (L·N,)
    factor_ptr,  # (L,)
    d_scores_ptr,  # (L·N, K) out
    scaled_ptr,  # (L·N, K) out
    scale_ptr,  # (L·N,) out
    N,
    D,
    K,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # rows of W loaded at a time
    ACC_DTYPE: tl.constexpr,
):
    """One program takes one token and ROWS of its chosen rows of W."""
    pid_n = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    indices = tl.load(indices_ptr + pid_n * K + offs_k, offs_k < K, other=0).to(tl.int64)
    values = tl.load(values_ptr + pid_n * K + offs_k, offs_k < K, other=0.0).to(ACC_DTYPE)
    acc = tl.zeros([ROWS, BLOCK_D], ACC_DTYPE)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
        error = tl.load(error_ptr + pid_n * D + offs_d, offs_d < D, other=0.0).to(ACC_DTYPE)
        W = tl.load(W_ptr + indices[:, None] * D + offs_d[None, :], mask, other=0.0).to(ACC_DTYPE)
        acc += error[None, :] * W
    std = tl.load(std_ptr + pid_n).to(ACC_DTYPE)
    scale = -2.0 * tl.load(factor_ptr + pid_n // N).to(ACC_DTYPE)
    scale *= std * (std + EPS) if EPS is not None else std
    # ReLU's backward: 0 where values <= 0, a test that passes NaN on.
    d_scores = tl.where(values <= 0, 0.0, scale * tl.sum(acc, 1))
    offs, inside = pid_n * K + offs_k, offs_k < K
    tl.store(d_scores_ptr + offs, d_scores.to(d_scores_ptr.dtype.element_ty), inside)
    tl.store(scaled_ptr + offs, (scale * values).to(scaled_ptr.dtype.element_ty), inside)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + pid_n, scale.to(scale_ptr.dtype.element_ty))


def decode_backward(
    error: Tensor,
    indices: Tensor,
    W: Tensor,
    values: Tensor,
    std: Tensor,
    factor: Tensor,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_ops.decode_backward`."""
    error, indices, W = error.contiguous(), indices.contiguous(), W.contiguous()
    values, std, factor = values.contiguous(), std.contiguous(), factor.contiguous()
    (n, k), d = indices.shape, W.shape[1]
    d_scores, scaled = torch.empty_like(values), torch.empty_like(values)
    scale = error.new_empty(n)
    block, rows, warps = gather_dot_tile(W.element_size())
    acc_dtype = sum_type(error, W, std)
    with torch.cuda.device_of(W):
        decode_backward_kernel[n, triton.cdiv(k, rows)](
            error, indices, W, values, std, factor, d_scores, scaled, scale,
            n // len(factor), d, k, eps, block, rows, acc_dtype, num_warps=warps,
        )  # fmt: skip
    return d_scores, scaled, scale
