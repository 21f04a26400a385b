"""The sparse products in Triton: rows of a weight gathered by latent, rows of the tokens likewise.

All are bound by memory: a thread reads 16 bytes of a row at a time, with several rows under way.
Sums are in float32 (in float64 where an argument is), in a fixed order and without atomics, so a
result is the same bits every time. Nothing here waits for the device. K is an argument, not a
constant of the kernels: AuxK's is the number of dead latents while they are few, and every value of
a constant would be compiled anew. Where K rows a token cost more than all latents at once, the
products are dense ones (`dense.py`).

Legend: N tokens, D inputs, M latents, K active latents a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_ops import LatentOrder, order_by_latent
from . import dense
from .dense import few_latents

__all__ = [
    "LatentOrder",
    "gather_dot",
    "gather_sum",
    "order_by_latent",
    "scatter_outer",
    "sum_by_latent",
]

CHUNK = 128
"""Selections summed by one program where a latent has many of them, at least; a power of two."""

_PARTIAL_BYTES = 256 * 2**20  # of the chunks' sums


@triton.jit
def gather_sum_kernel(  # type: ignore[no-untyped-def]
    values,  # (N, K)
    indices,  # (N, K)
    W,  # (M, D)
    out,  # (N, D)
    D,
    K,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Sum the K chosen rows of W for one token, in one block of columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], SUM)
    for first in range(0, K, ROWS):
        k = first + tl.arange(0, ROWS)
        latent = tl.load(indices + token * K + k, k < K, other=0).to(tl.int64)
        value = tl.load(values + token * K + k, k < K, other=0.0).to(SUM)
        mask = (k < K)[:, None] & (column < D)[None, :]
        lines = tl.load(W + latent[:, None] * D + column[None, :], mask, other=0.0).to(SUM)
        total += tl.sum(value[:, None] * lines, 0)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), column < D)


@triton.jit
def gather_dot_kernel(  # type: ignore[no-untyped-def]
    x,  # (N, D)
    indices,  # (N, K)
    W,  # (M, D)
    out,  # (N, K)
    D,
    K,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Multiply one token with ROWS of its chosen rows of W."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    latent = tl.load(indices + token * K + k, k < K, other=0).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK_D], SUM)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        mask = (k < K)[:, None] & (column < D)[None, :]
        left = tl.load(x + token * D + column, column < D, other=0.0).to(SUM)
        right = tl.load(W + latent[:, None] * D + column[None, :], mask, other=0.0).to(SUM)
        total += left[None, :] * right
    tl.store(out + token * K + k, tl.sum(total, 1).to(out.dtype.element_ty), k < K)


@triton.jit
def _sum_selections(place, valid, values, order, x, column, D, K, SUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ values · x over the valid places of `order`, in one block of columns."""
    at = tl.load(order + place, valid, other=0).to(tl.int64)
    value = tl.load(values + at, valid, other=0.0).to(SUM)
    mask = valid[:, None] & (column < D)[None, :]
    lines = tl.load(x + (at // K)[:, None] * D + column[None, :], mask, other=0.0).to(SUM)
    return tl.sum(value[:, None] * lines, 0)


@triton.jit
def sum_chunks_kernel(  # type: ignore[no-untyped-def]
    values,  # (N, K)
    order,  # (N·K,)
    offsets,  # (M + 1,)
    owners,  # (N·K // CHUNK,)
    x,  # (N, D)
    partials,  # (N·K // CHUNK, D)
    D,
    K,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Sum one chunk of `order` in one block of columns, if it belongs to a single latent."""
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = chunk * CHUNK
    last = first + CHUNK
    if tl.load(offsets + tl.load(owners + chunk) + 1) >= last:
        total = tl.zeros([BLOCK_D], SUM)
        for start in range(0, CHUNK, ROWS):
            place = first + start + tl.arange(0, ROWS)
            total += _sum_selections(place, place < last, values, order, x, column, D, K, SUM)
        tl.store(partials + chunk * D + column, total, column < D)


@triton.jit
def scatter_outer_kernel(  # type: ignore[no-untyped-def]
    values,  # (N, K)
    order,  # (N·K,)
    offsets,  # (M + 1,)
    x,  # (N, D)
    partials,  # (N·K // CHUNK, D)
    out,  # (M, D)
    D,
    K,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Sum the selections of one latent in one block of columns: those outside its whole chunks,
    then the chunks, which `sum_chunks_kernel` summed."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(offsets + latent)
    last = tl.load(offsets + latent + 1)
    first_chunk = (first + CHUNK - 1) // CHUNK
    last_chunk = last // CHUNK
    whole = tl.maximum(last_chunk - first_chunk, 0) * CHUNK
    total = tl.zeros([BLOCK_D], SUM)
    for start in range(first, last - whole, ROWS):
        place = start + tl.arange(0, ROWS)
        valid = place < last - whole
        place += tl.where(place < first_chunk * CHUNK, 0, whole)
        total += _sum_selections(place, valid, values, order, x, column, D, K, SUM)
    for chunk in range(first_chunk, last_chunk):
        total += tl.load(partials + chunk * D + column, column < D, other=0.0)
    tl.store(out + latent * D + column, total.to(out.dtype.element_ty), column < D)


def gather_sum(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n] = Σ_k values[n, k] · W[indices[n, k]]. (N, K), (N, K), (M, D) → (N, D)."""
    (n, k), d = indices.shape, W.shape[1]
    values, indices, W = values.contiguous(), indices.contiguous(), W.contiguous()
    if values.dtype == W.dtype and few_latents(n, d, len(W), k, W.dtype):
        return dense.gather_sum(values, indices, W)
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
    if x.dtype == W.dtype and few_latents(n, d, len(W), k, W.dtype):
        return dense.gather_dot(x, indices, W)
    out = x.new_empty(n, k)
    block, rows, warps = gather_dot_tile(W.element_size())
    with torch.cuda.device_of(W):
        gather_dot_kernel[n, triton.cdiv(k, rows)](
            x, indices, W, out, d, k, block, rows, sum_type(x, W), num_warps=warps
        )
    return out


def scatter_outer(values: Tensor, order: LatentOrder, x: Tensor) -> Tensor:
    """out[m] = Σ values[n, k] · x[n] over the (n, k) that chose m; in a fixed order.

    values (N, K), x (N, D) → (M, D), zero where no token chose m. A latent that many tokens chose
    is summed a chunk at a time by several programs. A chunk is C places of the sorted selections;
    those that lie within one latent have their sum stored in float32, (N·K/C, D).
    """
    (n, k), d, m = values.shape, x.shape[1], len(order.offsets) - 1
    values, x = values.contiguous(), x.contiguous()
    if values.dtype == x.dtype and few_latents(n, d, m, k, x.dtype):
        return dense.scatter_outer(values, order, x)
    out = x.new_empty(m, d)
    sums, chunk = sum_type(values, x), chunk_length(n * k, d)
    partials = x.new_empty(
        n * k // chunk, d, dtype=torch.float64 if sums == tl.float64 else torch.float32
    )
    starts = torch.arange(0, len(partials) * chunk, chunk, device=x.device)
    owners = torch.searchsorted(order.offsets, starts, right=True) - 1
    with torch.cuda.device_of(x):
        block, rows, warps = sum_chunks_tile(d, x.element_size())
        sum_chunks_kernel[len(partials), triton.cdiv(d, block)](
            values, order.order, order.offsets, owners, x, partials,
            d, k, chunk, block, rows, sums, num_warps=warps,
        )  # fmt: skip
        block, rows, warps = scatter_outer_tile(d, x.element_size())
        scatter_outer_kernel[m, triton.cdiv(d, block)](
            values, order.order, order.offsets, x, partials, out,
            d, k, chunk, block, rows, sums, num_warps=warps,
        )  # fmt: skip
    return out


def sum_by_latent(values: Tensor, indices: Tensor, order: LatentOrder) -> Tensor:
    """out[m] = Σ values[n, k] over the (n, k) that chose m, in float32 at least; in a fixed order.

    values and indices (N, K) → (M,). Adding at `indices` would be atomic on a GPU, its order by
    chance; torch's own sum over the sorted runs is not.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    runs = values.flatten()[order.order].to(dtype)
    # `unsafe` leaves out the checks of `offsets`, which would wait for the device.
    return torch.segment_reduce(runs, "sum", offsets=order.offsets, initial=0, unsafe=True)


def chunk_length(selections: int, d: int) -> int:
    """Selections a chunk: CHUNK, or the power of two at which their sums take 256 MiB."""
    return max(CHUNK, triton.next_power_of_2(triton.cdiv(selections * d * 4, _PARTIAL_BYTES)))


def gather_sum_tile(d: int, k: int, element_size: int) -> tuple[int, int, int]:
    """Columns, rows under way and warps of one program. From the cost model and compiled code, not
    yet measured on a GPU."""
    width = _width(d, element_size)
    return width, min(8, triton.next_power_of_2(k)), width * element_size // 512


def gather_dot_tile(element_size: int) -> tuple[int, int, int]:
    """Columns, rows and warps of one program: one warp, so that no sum waits at a barrier. From
    the cost model and compiled code, not yet measured on a GPU."""
    return 512 // element_size, 8, 1


def sum_chunks_tile(d: int, element_size: int) -> tuple[int, int, int]:
    """Columns, rows under way and warps of one program. From the cost model and compiled code, not
    yet measured on a GPU."""
    width = _width(d, element_size)
    return width, 8, width * element_size // 512


def scatter_outer_tile(d: int, element_size: int) -> tuple[int, int, int]:
    """Columns, rows under way and warps of one program: fewer rows than a chunk has, since most
    latents have few. From the cost model and compiled code, not yet measured on a GPU."""
    width = _width(d, element_size)
    return width, 4, width * element_size // 512


def _width(d: int, element_size: int) -> int:
    """Columns for 1, 2, 4 or 8 warps of 16 bytes a thread: what pads D least, then the widest."""
    widths = [warps * 512 // element_size for warps in (8, 4, 2, 1)]
    return min(widths, key=lambda width: triton.cdiv(d, width) * width)


def sum_type(*tensors: Tensor) -> tl.dtype:
    """What to add in: float64 if a tensor is of it, else float32."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32
