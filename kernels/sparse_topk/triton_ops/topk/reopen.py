"""What few rows need: the scores of a group computed again, and the K largest of them and of what
was taken before.

Legend: D inputs, M latents, K active latents per token, G latents per group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import LOWEST, key_of
from .search import middle_of, narrow, smallest_of


@triton.jit
def scores_of(latents, x_ptr, W_ptr, bias_ptr, M, D, BLOCK_D: tl.constexpr):
    """Float32 scores of one token x (D,) for some latents; without meaning past the M-th."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = latents < M
    W_ptrs = W_ptr + latents.to(tl.int64)[:, None] * D + offs_d[None, :]
    acc = tl.zeros((latents.shape[0], BLOCK_D), tl.float32)
    for start_d in tl.range(0, D, BLOCK_D, loop_unroll_factor=2):
        mask_d = offs_d < D - start_d
        W = tl.load(W_ptrs + start_d, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
        x = tl.load(x_ptr + start_d + offs_d, mask=mask_d, other=0.0)
        acc += W.to(tl.float32) * x.to(tl.float32)[None, :]
    scores = tl.sum(acc, 1)
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + latents, mask=mask_m, other=0.0).to(tl.float32)
    return scores


@triton.jit
def count_taken(group, indices_ptr, K, G: tl.constexpr, BLOCK_K: tl.constexpr):
    """How many latents of a group are taken."""
    offs_k = tl.arange(0, BLOCK_K)
    latents = tl.load(indices_ptr + offs_k, mask=offs_k < K, other=-1)
    inside = (latents >= group * G) & (latents < group * G + G)
    return tl.sum(inside.to(tl.int32), 0)


@triton.jit
def open_group(
    group,
    kept_ptr,  # (K,) int32 keys of what is taken, as they are compared; in and out
    indices_ptr,  # (K,) int64 their latents, ascending; in and out
    x_ptr,  # (D,)
    W_ptr,  # (M, D)
    bias_ptr,  # (M,) or None
    M,
    D,
    K,
    G: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
    BLOCK_D: tl.constexpr,
):
    """Replace what is taken by the K largest of it and of all latents of `group`."""
    offs_k = tl.arange(0, BLOCK_K)
    kept = tl.load(kept_ptr + offs_k, mask=offs_k < K, other=LOWEST)
    latents = tl.load(indices_ptr + offs_k, mask=offs_k < K, other=0).to(tl.int32)
    tl.debug_barrier()  # all is read before any is written
    after = latents >= group * G + G
    kept = tl.where((latents >= group * G) & ~after, LOWEST, kept)
    members = group * G + tl.arange(0, G)
    scores = scores_of(members, x_ptr, W_ptr, bias_ptr, M, D, BLOCK_D)
    opened = tl.where(members < M, key_of(scores, RELU) & -G, LOWEST)
    low = tl.minimum(smallest_of(kept), smallest_of(opened))
    high = tl.maximum(tl.max(kept, 0), tl.max(opened, 0))
    while low < high:
        middle = middle_of(low, high)
        low, high = narrow(low, high, _count(kept, opened, middle - 1), middle, K)
    room = K - _count(kept, opened, low)
    kept_tied, opened_tied = (kept == low).to(tl.int32), (opened == low).to(tl.int32)
    before_tied = tl.sum(tl.where(after, 0, kept_tied), 0)
    kept_rank = tl.cumsum(kept_tied, 0) + tl.where(after, tl.sum(opened_tied, 0), 0)
    stay = (kept > low) | ((kept == low) & (kept_rank <= room))
    enter = opened > low
    enter = enter | ((opened == low) & (before_tied + tl.cumsum(opened_tied, 0) <= room))
    stayed, entered = stay.to(tl.int32), enter.to(tl.int32)
    slots = tl.cumsum(stayed, 0) - 1 + tl.where(after, tl.sum(entered, 0), 0)
    tl.store(kept_ptr + slots, kept, mask=stay)
    tl.store(indices_ptr + slots, latents.to(tl.int64), mask=stay)
    slots = tl.sum(tl.where(after, 0, stayed), 0) + tl.cumsum(entered, 0) - 1
    tl.store(kept_ptr + slots, opened, mask=enter)
    tl.store(indices_ptr + slots, members.to(tl.int64), mask=enter)
    tl.debug_barrier()  # all is written before any is read


@triton.jit
def _count(kept, opened, floor):
    return tl.sum((kept > floor).to(tl.int32), 0) + tl.sum((opened > floor).to(tl.int32), 0)
