"""What a training step keeps count of, one launch each: which latents are active, and moments.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_residuals import TokenMoments

__all__ = ["merge_moments", "note_active_"]


@triton.jit
def note_active_kernel(
    last_active_ptr,  # (M,) int64, in and out
    values_ptr,  # (L·N, K)
    indices_ptr,  # (L·N, K)
    mask_ptr,  # (N,) or None
    threshold,
    now,
    size,  # L·N·K
    N,
    K,
    BLOCK: tl.constexpr,
):
    """One program looks at BLOCK selections. Several may store to one place: all the same."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    is_active = tl.load(values_ptr + offs, inside, other=0.0).to(tl.float32) > threshold
    if mask_ptr is not None:
        is_active &= tl.load(mask_ptr + offs // K % N, inside, other=0).to(tl.int1)
    indices = tl.load(indices_ptr + offs, inside & is_active, other=0)
    tl.store(last_active_ptr + indices, tl.zeros([BLOCK], tl.int64) + now, inside & is_active)


@triton.jit
def merge_moments_kernel(
    n_a_ptr,  # ()
    mean_a_ptr,  # (L·D,), as are all below of these names
    sq_dev_a_ptr,
    n_b_ptr,  # ()
    mean_b_ptr,
    sq_dev_b_ptr,
    n_ptr,  # () out
    mean_ptr,  # out
    sq_dev_ptr,  # out
    size,  # L·D
    BLOCK: tl.constexpr,
):
    """One program merges BLOCK dimensions of two moments, in float64."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    n_a, n_b = tl.load(n_a_ptr), tl.load(n_b_ptr)
    share = n_b / tl.maximum(n_a + n_b, 1.0)
    mean = tl.load(mean_a_ptr + offs, inside, other=0.0)
    delta = tl.load(mean_b_ptr + offs, inside, other=0.0) - mean
    sq_dev = tl.load(sq_dev_a_ptr + offs, inside, other=0.0)
    sq_dev += tl.load(sq_dev_b_ptr + offs, inside, other=0.0) + delta * delta * (n_a * share)
    tl.store(mean_ptr + offs, mean + delta * share, inside)
    tl.store(sq_dev_ptr + offs, sq_dev, inside)
    if tl.program_id(0) == 0:
        tl.store(n_ptr, n_a + n_b)


def note_active_(
    last_active: Tensor,
    values: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    threshold: float,
    now: int,
) -> None:
    """See `torch_residuals.note_active_`."""
    values, indices = values.contiguous(), indices.contiguous()
    mask = None if mask is None else mask.contiguous()
    size, n = values.numel(), len(values) if mask is None else len(mask)
    if not size:
        return
    block, warps = note_active_tile()
    with torch.cuda.device_of(values):
        note_active_kernel[triton.cdiv(size, block),](
            last_active, values, indices, mask, threshold, now, size, n, values.shape[1],
            block, num_warps=warps,
        )  # fmt: skip


def merge_moments(a: TokenMoments, b: TokenMoments) -> TokenMoments:
    """See `torch_residuals.merge_moments`."""
    a, b = (TokenMoments(*(t.contiguous() for t in m)) for m in (a, b))
    merged = TokenMoments(*map(torch.empty_like, a))
    size, (block, warps) = a.mean.numel(), merge_moments_tile()
    with torch.cuda.device_of(a.mean):
        merge_moments_kernel[max(1, triton.cdiv(size, block)),](
            *a, *b, *merged, size, block, num_warps=warps
        )
    return merged


def note_active_tile() -> tuple[int, int]:
    """Selections and warps of one program: 8 per thread. From the cost model, not timed."""
    return 1024, 4


def merge_moments_tile() -> tuple[int, int]:
    """Dimensions and warps of one program. From the cost model, not timed."""
    return 256, 4
