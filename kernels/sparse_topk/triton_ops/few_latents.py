"""The sparse products where latents are few against K, as AuxK's dead ones are.

There, K rows gathered per token cost more than a product with all latents. If `latents_are_few`
says so, the ops of `sparse.py` become

    gather_sum      codes W                 codes (N, M): values at indices, 0 elsewhere
    gather_dot      x Wᵀ, at indices
    scatter_outer   codesᵀ x

each a segment of the (N, M) matrix at a time. Sums are in float32 and in a fixed order; float32
factors are cut to TF32 only if torch's own switch allows it. As in any dense product, 0 times a
value that is not finite is NaN.

The rates below are published ones, and `codes_tile` is from compiled code. One H100 (2026-11-26,
torch 2.11) multiplied bf16 at 700 to 800 TF/s, copied at 3.0 TB/s, and gathered rows at 5.5 to 7.8
TB/s while they fit its L2 cache and at 2.8 TB/s where they did not.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..matmul import product, segments
from ..torch_ops import CSC

_BYTES = 256 * 2**20  # of a segment of the (N, M) matrix and of its product
_RATES = {torch.float32: 60e12, torch.float16: 790e12, torch.bfloat16: 790e12}  # flop/s


def latents_are_few(n: int, d: int, m: int, k: int, dtype: torch.dtype) -> bool:
    """Whether a product with all M latents takes less time than K rows gathered per token.

    gather   K D numbers through the L2 cache, at 5 TB/s
    dense    2 M D flop at 790 TF/s, in float32 60 (without TF32), and through memory at 4.3 TB/s
             M numbers of the codes, written and read, and a share of W, M D / N

    In half precision with N and D in the thousands that is M < 130 K.
    """
    if n == 0 or dtype not in _RATES:
        return False
    gather = k * d * dtype.itemsize / 5e12
    return 2 * m * d / _RATES[dtype] + (2 * m + m * d / n) * dtype.itemsize / 4.3e12 < gather


@triton.jit
def _add_codes(row_ptr, cols, values, mask):
    """row[cols] += values where `mask`; elsewhere, values are 0, or cols equal no masked one.

    Values of equal columns are summed first, and all of them store the sum, so it does not matter
    which stores last.
    """
    same = cols[:, None] == cols[None, :]
    acc = tl.sum(tl.where(same, values[:, None], 0.0), 0)  # along what one thread holds
    acc += tl.load(row_ptr + cols, mask, other=0.0).to(tl.float32)
    tl.debug_barrier()  # all have read before one writes, and have written before one reads
    tl.store(row_ptr + cols, acc.to(row_ptr.dtype.element_ty), mask)
    tl.debug_barrier()


@triton.jit
def codes_of_token_kernel(
    values_ptr,  # (N, K)
    indices_ptr,  # (N, K)
    codes_ptr,  # (N, M) out, zero
    M,
    K,
    BLOCK: tl.constexpr,
):
    """One program writes the values of one token into its row of the codes."""
    pid = tl.program_id(0).to(tl.int64)
    for start in range(0, K, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        indices = tl.load(indices_ptr + pid * K + offs_k, offs_k < K, other=-1)
        values = tl.load(values_ptr + pid * K + offs_k, offs_k < K, other=0.0).to(tl.float32)
        mask = (indices >= 0) & (indices < M)
        cols = tl.where(mask, indices, -1).to(tl.int32)
        _add_codes(codes_ptr + pid * M, cols, values, mask)


@triton.jit
def codes_of_latent_kernel(
    values_ptr,  # (N, K)
    perm_ptr,  # (N·K,)
    indptr_ptr,  # (R + 1,), of the R latents whose rows these are
    codes_ptr,  # (R, N) out, zero
    N,
    K,
    BLOCK: tl.constexpr,
):
    """One program writes the values of one latent into its row of the transposed codes."""
    pid = tl.program_id(0).to(tl.int64)
    end = tl.load(indptr_ptr + pid + 1)
    for start in range(tl.load(indptr_ptr + pid), end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        perm = tl.load(perm_ptr + offs, offs < end, other=0)
        values = tl.load(values_ptr + perm, offs < end, other=0.0).to(tl.float32)
        _add_codes(codes_ptr + pid * N, (perm // K).to(tl.int32), values, offs < end)


def gather_sum(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n] = Σ_k values[n, k] · W[indices[n, k]]. (N, K), (N, K), (M, D) → (N, D)."""
    n, (m, d) = len(indices), W.shape
    out = W.new_empty(n, d)
    for rows in segments(n, m * W.element_size() + 4 * d, _BYTES):
        out[rows] = product(_codes_of_tokens(values[rows], indices[rows], m), W)
    return out


def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n, k] = x[n] · W[indices[n, k]]. (N, D), (N, K), (M, D) → (N, K)."""
    out = x.new_empty(indices.shape)
    for rows in segments(len(x), 4 * len(W), _BYTES):
        out[rows] = product(x[rows], W.T).gather(1, indices[rows])
    return out


def scatter_outer(values: Tensor, csc: CSC, x: Tensor) -> Tensor:
    """out[m] = Σ values[n, k] · x[n] over the (n, k) that chose m. (N, K), (N, D) → (M, D)."""
    (n, d), m = x.shape, len(csc.indptr) - 1
    out = x.new_empty(m, d)
    for rows in segments(m, n * x.element_size() + 4 * d, _BYTES):
        out[rows] = product(_codes_of_latents(values, csc, rows), x)
    return out


def _codes_of_tokens(values: Tensor, indices: Tensor, m: int) -> Tensor:
    """The codes as a dense (N, M), in the dtype of the values."""
    n, k = indices.shape
    codes = values.new_zeros(n, m)
    block, warps = codes_tile()
    with torch.cuda.device_of(values):
        codes_of_token_kernel[n,](values, indices, codes, m, k, block, num_warps=warps)
    return codes


def _codes_of_latents(values: Tensor, csc: CSC, rows: slice) -> Tensor:
    """The transposed codes of the latents `rows`: (R, N), in the dtype of the values."""
    n, k = values.shape
    codes = values.new_zeros(rows.stop - rows.start, n)
    indptr = csc.indptr[rows.start : rows.stop + 1]
    block, warps = codes_tile()
    with torch.cuda.device_of(values):
        codes_of_latent_kernel[len(codes),](
            values, csc.perm, indptr, codes, n, k, block, num_warps=warps
        )
    return codes


def codes_tile() -> tuple[int, int]:
    """Values that a program writes at a time, all compared with one another, and its warps: one, so
    that its barriers cost nothing."""
    return 32, 1
