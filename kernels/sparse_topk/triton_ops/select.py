"""The exact K largest of a row, from the best of each group of its latents.

What a row's scores become first, in whichever way, is int32 keys in the scores' order: the best of
each group of G neighbors, and with TWO the second best. From those,

    pick_groups   names the at most K groups that can hold one of the K largest
    rank          takes the K largest of what the picked groups hold

Between the two, `rescore.py` computes a group's scores again where they were not stored.

Why that is exact. Order scores by value, then by smaller index: no two are equal. With stored
scores, the K groups of the largest bests are picked: were one of the K largest in another group,
K groups would each hold a larger one. With TWO, take the K largest among all bests and seconds. A
group whose second is not among them has nothing below its best in the K largest, so its best alone
is a candidate; a group whose second is among them is opened, its G scores all candidates. At most
K / 2 groups are opened; on unordered latents, about K² G / 2M.

Sizes are fixed before the launch, nothing is atomic, and ties go to the smaller index.

Legend: N tokens, D inputs, M latents, K active latents a token, G latents a group, J groups, P
picked groups a token at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-(2**31))  # the key of no score: below −Inf's
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(score):  # type: ignore[no-untyped-def]
    """int32 keys in the order of float32 scores: −Inf < … < 0 < … < +Inf < NaN. Of a sum with
    0.0, which is never −0. What is subtracted makes a NaN whose sign is set, below −Inf until
    then, wrap around to the top."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) - 0x400000


@triton.jit
def score_of(key, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The score of a key whose last log2(STEP) bits were cut off: of what it may have been, the
    nearest to zero, so that an infinity stays one."""
    bits = key + 0x400000
    bits = tl.where(bits < 0, bits | (STEP - 1), bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(low, high, count, middle, K):  # type: ignore[no-untyped-def]
    """Halve the keys between which the K-th is, knowing how many are at least `middle`. Where
    those are just K, the search is over: `low` becomes a key that they, and only they, exceed."""
    below = tl.where(count == K, middle - 1, tl.where(count > K, middle, low))
    return below, tl.where(count > K, high, middle - 1)


@triton.jit
def _middle(low, high):  # type: ignore[no-untyped-def]
    """(low + high) / 2, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _load_bests(best, second, start, group, J, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys of a row's groups, to be compared; of seconds that do not exist, the lowest."""
    a = tl.load(best + start + group, mask=group < J, other=LOWEST) & -STEP
    b = tl.full(group.shape, LOWEST, tl.int32)
    if second is not None:
        b = tl.load(second + start + group, mask=group < J, other=LOWEST) & -STEP
    return a, b


@triton.jit
def _count_bests(a, b, floor, best, second, start, J, STEP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of a row's keys exceed `floor`: of (a, b), the first BLOCK groups', and of
    those that registers do not hold."""
    count = tl.sum((a > floor).to(tl.int32) + (b > floor).to(tl.int32), 0)
    for first in range(BLOCK, J, BLOCK):
        c, d = _load_bests(best, second, start, first + tl.arange(0, BLOCK), J, STEP)
        count += tl.sum((c > floor).to(tl.int32) + (d > floor).to(tl.int32), 0)
    return count


@triton.jit
def pick_groups_kernel(  # type: ignore[no-untyped-def]
    best,  # (N, J) int32 keys
    second,  # (N, J) int32 keys, or None: the groups' scores are stored
    picks,  # (N, P) int32 out: 2 · group + (1 if opened), ascending, then −1
    J,
    P,
    K,  # at most the number of keys
    STEP: tl.constexpr,  # keys are compared without their last log2(STEP) bits
    BLOCK: tl.constexpr,  # groups held in registers; of more, the rest is read again
    BLOCK_P: tl.constexpr,
):
    """One program names the groups that can hold one of a row's K largest."""
    row = tl.program_id(0).to(tl.int64)
    start = row * J
    a, b = _load_bests(best, second, start, tl.arange(0, BLOCK), J, STEP)
    low, high = tl.min(tl.where(a == LOWEST, HIGHEST, a), 0), tl.max(a, 0)
    for first in range(BLOCK, J, BLOCK):
        c, _ = _load_bests(best, second, start, first + tl.arange(0, BLOCK), J, STEP)
        low = tl.minimum(low, tl.min(tl.where(c == LOWEST, HIGHEST, c), 0))
        high = tl.maximum(high, tl.max(c, 0))
    low = tl.where(K > J, LOWEST, low)  # the K-th may be a second, below all bests
    while low < high:
        middle = _middle(low, high)
        count = _count_bests(a, b, middle - 1, best, second, start, J, STEP, BLOCK)
        low, high = _narrow(low, high, count, middle, K)
    room = K - _count_bests(a, b, low, best, second, start, J, STEP, BLOCK)
    ties, filled = 0, 0
    for first in range(0, J, BLOCK):
        group = first + tl.arange(0, BLOCK)
        a, b = _load_bests(best, second, start, group, J, STEP)
        tied = (a == low).to(tl.int32)
        both = tied + (b == low).to(tl.int32)
        earlier = ties + tl.cumsum(both, 0) - both
        picked = (a > low) | ((a == low) & (earlier < room))
        opened = picked
        if second is not None:
            opened = (b > low) | ((b == low) & (earlier + tied < room))
        slot = filled + tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(picks + row * P + slot, group * 2 + opened.to(tl.int32), mask=picked)
        ties += tl.sum(both, 0)
        filled += tl.sum(picked.to(tl.int32), 0)
    rest = tl.arange(0, BLOCK_P)
    tl.store(picks + row * P + rest, -1, mask=(rest >= filled) & (rest < P))


@triton.jit
def _load_candidates(  # type: ignore[no-untyped-def]
    scores, best, bias, picks, row, place, M, P, G: tl.constexpr, TWO: tl.constexpr
):
    """Keys and latents of a row's candidates, in the order of their latents; what is none has the
    lowest key. Shapes as in `rank_kernel`."""
    member = place % G
    pick = tl.load(picks + row * P + place // G, mask=place < P * G, other=-1)
    latent = (pick >> 1) * G + member
    real = (pick >= 0) & (latent < M)
    if TWO:
        opened = real & ((pick & 1) == 1)
        score = tl.load(scores + row * P * G + place, mask=opened, other=0.0)
        packed = tl.load(best + row * tl.cdiv(M, G) + (pick >> 1), mask=real, other=0)
        alone = tl.where(member == G - 1 - (packed & (G - 1)), packed & -G, LOWEST)
        key = tl.where(opened, ordered(score + 0.0) & -G, alone)
    else:
        score = tl.load(scores + row * M + latent, mask=real, other=0.0)
        if bias is not None:
            score += tl.load(bias + latent, mask=real, other=0.0).to(tl.float32)
        key = ordered(score + 0.0)
    return tl.where(real, key, LOWEST), latent


@triton.jit
def _count_candidates(  # type: ignore[no-untyped-def]
    key, floor, scores, best, bias, picks, row, M, P,
    G: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many of a row's candidates have keys above `floor`: of `key`, the first BLOCK, and
    of those that registers do not hold."""
    count = tl.sum((key > floor).to(tl.int32), 0)
    for first in range(BLOCK, P * G, BLOCK):
        place = first + tl.arange(0, BLOCK)
        other, _ = _load_candidates(scores, best, bias, picks, row, place, M, P, G, TWO)
        count += tl.sum((other > floor).to(tl.int32), 0)
    return count


@triton.jit
def rank_kernel(  # type: ignore[no-untyped-def]
    scores,  # (N, P, G) float32 of opened groups with TWO, else (N, M) without the bias
    best,  # (N, J) int32 keys with TWO
    bias,  # (M,), or None; with TWO it is in the scores
    picks,  # (N, P) int32
    values,  # (N, K) out
    indices,  # (N, K) int64 out, ascending
    M,
    P,
    K,
    G: tl.constexpr,
    TWO: tl.constexpr,  # scores and keys are compared without their last log2(G) bits
    BLOCK: tl.constexpr,  # candidates held in registers; of more, the rest is read again
):
    """One program takes the K largest of a row's picked groups, in the order of their indices."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    key, latent = _load_candidates(scores, best, bias, picks, row, place, M, P, G, TWO)
    low, high = tl.min(tl.where(key == LOWEST, HIGHEST, key), 0), tl.max(key, 0)
    for first in range(BLOCK, P * G, BLOCK):
        place = first + tl.arange(0, BLOCK)
        other, _ = _load_candidates(scores, best, bias, picks, row, place, M, P, G, TWO)
        low = tl.minimum(low, tl.min(tl.where(other == LOWEST, HIGHEST, other), 0))
        high = tl.maximum(high, tl.max(other, 0))
    while low < high:
        middle = _middle(low, high)
        count = _count_candidates(
            key, middle - 1, scores, best, bias, picks, row, M, P, G, TWO, BLOCK
        )
        low, high = _narrow(low, high, count, middle, K)
    room = K - _count_candidates(key, low, scores, best, bias, picks, row, M, P, G, TWO, BLOCK)
    ties, filled = 0, 0
    for first in range(0, P * G, BLOCK):
        place = first + tl.arange(0, BLOCK)
        key, latent = _load_candidates(scores, best, bias, picks, row, place, M, P, G, TWO)
        tied = (key == low).to(tl.int32)
        chosen = (key > low) | ((key == low) & (ties + tl.cumsum(tied, 0) <= room))
        out = row * K + filled + tl.cumsum(chosen.to(tl.int32), 0) - 1
        value = score_of(key, G if TWO else 1).to(values.dtype.element_ty)
        tl.store(values + out, value, mask=chosen)
        tl.store(indices + out, latent.to(tl.int64), mask=chosen)
        ties += tl.sum(tied, 0)
        filled += tl.sum(chosen.to(tl.int32), 0)


def keys_tile(keys: int) -> tuple[int, int]:
    """Keys that a program holds in its registers, and its warps: 16 a thread, 4096 at most. From
    compiled code, which spills at 16 warps; not yet measured on a GPU."""
    block = min(4096, triton.next_power_of_2(keys))
    return block, max(1, block // 512)


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
        BLOCK=block, BLOCK_P=triton.next_power_of_2(slots), num_warps=warps,
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
    (n, slots), k = picks.shape, values.shape[1]
    block, warps = keys_tile(slots * group)
    rank_kernel[(n,)](
        scores, best, bias, picks, values, indices, m, slots, k,
        G=group, TWO=two, BLOCK=block, num_warps=warps,
    )  # fmt: skip
