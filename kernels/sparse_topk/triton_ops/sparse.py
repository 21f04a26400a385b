"""The sparse products in Triton: they gather rows of a weight by latent, and rows of x by token.

All are bound by memory: a thread reads 16 bytes of a row at a time, with several rows under way.
Sums are in float32 (in float64 if an argument is), in a fixed order and without atomics, so a
result is the same bits every time. Nothing here waits for the device. K is an argument and not a
constant of the kernels, since each value of a constant would be compiled anew.

In half precision the tiles of `gather_sum` and `scatter_outer` were the fastest on one H100
(2026-11-26, torch 2.11, Triton 3.6, ec756b1, bf16). All others are from the cost model, not timed.

Legend: N tokens, D inputs, M latents, K active latents per token, C selections per chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_ops import CSC, csc_by_latent
from .precision import sum_type

__all__ = ["CSC", "csc_by_latent", "gather_dot", "gather_sum", "scatter_outer", "sum_by_latent"]

CHUNK = 128
"""Selections per chunk, at least (C); a power of two. Of many, a program sums one chunk."""

_PARTIAL_BYTES = 256 * 2**20  # of the chunks' sums


@triton.jit
def gather_sum_kernel(
    values_ptr,  # (N, K)
    indices_ptr,  # (N, K)
    W_ptr,  # (M, D)
    out_ptr,  # (N, D) out
    D,
    K,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # rows of W loaded at a time
    ACC_DTYPE: tl.constexpr,
):
    """One program sums the K chosen rows of W of one token, in one block of columns."""
    pid_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], ACC_DTYPE)
    for start_k in range(0, K, ROWS):
        offs_k = start_k + tl.arange(0, ROWS)
        indices = tl.load(indices_ptr + pid_n * K + offs_k, offs_k < K, other=0).to(tl.int64)
        values = tl.load(values_ptr + pid_n * K + offs_k, offs_k < K, other=0.0).to(ACC_DTYPE)
        mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
        W = tl.load(W_ptr + indices[:, None] * D + offs_d[None, :], mask, other=0.0).to(ACC_DTYPE)
        acc += tl.sum(values[:, None] * W, 0)
    tl.store(out_ptr + pid_n * D + offs_d, acc.to(out_ptr.dtype.element_ty), offs_d < D)


@triton.jit
def gather_dot_kernel(
    x_ptr,  # (N, D)
    indices_ptr,  # (N, K)
    W_ptr,  # (M, D)
    out_ptr,  # (N, K) out
    D,
    K,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # rows of W loaded at a time
    ACC_DTYPE: tl.constexpr,
):
    """One program multiplies one token with ROWS of its chosen rows of W."""
    pid_n = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    indices = tl.load(indices_ptr + pid_n * K + offs_k, offs_k < K, other=0).to(tl.int64)
    acc = tl.zeros([ROWS, BLOCK_D], ACC_DTYPE)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + pid_n * D + offs_d, offs_d < D, other=0.0).to(ACC_DTYPE)
        W = tl.load(W_ptr + indices[:, None] * D + offs_d[None, :], mask, other=0.0).to(ACC_DTYPE)
        acc += x[None, :] * W
    tl.store(out_ptr + pid_n * K + offs_k, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), offs_k < K)


@triton.jit
def _sum_selections(offs, mask, values_ptr, perm_ptr, x_ptr, offs_d, D, K, ACC_DTYPE: tl.constexpr):
    """Σ values · x over the selections perm[offs] where `mask`, in one block of columns."""
    perm = tl.load(perm_ptr + offs, mask, other=0).to(tl.int64)
    values = tl.load(values_ptr + perm, mask, other=0.0).to(ACC_DTYPE)
    mask_x = mask[:, None] & (offs_d < D)[None, :]
    x = tl.load(x_ptr + (perm // K)[:, None] * D + offs_d[None, :], mask_x, other=0.0).to(ACC_DTYPE)
    return tl.sum(values[:, None] * x, 0)


@triton.jit
def _end_of_run(indptr_ptr, M, start):
    """indptr[m + 1] of the latent m whose run holds the selection `start`: the least above `start`.
    A warp compares 32 places at a time, so that there are few loads one after the other."""
    low = start * 0  # always: indptr[low] <= start < indptr[low + width]
    width = start * 0 + M
    while width > 1:
        step = (width + 31) // 32
        steps = (tl.arange(0, 32) + 1) * step
        below = steps < width
        ends = tl.load(indptr_ptr + low + steps, below, other=0)
        passed = tl.sum((below & (ends <= start)).to(tl.int32), 0) * step
        low += passed
        width = tl.minimum(step, width - passed)
    return tl.load(indptr_ptr + low + 1)


@triton.jit
def sum_chunks_kernel(
    values_ptr,  # (N, K)
    perm_ptr,  # (N·K,)
    indptr_ptr,  # (M + 1,)
    x_ptr,  # (N, D)
    partials_ptr,  # (N·K // C, D) out
    D,
    K,
    M,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # rows of x loaded at a time
    ACC_DTYPE: tl.constexpr,
):
    """One program sums one chunk of `perm`, in one block of columns, if the chunk belongs to a
    single latent."""
    pid = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = pid * CHUNK
    end = start + CHUNK
    if _end_of_run(indptr_ptr, M, start) >= end:
        acc = tl.zeros([BLOCK_D], ACC_DTYPE)
        for row in range(0, CHUNK, ROWS):
            offs = start + row + tl.arange(0, ROWS)
            acc += _sum_selections(
                offs, offs < end, values_ptr, perm_ptr, x_ptr, offs_d, D, K, ACC_DTYPE
            )
        tl.store(partials_ptr + pid * D + offs_d, acc, offs_d < D)


@triton.jit
def scatter_outer_kernel(
    values_ptr,  # (N, K)
    perm_ptr,  # (N·K,)
    indptr_ptr,  # (M + 1,)
    x_ptr,  # (N, D)
    partials_ptr,  # (N·K // C, D)
    out_ptr,  # (M, D) out, or in and out if ADD
    D,
    K,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # rows of x loaded at a time
    ACC_DTYPE: tl.constexpr,
    ADD: tl.constexpr,  # to the output, leaving latents that no token chose
):
    """One program sums the selections of one latent, in one block of columns: first those outside
    its whole chunks, then the chunks, which `sum_chunks_kernel` has summed."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(indptr_ptr + pid_m)
    end = tl.load(indptr_ptr + pid_m + 1)
    if not ADD or start < end:
        first_chunk = (start + CHUNK - 1) // CHUNK
        end_chunk = end // CHUNK
        in_chunks = tl.maximum(end_chunk - first_chunk, 0) * CHUNK
        acc = tl.zeros([BLOCK_D], ACC_DTYPE)
        for row in range(start, end - in_chunks, ROWS):
            offs = row + tl.arange(0, ROWS)
            mask = offs < end - in_chunks
            offs += tl.where(offs < first_chunk * CHUNK, 0, in_chunks)
            acc += _sum_selections(offs, mask, values_ptr, perm_ptr, x_ptr, offs_d, D, K, ACC_DTYPE)
        for chunk in range(first_chunk, end_chunk):
            acc += tl.load(partials_ptr + chunk * D + offs_d, offs_d < D, other=0.0)
        if ADD:
            acc += tl.load(out_ptr + pid_m * D + offs_d, offs_d < D, other=0.0).to(ACC_DTYPE)
        tl.store(out_ptr + pid_m * D + offs_d, acc.to(out_ptr.dtype.element_ty), offs_d < D)


def gather_sum(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n] = Σ_k values[n, k] · W[indices[n, k]]. (N, K), (N, K), (M, D) → (N, D)."""
    (n, k), d = indices.shape, W.shape[1]
    values, indices, W = values.contiguous(), indices.contiguous(), W.contiguous()
    out = W.new_empty(n, d)
    block, rows, warps = gather_sum_tile(d, k, W.element_size())
    with torch.cuda.device_of(W):
        gather_sum_kernel[n, triton.cdiv(d, block)](
            values, indices, W, out, d, k, block, rows, sum_type(values, W), num_warps=warps
        )
    return out


def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n, k] = x[n] · W[indices[n, k]]. (N, D), (N, K), (M, D) → (N, K)."""
    (n, k), d = indices.shape, W.shape[1]
    x, indices, W = x.contiguous(), indices.contiguous(), W.contiguous()
    out = x.new_empty(n, k)
    block, rows, warps = gather_dot_tile(W.element_size())
    with torch.cuda.device_of(W):
        gather_dot_kernel[n, triton.cdiv(k, rows)](
            x, indices, W, out, d, k, block, rows, sum_type(x, W), num_warps=warps
        )
    return out


def scatter_outer(
    values: Tensor,
    csc: CSC,
    x: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """out[m] = Σ values[n, k] · x[n] over the (n, k) that chose m; in a fixed order.

    values (N, K), x (N, D) → (M, D) in `dtype`, or x's; zero where no token chose m. If `out` is
    given, in float32 at least, the sums are added to it; rows that no token chose are not touched.

    A latent that many tokens chose is summed by several programs, a chunk of C selections each. The
    sums of chunks that lie within one latent are stored in float32 (in float64 if the sum is),
    (N·K/C, D).
    """
    (n, k), d, m = values.shape, x.shape[1], len(csc.indptr) - 1
    values, x = values.contiguous(), x.contiguous()
    add = out is not None
    if out is None:
        out = x.new_empty(m, d, dtype=dtype)
    elif not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got the strides {out.stride()}")
    acc_dtype, chunk = sum_type(values, x, out), chunk_length(n * k, d)
    partials = x.new_empty(
        n * k // chunk, d, dtype=torch.float64 if acc_dtype == tl.float64 else torch.float32
    )
    with torch.cuda.device_of(x):
        block, rows, warps = sum_chunks_tile(d, x.element_size())
        sum_chunks_kernel[len(partials), triton.cdiv(d, block)](
            values, csc.perm, csc.indptr, x, partials,
            d, k, m, chunk, block, rows, acc_dtype, num_warps=warps,
        )  # fmt: skip
        block, rows, warps = scatter_outer_tile(d, x.element_size())
        scatter_outer_kernel[m, triton.cdiv(d, block)](
            values, csc.perm, csc.indptr, x, partials, out,
            d, k, chunk, block, rows, acc_dtype, add, num_warps=warps,
        )  # fmt: skip
    return out


def sum_by_latent(values: Tensor, indices: Tensor, csc: CSC) -> Tensor:
    """out[m] = Σ values[n, k] over the (n, k) that chose m, in float32 at least; in a fixed order.

    values and indices (N, K) → (M,). Adding at `indices` would be atomic on a GPU, in an order left
    to chance; torch's own sum over the sorted runs is not.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    runs = values.flatten()[csc.perm].to(dtype)
    # `unsafe` leaves out the checks of `offsets`, which would wait for the device.
    return torch.segment_reduce(runs, "sum", offsets=csc.indptr, initial=0, unsafe=True)


def chunk_length(selections: int, d: int) -> int:
    """Selections per chunk: CHUNK, or the power of two at which the chunks' sums take 256 MiB."""
    return max(CHUNK, triton.next_power_of_2(triton.cdiv(selections * d * 4, _PARTIAL_BYTES)))


def gather_sum_tile(d: int, k: int, element_size: int) -> tuple[int, int, int]:
    """Columns, rows at a time and warps of one program."""
    rows = min(8, triton.next_power_of_2(k))
    if element_size == 2:  # H100, D = 512, N = 8192 and 98304
        return 256, rows, 1
    width = _width(d, element_size, 8)
    return width, rows, width * element_size // 512


def gather_dot_tile(element_size: int) -> tuple[int, int, int]:
    """Columns, rows and warps of one program: one warp, so that no sum waits at a barrier."""
    return 512 // element_size, 8, 1


def sum_chunks_tile(d: int, element_size: int) -> tuple[int, int, int]:
    """Columns, rows at a time and warps of one program."""
    width = _width(d, element_size, 8)
    return width, 8, width * element_size // 512


def scatter_outer_tile(d: int, element_size: int) -> tuple[int, int, int]:
    """Columns, rows at a time and warps of one program: fewer rows than a chunk has, since most
    latents have few selections."""
    if element_size == 2:  # H100, D = 512 and 2048; a warp per 128 columns is 5 to 10 times slower
        width = _width(d, element_size, 2)
        return width, 2, width // 256
    width = _width(d, element_size, 8)
    return width, 4, width * element_size // 512


def _width(d: int, element_size: int, most_warps: int) -> int:
    """Columns for 1, 2, 4 or 8 warps of 16 bytes per thread: the width that pads D least; of
    several, the widest."""
    warps = (w for w in (8, 4, 2, 1) if w <= most_warps)
    widths = [w * 512 // element_size for w in warps]
    return min(widths, key=lambda width: triton.cdiv(d, width) * width)
