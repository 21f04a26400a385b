"""AuxK's residual in Triton: what autograd would do in eight passes over (N, D), in one.

Tiles are from the cost model and compiled code, not timed.

Legend: N tokens, D inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import sum_type

__all__ = ["aux_residual"]


@triton.jit
def aux_residual_kernel(
    e_hat_ptr,  # (N, D)
    error_ptr,  # (N, D)
    weight_ptr,  # (N,)
    scale_ptr,  # ()
    sq_error_ptr,  # (N,) out
    d_ptr,  # (N, D) out
    D,
    BLOCK_D: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """One program takes the residual of one token, its square, and its part in the gradient."""
    pid = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + pid).to(ACC_DTYPE)
    factor = tl.where(weight == 0, 0.0, weight / tl.load(scale_ptr).to(ACC_DTYPE))
    sq = tl.zeros([BLOCK_D], ACC_DTYPE)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = offs_d < D
        e_hat = tl.load(e_hat_ptr + pid * D + offs_d, mask, other=0.0).to(ACC_DTYPE)
        error = tl.load(error_ptr + pid * D + offs_d, mask, other=0.0).to(ACC_DTYPE)
        r = tl.where(weight == 0, 0.0, e_hat - error)
        sq += r * r
        tl.store(d_ptr + pid * D + offs_d, (factor * r).to(d_ptr.dtype.element_ty), mask)
    tl.store(sq_error_ptr + pid, tl.sum(sq, 0).to(sq_error_ptr.dtype.element_ty))


def aux_residual(
    e_hat: Tensor, error: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """|r_n|² and weight_n / scale · r_n, where r = ê − error, and 0 where the weight is 0.

    ê and error (N, D), weight (N,), scale () → (N,) in the weight's dtype, (N, D) in the error's.
    """
    e_hat, error, weight = e_hat.contiguous(), error.contiguous(), weight.contiguous()
    n, d = error.shape
    sq_error, d_e_hat = torch.empty_like(weight), torch.empty_like(error)
    block, warps = aux_residual_tile(d)
    with torch.cuda.device_of(error):
        aux_residual_kernel[n,](
            e_hat, error, weight, scale, sq_error, d_e_hat,
            d, block, sum_type(e_hat, error, weight), num_warps=warps,
        )  # fmt: skip
    return sq_error, d_e_hat


def aux_residual_tile(d: int) -> tuple[int, int]:
    """Columns at a time and warps of one program: 8 columns per thread, 16 bytes of the error."""
    block = min(2048, max(256, triton.next_power_of_2(d)))
    return block, block // 256
