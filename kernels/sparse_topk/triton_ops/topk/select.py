"""The exact K largest of a row, from the best of each group of its latents.

Whichever way a row's scores come, they first become int32 keys in the scores' order (`keys.py`):
the best of each group of G neighbors, and with TWO the second best. From those,

    pick_groups   names the at most K groups that can hold one of the K largest
    rank          takes the K largest of what the picked groups hold

Between the two, `rescore.py` computes a group's scores again if they were not stored.

Why that is exact. Order scores by value, then by smaller index: no two are equal. With stored
scores, the K groups of the largest bests are picked: if one of the K largest were in another group,
K groups would each hold a larger one. With TWO, take the K largest among all bests and seconds. A
group whose second is not among them has nothing below its best in the K largest, so its best alone
is a candidate; a group whose second is among them is opened: its G scores all are candidates. At
most K / 2 groups are opened; on unordered latents, about K² G / 2M.

Sizes are fixed before the launch, nothing is atomic, and ties go to the smaller index. Tiles are
from compiled code, not from timings.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group, J groups, P
picked groups per token at most, C candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .keys import HIGHEST, LOWEST, ordered, score_of


def select_stored(
    scores: Tensor, bias: Tensor | None, best: Tensor, group: int, values: Tensor, indices: Tensor
) -> None:
    """Write the K largest of each row of `scores` + bias, exactly, with their indices.

    scores (N, M) float32, bias (M,), best (N, J) int32 → values, indices (N, K).
    """
    m, k = scores.shape[1], values.shape[1]
    picks = pick_groups(best, None, k, m, group)
    rank(scores, best, bias, picks, values, indices, m, group, two=False)


def pick_groups(best: Tensor, second: Tensor | None, k: int, m: int, group: int) -> Tensor:
    """(N, P) groups to look into, as `pick_groups_kernel` writes them."""
    n, n_groups = best.shape
    keys = n_groups if second is None else n_groups + m // group + (m % group > 1)
    slots = min(k, n_groups)
    picks = torch.empty(n, slots, device=best.device, dtype=torch.int32)
    block, warps = keys_tile(n_groups)
    pick_groups_kernel[(n,)](
        best, second, picks, n_groups, slots, min(k, keys),
        STEP=1 if second is None else group,
        BLOCK_J=block, BLOCK_P=triton.next_power_of_2(slots), num_warps=warps,
    )  # fmt: skip
    return picks


def rank(
    scores: Tensor,
    best: Tensor,
    bias: Tensor | None,
    picks: Tensor,
    values: Tensor,
    indices: Tensor,
    m: int,
    group: int,
    *,
    two: bool,
) -> None:
    """Write the K largest of each row's picked groups; shapes as in `rank_kernel`."""
    (n, slots), k = picks.shape, values.shape[1]
    block, warps = keys_tile(slots * group)
    rank_kernel[(n,)](
        scores, best, bias, picks, values, indices, m, slots, k,
        G=group, TWO=two, BLOCK_C=block, num_warps=warps,
    )  # fmt: skip


def keys_tile(keys: int) -> tuple[int, int]:
    """Keys that a program holds in its registers, and its warps: 16 keys per thread, 4096 at most,
    since 16 warps spill."""
    block = min(4096, triton.next_power_of_2(keys))
    return block, max(1, block // 512)


@triton.jit
def _middle(low, high):
    """(low + high) / 2, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _narrow(low, high, count, middle, K):
    """Halve the range of keys that holds the K-th, given how many are at least `middle`. If that
    is just K, the search is over: `low` becomes a key that they, and only they, exceed."""
    below = tl.where(count == K, middle - 1, tl.where(count > K, middle, low))
    return below, tl.where(count > K, high, middle - 1)


@triton.jit
def _load_bests(best_ptr, second_ptr, row_start, offs_j, J, STEP: tl.constexpr):
    """Keys of a row's groups, as they are compared; a second that does not exist is LOWEST."""
    best = tl.load(best_ptr + row_start + offs_j, mask=offs_j < J, other=LOWEST) & -STEP
    second = tl.full(offs_j.shape, LOWEST, tl.int32)
    if second_ptr is not None:
        second = tl.load(second_ptr + row_start + offs_j, mask=offs_j < J, other=LOWEST) & -STEP
    return best, second


@triton.jit
def _count_bests(
    best, second, floor, best_ptr, second_ptr, row_start, J,
    STEP: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """How many of a row's keys exceed `floor`: of (best, second), the first BLOCK_J groups', and
    of the rest, which registers do not hold."""
    count = tl.sum((best > floor).to(tl.int32) + (second > floor).to(tl.int32), 0)
    for start_j in range(BLOCK_J, J, BLOCK_J):
        offs_j = start_j + tl.arange(0, BLOCK_J)
        more, more_second = _load_bests(best_ptr, second_ptr, row_start, offs_j, J, STEP)
        count += tl.sum((more > floor).to(tl.int32) + (more_second > floor).to(tl.int32), 0)
    return count


@triton.jit
def pick_groups_kernel(
    best_ptr,  # (N, J) int32 keys
    second_ptr,  # (N, J) int32 keys, or None: the groups' scores are stored
    picks_ptr,  # (N, P) int32 out: 2 · group + (1 if opened), ascending, then −1
    J,
    P,
    K,  # at most the number of keys
    STEP: tl.constexpr,  # keys are compared without their last log2(STEP) bits
    BLOCK_J: tl.constexpr,  # groups held in registers; the rest, if any, is read again
    BLOCK_P: tl.constexpr,
):
    """One program names the groups that can hold one of a row's K largest."""
    pid_n = tl.program_id(0).to(tl.int64)
    row_start = pid_n * J
    best, second = _load_bests(best_ptr, second_ptr, row_start, tl.arange(0, BLOCK_J), J, STEP)
    low, high = tl.min(tl.where(best == LOWEST, HIGHEST, best), 0), tl.max(best, 0)
    for start_j in range(BLOCK_J, J, BLOCK_J):
        offs_j = start_j + tl.arange(0, BLOCK_J)
        more, _ = _load_bests(best_ptr, second_ptr, row_start, offs_j, J, STEP)
        low = tl.minimum(low, tl.min(tl.where(more == LOWEST, HIGHEST, more), 0))
        high = tl.maximum(high, tl.max(more, 0))
    low = tl.where(K > J, LOWEST, low)  # the K-th may be a second, below all bests
    while low < high:
        middle = _middle(low, high)
        count = _count_bests(
            best, second, middle - 1, best_ptr, second_ptr, row_start, J, STEP, BLOCK_J
        )
        low, high = _narrow(low, high, count, middle, K)
    room = K - _count_bests(best, second, low, best_ptr, second_ptr, row_start, J, STEP, BLOCK_J)
    ties, filled = 0, 0
    for start_j in range(0, J, BLOCK_J):
        offs_j = start_j + tl.arange(0, BLOCK_J)
        best, second = _load_bests(best_ptr, second_ptr, row_start, offs_j, J, STEP)
        tied = (best == low).to(tl.int32)
        both = tied + (second == low).to(tl.int32)
        earlier = ties + tl.cumsum(both, 0) - both
        picked = (best > low) | ((best == low) & (earlier < room))
        opened = picked
        if second_ptr is not None:
            opened = (second > low) | ((second == low) & (earlier + tied < room))
        slots = filled + tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(picks_ptr + pid_n * P + slots, offs_j * 2 + opened.to(tl.int32), mask=picked)
        ties += tl.sum(both, 0)
        filled += tl.sum(picked.to(tl.int32), 0)
    offs_p = tl.arange(0, BLOCK_P)
    tl.store(picks_ptr + pid_n * P + offs_p, -1, mask=(offs_p >= filled) & (offs_p < P))


@triton.jit
def _load_candidates(
    scores_ptr, best_ptr, bias_ptr, picks_ptr, pid_n, offs_c, M, P,
    G: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Keys and latents of a row's candidates, in the order of their latents. The key of a place
    that holds no candidate is LOWEST. Shapes as in `rank_kernel`."""
    member = offs_c % G
    picks = tl.load(picks_ptr + pid_n * P + offs_c // G, mask=offs_c < P * G, other=-1)
    offs_m = (picks >> 1) * G + member
    mask_m = (picks >= 0) & (offs_m < M)
    if TWO:
        opened = mask_m & ((picks & 1) == 1)
        scores = tl.load(scores_ptr + pid_n * P * G + offs_c, mask=opened, other=0.0)
        packed = tl.load(best_ptr + pid_n * tl.cdiv(M, G) + (picks >> 1), mask=mask_m, other=0)
        best_only = tl.where(member == G - 1 - (packed & (G - 1)), packed & -G, LOWEST)
        keys = tl.where(opened, ordered(scores + 0.0) & -G, best_only)
    else:
        scores = tl.load(scores_ptr + pid_n * M + offs_m, mask=mask_m, other=0.0)
        if bias_ptr is not None:
            scores += tl.load(bias_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)
        keys = ordered(scores + 0.0)
    return tl.where(mask_m, keys, LOWEST), offs_m


@triton.jit
def _count_candidates(
    keys, floor, scores_ptr, best_ptr, bias_ptr, picks_ptr, pid_n, M, P,
    G: tl.constexpr, TWO: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """How many of a row's candidates have keys above `floor`: of `keys`, the first BLOCK_C, and of
    the rest, which registers do not hold."""
    count = tl.sum((keys > floor).to(tl.int32), 0)
    for start_c in range(BLOCK_C, P * G, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        more, _ = _load_candidates(
            scores_ptr, best_ptr, bias_ptr, picks_ptr, pid_n, offs_c, M, P, G, TWO
        )
        count += tl.sum((more > floor).to(tl.int32), 0)
    return count


@triton.jit
def rank_kernel(
    scores_ptr,  # (N, P, G) float32 of opened groups with TWO, else (N, M) without the bias
    best_ptr,  # (N, J) int32 keys with TWO
    bias_ptr,  # (M,), or None; with TWO it is in the scores
    picks_ptr,  # (N, P) int32
    values_ptr,  # (N, K) out
    indices_ptr,  # (N, K) int64 out, ascending
    M,
    P,
    K,
    G: tl.constexpr,
    TWO: tl.constexpr,  # scores and keys are compared without their last log2(G) bits
    BLOCK_C: tl.constexpr,  # candidates held in registers; the rest, if any, is read again
):
    """One program takes the K largest of a row's picked groups, in the order of their indices."""
    pid_n = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    keys, offs_m = _load_candidates(
        scores_ptr, best_ptr, bias_ptr, picks_ptr, pid_n, offs_c, M, P, G, TWO
    )
    low, high = tl.min(tl.where(keys == LOWEST, HIGHEST, keys), 0), tl.max(keys, 0)
    for start_c in range(BLOCK_C, P * G, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        more, _ = _load_candidates(
            scores_ptr, best_ptr, bias_ptr, picks_ptr, pid_n, offs_c, M, P, G, TWO
        )
        low = tl.minimum(low, tl.min(tl.where(more == LOWEST, HIGHEST, more), 0))
        high = tl.maximum(high, tl.max(more, 0))
    while low < high:
        middle = _middle(low, high)
        count = _count_candidates(
            keys, middle - 1, scores_ptr, best_ptr, bias_ptr, picks_ptr, pid_n, M, P,
            G, TWO, BLOCK_C,
        )  # fmt: skip
        low, high = _narrow(low, high, count, middle, K)
    room = K - _count_candidates(
        keys, low, scores_ptr, best_ptr, bias_ptr, picks_ptr, pid_n, M, P, G, TWO, BLOCK_C
    )
    ties, filled = 0, 0
    for start_c in range(0, P * G, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        keys, offs_m = _load_candidates(
            scores_ptr, best_ptr, bias_ptr, picks_ptr, pid_n, offs_c, M, P, G, TWO
        )
        tied = (keys == low).to(tl.int32)
        chosen = (keys > low) | ((keys == low) & (ties + tl.cumsum(tied, 0) <= room))
        slots = pid_n * K + filled + tl.cumsum(chosen.to(tl.int32), 0) - 1
        values = score_of(keys, G if TWO else 1).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + slots, values, mask=chosen)
        tl.store(indices_ptr + slots, offs_m.to(tl.int64), mask=chosen)
        ties += tl.sum(tied, 0)
        filled += tl.sum(chosen.to(tl.int32), 0)
