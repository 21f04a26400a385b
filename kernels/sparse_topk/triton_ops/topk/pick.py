"""The groups of a row that hold its K largest scores: those of the largest bests, ties to the
smaller group. If one of the K largest were in another group, K groups would each hold a larger one.

Legend: J groups, P picked groups, G latents per group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import LOWEST
from .search import middle_of, narrow, smallest_of


@triton.jit
def pick_groups(
    bests_ptr,  # (J,) int32 keys of one row
    picks_ptr,  # (P,) int32 out, ascending
    J,
    P,
    G: tl.constexpr,
    BLOCK_J: tl.constexpr,  # bests held in registers; the rest, if any, is read again
    STORE_J: tl.constexpr,  # bests looked at together to store picks, fewer
    WHOLE: tl.constexpr,  # BLOCK_J is at least J
):
    """Write the P groups of the largest bests of a row."""
    bests = _load_bests(bests_ptr, 0, J, G, BLOCK_J)
    low, high = smallest_of(bests), tl.max(bests, 0)
    if not WHOLE:
        for start_j in range(BLOCK_J, J, BLOCK_J):
            more = _load_bests(bests_ptr, start_j, J, G, BLOCK_J)
            low = tl.minimum(low, smallest_of(more))
            high = tl.maximum(high, tl.max(more, 0))
    low = tl.where(P == J, LOWEST, low)
    high = tl.where(P == J, LOWEST, high)  # all of them: no search
    while low < high:
        middle = middle_of(low, high)
        count = _count_bests(bests, middle - 1, bests_ptr, J, G, BLOCK_J, WHOLE)
        low, high = narrow(low, high, count, middle, P)
    room = P - _count_bests(bests, low, bests_ptr, J, G, BLOCK_J, WHOLE)
    ties, filled = 0, 0
    for start_j in range(0, J, STORE_J):
        some = _load_bests(bests_ptr, start_j, J, G, STORE_J)
        ties, filled = _store_picks(some, start_j, low, room, ties, filled, picks_ptr, STORE_J)


@triton.jit
def _load_bests(bests_ptr, start_j, J, G: tl.constexpr, BLOCK_J: tl.constexpr):
    """Bests as they are compared, without their last log2(G) bits; LOWEST past the last."""
    offs_j = start_j + tl.arange(0, BLOCK_J)
    return tl.load(bests_ptr + offs_j, mask=offs_j < J, other=LOWEST) & -G


@triton.jit
def _count_bests(
    bests, floor, bests_ptr, J, G: tl.constexpr, BLOCK_J: tl.constexpr, WHOLE: tl.constexpr
):
    """How many bests exceed `floor`: of `bests`, the first BLOCK_J, and of the rest."""
    count = tl.sum((bests > floor).to(tl.int32), 0)
    if not WHOLE:
        for start_j in range(BLOCK_J, J, BLOCK_J):
            more = _load_bests(bests_ptr, start_j, J, G, BLOCK_J)
            count += tl.sum((more > floor).to(tl.int32), 0)
    return count


@triton.jit
def _store_picks(bests, start_j, low, room, ties, filled, picks_ptr, BLOCK_J: tl.constexpr):
    """Append the groups of `bests` above `low`, and those that equal it while there is room.
    Returns how many such ties there were and how many groups are picked by now."""
    above, tied = bests > low, bests == low
    both = above.to(tl.int32) + (tied.to(tl.int32) << 16)  # two counts in one sum
    earlier = tl.cumsum(both, 0) - both
    earlier_ties = ties + (earlier >> 16)
    start = filled - tl.minimum(ties, room)
    slots = start + (earlier & 0xFFFF) + tl.minimum(earlier_ties, room)
    picked = above | (tied & (earlier_ties < room))
    tl.store(picks_ptr + slots, start_j + tl.arange(0, BLOCK_J), mask=picked)
    total = tl.sum(both, 0)
    ties += total >> 16
    return ties, start + (total & 0xFFFF) + tl.minimum(ties, room)
