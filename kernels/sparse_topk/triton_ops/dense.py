"""What goes through torch.mm (cuBLAS), in pieces of bounded memory.

Where latents are few against K, as AuxK's dead ones are, K rows gathered for each token cost more
than a product with all latents. `few_latents` tells, and the verbs of `sparse.py` then become

    gather_sum      codes W                 codes (N, M): values at indices, 0 elsewhere
    gather_dot      x Wᵀ, at indices
    scatter_outer   codesᵀ x

each a piece of the (N, M) matrix at a time. Sums are in float32 and in a fixed order; float32
factors are cut to TF32 only where torch's own switch allows it. As in any dense product, 0 times
what is not finite is NaN.

Legend: N tokens, D inputs, M latents, K active latents a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_ops import LatentOrder

_BYTES = 256 * 2**20  # of a piece of the (N, M) matrix and of its product
_RATES = {torch.float32: 60e12, torch.float16: 790e12, torch.bfloat16: 790e12}  # flop/s


def few_latents(n: int, d: int, m: int, k: int, dtype: torch.dtype) -> bool:
    """Whether a product with all M latents takes less time than K rows gathered for each token.

    gather   K D numbers through the L2 cache, at 5 TB/s
    dense    2 M D flop at 790 TF/s, in float32 60 (without TF32), and through memory at 4.3 TB/s
             M numbers of the codes, written and read, and a share of W, M D / N

    In half precision with N and D in the thousands that is M < 130 K. Estimated from published
    rates; not yet measured on a GPU.
    """
    if n == 0 or dtype not in _RATES:
        return False
    gather = k * d * dtype.itemsize / 5e12
    return 2 * m * d / _RATES[dtype] + (2 * m + m * d / n) * dtype.itemsize / 4.3e12 < gather


def pieces(length: int, row_bytes: int, most_bytes: int) -> Iterator[slice]:
    """Slices that cover `length` rows, each of at most `most_bytes` and a multiple of 128 rows
    where it can be."""
    step = max(1, most_bytes // row_bytes)
    step = step // 128 * 128 or step
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right as float32: (I, J), (J, L) → (I, L)."""
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    if not left.is_cuda:  # the interpreter's case: torch has the mixed product on CUDA only
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32)


@triton.jit
def _add_codes(row, column, value, valid):  # type: ignore[no-untyped-def]
    """row[column] += value where valid; elsewhere, value is 0 or column no valid one's. Values of
    equal columns are summed first, and all of these store the sum: any may be the last to do so."""
    same = column[:, None] == column[None, :]
    total = tl.sum(tl.where(same, value[:, None], 0.0), 0)  # along what one thread holds
    total += tl.load(row + column, valid, other=0.0).to(tl.float32)
    tl.debug_barrier()  # all have read before one writes, and have written before one reads
    tl.store(row + column, total.to(row.dtype.element_ty), valid)
    tl.debug_barrier()


@triton.jit
def codes_of_token_kernel(  # type: ignore[no-untyped-def]
    values,  # (N, K)
    indices,  # (N, K)
    codes,  # (N, M) out, zero
    M,
    K,
    BLOCK: tl.constexpr,
):
    """Write the values of one token where they belong."""
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        latent = tl.load(indices + token * K + k, k < K, other=-1)
        value = tl.load(values + token * K + k, k < K, other=0.0).to(tl.float32)
        valid = (latent >= 0) & (latent < M)
        column = tl.where(valid, latent, -1).to(tl.int32)
        _add_codes(codes + token * M, column, value, valid)


@triton.jit
def codes_of_latent_kernel(  # type: ignore[no-untyped-def]
    values,  # (N, K)
    order,  # (N·K,)
    offsets,  # (rows + 1,), those of the latents whose rows these are
    codes,  # (rows, N) out, zero
    N,
    K,
    BLOCK: tl.constexpr,
):
    """Write the values of one latent where they belong."""
    latent = tl.program_id(0).to(tl.int64)
    last = tl.load(offsets + latent + 1)
    for first in range(tl.load(offsets + latent), last, BLOCK):
        place = first + tl.arange(0, BLOCK)
        at = tl.load(order + place, place < last, other=0)
        value = tl.load(values + at, place < last, other=0.0).to(tl.float32)
        _add_codes(codes + latent * N, (at // K).to(tl.int32), value, place < last)


def gather_sum(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n] = Σ_k values[n, k] · W[indices[n, k]]. (N, K), (N, K), (M, D) → (N, D)."""
    n, (m, d) = len(indices), W.shape
    out = W.new_empty(n, d)
    for rows in pieces(n, m * W.element_size() + 4 * d, _BYTES):
        out[rows] = product(_codes_of_tokens(values[rows], indices[rows], m), W)
    return out


def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n, k] = x[n] · W[indices[n, k]]. (N, D), (N, K), (M, D) → (N, K)."""
    out = x.new_empty(indices.shape)
    for rows in pieces(len(x), 4 * len(W), _BYTES):
        out[rows] = product(x[rows], W.T).gather(1, indices[rows])
    return out


def scatter_outer(values: Tensor, order: LatentOrder, x: Tensor) -> Tensor:
    """out[m] = Σ values[n, k] · x[n] over the (n, k) that chose m. (N, K), (N, D) → (M, D)."""
    (n, d), m = x.shape, len(order.offsets) - 1
    out = x.new_empty(m, d)
    for rows in pieces(m, n * x.element_size() + 4 * d, _BYTES):
        out[rows] = product(_codes_of_latents(values, order, rows), x)
    return out


def _codes_of_tokens(values: Tensor, indices: Tensor, m: int) -> Tensor:
    """The codes as a dense (N, M), in the dtype of the values."""
    n, k = indices.shape
    codes = values.new_zeros(n, m)
    block, warps = codes_tile()
    with torch.cuda.device_of(values):
        codes_of_token_kernel[n,](values, indices, codes, m, k, block, num_warps=warps)
    return codes


def _codes_of_latents(values: Tensor, order: LatentOrder, rows: slice) -> Tensor:
    """Some rows of the codes' transpose, (rows, N)."""
    n, k = values.shape
    codes = values.new_zeros(rows.stop - rows.start, n)
    offsets = order.offsets[rows.start : rows.stop + 1]
    block, warps = codes_tile()
    with torch.cuda.device_of(values):
        codes_of_latent_kernel[len(codes),](
            values, order.order, offsets, codes, n, k, block, num_warps=warps
        )
    return codes


def codes_tile() -> tuple[int, int]:
    """Values that a program writes at a time, all compared with one another, and its warps: one, so
    that its barriers cost nothing. From compiled code; not yet measured on a GPU."""
    return 32, 1
