"""The exact K largest of a row, from the T largest keys of each group of its latents.

One program does a row, in three steps:

    pick     the P = min(K, J) groups of the largest bests, which hold the K largest (`pick.py`)
    take     the K largest of the picked groups' T keys
    open     a group whose T-th key was taken may hide more: its scores are computed again, and the
             K largest of them and of what was taken remain (`reopen.py`)

Why that is exact. Order scores by key, then by smaller index: no two are equal. What a group hides
is smaller than its T-th key, so if that is not taken, K scores are larger than the hidden ones.
Opening other groups only adds larger ones, so groups are opened one after another, if their T-th is
still taken then. At most K / T are; of latents in no order, `encode.expected_opened`. With RELU, a
T-th key that is not positive hides nothing, so a row of zeros opens no group.

Of keys, the bests are read, and the rest of picked groups only. Nothing is atomic, and ties go to
the smaller index. A program reads what it wrote, to `scratch` and to the results, after a barrier.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group, J groups, T
keys per group, P picked groups per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .keys import LOWEST, score_of
from .pick import pick_groups
from .reopen import count_taken, open_group, scores_of
from .search import middle_of, narrow, smallest_of


class SelectTile(NamedTuple):
    """What one program of `select_kernel` holds in its registers at a time."""

    block_j: int
    """Bests."""
    block_k: int
    """Picked groups, with T keys each, and latents taken. At least K unless T = G."""
    block_d: int
    """Inputs of each latent of a group that is opened."""
    warps: int


def select(
    keys: Tensor,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    group: int,
    relu: bool,
    values: Tensor,
    indices: Tensor,
    *,
    tile: SelectTile | None = None,
) -> None:
    """Write the K largest of each row of x Wᵀ + bias, compared without their last log2(G) bits.

    keys (N, T, J) int32 as by `product.top_keys`, of K latents at least; x (N, D), W (M, D), bias
    (M,) → values, indices (N, K). `tile` overrides `select_tile`.
    """
    (n, n_keys, n_groups), (m, d), k = keys.shape, W.shape, values.shape[1]
    tile = tile or select_tile(n_groups, k, group)
    scratch = torch.empty(n, 2, k, device=keys.device, dtype=torch.int32)
    select_kernel[(n,)](
        keys, scratch, x, W, bias, values, indices, m, d, n_groups, min(k, n_groups), k,
        G=group, T=n_keys, RELU=relu, num_warps=tile.warps, **blocks(tile, n_groups, k),
    )  # fmt: skip


def select_tile(n_groups: int, k: int, group: int) -> SelectTile:
    """At most 32 bests and 32 picked keys per thread, and 16 products where a group is opened; one
    warp if that holds a row, because its threads then wait for no others. What 16 warps do not hold
    is read again for each step of a search, by 8. From compiled code (64 registers at J = 512, so
    that 32 programs fit a processor), not from timings."""
    block_j = max(32, triton.next_power_of_2(n_groups))
    block_k = max(32, triton.next_power_of_2(k))
    if block_j > 16384 or block_k > 1024:
        return SelectTile(min(8192, block_j), block_k if block_k <= 1024 else 512, 128, 8)
    warps = max(1, block_j // 1024, block_k // 128)
    return SelectTile(block_j, block_k, min(128, 512 * warps // group), warps)


def blocks(tile: SelectTile, n_groups: int, k: int) -> dict[str, int]:
    """The block sizes of `select_kernel`. Positions are found for 8 bests and 1 picked group per
    thread at a time, since they take many registers."""
    return {
        "BLOCK_J": tile.block_j, "STORE_J": min(tile.block_j, 256 * tile.warps),
        "BLOCK_K": tile.block_k, "STORE_K": min(tile.block_k, 32 * tile.warps),
        "BLOCK_D": tile.block_d,
        "WHOLE": n_groups <= tile.block_j and min(k, n_groups) <= tile.block_k,
    }  # fmt: skip


@triton.jit
def _load_picked(keys_ptr, picks_ptr, start_p, J, P, T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Picked groups, −1 past the last, and their T keys as a tuple."""
    offs_p = start_p + tl.arange(0, BLOCK_K)
    picks = tl.load(picks_ptr + offs_p, mask=offs_p < P, other=-1)
    keys = (tl.load(keys_ptr + picks, mask=picks >= 0, other=LOWEST),)
    for t in tl.static_range(1, T):
        keys += (tl.load(keys_ptr + t * J + picks, mask=picks >= 0, other=LOWEST),)  # type: ignore[assignment]
    return picks, keys


@triton.jit
def _range_of(keys, G: tl.constexpr):
    """The smallest best, the smallest key and the largest."""
    smallest_best = smallest_of(keys[0] & -G)
    smallest = smallest_best
    for t in tl.static_range(1, len(keys)):
        smallest = tl.minimum(smallest, smallest_of(keys[t] & -G))
    return smallest_best, smallest, tl.max(keys[0] & -G, 0)


@triton.jit
def _count_keys(
    keys, floor, keys_ptr, picks_ptr, J, P,
    G: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """How many keys of picked groups exceed `floor`: of `keys`, the first BLOCK_K groups', and of
    the rest."""
    above = ((keys[0] & -G) > floor).to(tl.int32)
    for t in tl.static_range(1, len(keys)):
        above += ((keys[t] & -G) > floor).to(tl.int32)
    count = tl.sum(above, 0)
    if not WHOLE:
        for start_p in range(BLOCK_K, P, BLOCK_K):
            _, more = _load_picked(keys_ptr, picks_ptr, start_p, J, P, len(keys), BLOCK_K)
            for t in tl.static_range(len(keys)):
                count += tl.sum(((more[t] & -G) > floor).to(tl.int32), 0)
    return count


@triton.jit
def _kth_key(
    keys, keys_ptr, picks_ptr, J, P, K,
    G: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The K-th largest key of the picked groups, or one that just the K largest exceed. The
    smallest best of K groups bounds it from below, and is often it."""
    smallest_best, smallest, high = _range_of(keys, G)
    if not WHOLE:
        for start_p in range(BLOCK_K, P, BLOCK_K):
            _, more = _load_picked(keys_ptr, picks_ptr, start_p, J, P, len(keys), BLOCK_K)
            more_best, more_smallest, more_high = _range_of(more, G)
            smallest_best = tl.minimum(smallest_best, more_best)
            smallest = tl.minimum(smallest, more_smallest)
            high = tl.maximum(high, more_high)
    low = tl.where(P < K, smallest, smallest_best)
    count = _count_keys(keys, low - 1, keys_ptr, picks_ptr, J, P, G, BLOCK_K, WHOLE)
    low, high = narrow(low, high, count, low, K)
    while low < high:
        middle = middle_of(low, high)
        count = _count_keys(keys, middle - 1, keys_ptr, picks_ptr, J, P, G, BLOCK_K, WHOLE)
        low, high = narrow(low, high, count, middle, K)
    return low


@triton.jit
def _store_taken(
    keys_ptr, picks_ptr, start_p, low, room, ties, filled, kept_ptr, indices_ptr, M, J, P,
    G: tl.constexpr, T: tl.constexpr, RELU: tl.constexpr, STORE_K: tl.constexpr,
):  # fmt: skip
    """Append what is above `low`, and what equals it while there is room, in the order of latents.
    Returns how many such ties there were and how many are taken by now. Of picks, those stay that
    may hide more; the others become J."""
    picks, keys = _load_picked(keys_ptr, picks_ptr, start_p, J, P, T, STORE_K)
    tied = ((keys[0] & -G) == low).to(tl.int32)
    for t in tl.static_range(1, T):
        tied += ((keys[t] & -G) == low).to(tl.int32)
    earlier = ties + tl.cumsum(tied, 0) - tied
    taken = ()
    count = tl.zeros_like(tied)
    for t in tl.static_range(T):
        equal = (keys[t] & -G) == low
        take = ((keys[t] & -G) > low) | (equal & (earlier < room))
        earlier += equal.to(tl.int32)
        count += take.to(tl.int32)
        taken += (take,)  # type: ignore[assignment]
    start = filled + tl.cumsum(count, 0) - count
    for t in tl.static_range(T):
        follow = keys[t] & (G - 1)  # members of the group that follow
        slots = start
        for u in tl.static_range(T):
            if u != t:
                slots += (taken[u] & ((keys[u] & (G - 1)) > follow)).to(tl.int32)
        tl.store(kept_ptr + slots, keys[t] & -G, mask=taken[t])
        tl.store(indices_ptr + slots, (picks * G + (G - 1 - follow)).to(tl.int64), mask=taken[t])
    if T < G:
        doubt = taken[T - 1] & (M - picks * G > T)
        if RELU:
            doubt = doubt & ((keys[T - 1] & -G) > 0)
        offs_p = start_p + tl.arange(0, STORE_K)
        tl.debug_barrier()  # all is read before any is written
        tl.store(picks_ptr + offs_p, tl.where(doubt, picks, J), mask=offs_p < P)
    return ties + tl.sum(tied, 0), filled + tl.sum(count, 0)


@triton.jit
def _store_values(
    kept_ptr, indices_ptr, values_ptr, x_ptr, W_ptr, bias_ptr, M, D, K,
    G: tl.constexpr, RELU: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the values of what was taken: from its keys, or in float32 computed again."""
    if values_ptr.dtype.element_ty == tl.float32:
        for start_k in range(0, K, G):
            offs_k = start_k + tl.arange(0, G)
            latents = tl.load(indices_ptr + offs_k, mask=offs_k < K, other=M)
            scores = scores_of(latents, x_ptr, W_ptr, bias_ptr, M, D, BLOCK_D)
            if RELU:
                scores = tl.where(scores <= 0, 0.0, scores)
            tl.store(values_ptr + offs_k, scores, mask=offs_k < K)
    else:
        for start_k in range(0, K, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            kept = tl.load(kept_ptr + offs_k, mask=offs_k < K, other=0)
            scores = score_of(kept, G, RELU).to(values_ptr.dtype.element_ty)
            tl.store(values_ptr + offs_k, scores, mask=offs_k < K)


@triton.jit
def select_kernel(
    keys_ptr,  # (N, T, J) int32
    scratch_ptr,  # (N, 2, K) int32: picked groups; keys of what is taken
    x_ptr,  # (N, D)
    W_ptr,  # (M, D)
    bias_ptr,  # (M,) or None
    values_ptr,  # (N, K) out
    indices_ptr,  # (N, K) int64 out, ascending
    M,
    D,
    J,
    P,
    K,
    G: tl.constexpr,
    T: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_J: tl.constexpr,  # bests held in registers; the rest, if any, is read again
    STORE_J: tl.constexpr,  # bests looked at together to store picks
    BLOCK_K: tl.constexpr,  # picked groups, and latents taken, held in registers
    STORE_K: tl.constexpr,  # picked groups looked at together to store what is taken
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK_J is at least J, and BLOCK_K at least P
):
    """One program takes the K largest of a row."""
    pid_n = tl.program_id(0).to(tl.int64)
    keys_ptr += pid_n * J * T
    picks_ptr = scratch_ptr + pid_n * K * 2
    kept_ptr = picks_ptr + K
    x_ptr += pid_n * D
    values_ptr += pid_n * K
    indices_ptr += pid_n * K
    pick_groups(keys_ptr, picks_ptr, J, P, G, BLOCK_J, STORE_J, WHOLE)
    tl.debug_barrier()
    _, keys = _load_picked(keys_ptr, picks_ptr, 0, J, P, T, BLOCK_K)
    low = _kth_key(keys, keys_ptr, picks_ptr, J, P, K, G, BLOCK_K, WHOLE)
    room = K - _count_keys(keys, low, keys_ptr, picks_ptr, J, P, G, BLOCK_K, WHOLE)
    ties, filled = 0, 0
    for start_p in range(0, P, STORE_K):
        ties, filled = _store_taken(
            keys_ptr, picks_ptr, start_p, low, room, ties, filled, kept_ptr, indices_ptr, M, J, P,
            G, T, RELU, STORE_K,
        )  # fmt: skip
    tl.debug_barrier()
    if T < G:
        offs_p = tl.arange(0, BLOCK_K)
        waiting = tl.load(picks_ptr + offs_p, mask=offs_p < P, other=J)
        group = tl.min(waiting, 0)
        while group < J:
            if count_taken(group, indices_ptr, K, G, BLOCK_K) == T:
                open_group(
                    group, kept_ptr, indices_ptr, x_ptr, W_ptr, bias_ptr, M, D, K,
                    G, RELU, BLOCK_K, BLOCK_D,
                )  # fmt: skip
            waiting = tl.where(waiting > group, waiting, J)
            group = tl.min(waiting, 0)
    _store_values(
        kept_ptr, indices_ptr, values_ptr, x_ptr, W_ptr, bias_ptr, M, D, K,
        G, RELU, BLOCK_K, BLOCK_D,
    )  # fmt: skip
