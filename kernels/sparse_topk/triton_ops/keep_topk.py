"""ReLU of the k largest of each row in Triton, in place, without sorting.

Only scores above 0 can stay. The bits of a positive float, as an integer, are in its order, so the
k-th largest is found by bisection over integers: in half precision in 15 rounds at most, in float32
in 31, and often in fewer, since exactly k may lie above a bound before it is the k-th itself.

A row of up to 16384 scores is held in registers and moves through memory once. Longer rows are read
again in each round, from the caches. Tiles are from the cost model and compiled code, not timed.

Legend: N tokens, Q scores per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["keep_topk_"]

_BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _load_keys(z_ptr, offs, mask, BITS: tl.constexpr, KEY: tl.constexpr, NAN_KEY: tl.constexpr):
    """The keys of scores: 0 for those at most 0, else in their order; NaN has the largest. A key's
    bits are those of its score's ReLU."""
    z = tl.load(z_ptr + offs, mask, other=0.0)
    bits = z.to(BITS, bitcast=True).to(KEY)
    return tl.where(z != z, NAN_KEY, tl.maximum(bits, 0))


@triton.jit
def keep_topk_kernel(
    z_ptr,  # (N, Q) in and out
    Q,
    k,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK holds a row
    BITS: tl.constexpr,  # the integer of a score's size
    KEY: tl.constexpr,  # the same, int32 at least
    NAN_KEY: tl.constexpr,  # the largest BITS
):
    """One program finds the k-th largest key of one row, and keeps what is above or, in the order
    of the ids, equal."""
    z_ptr += tl.program_id(0).to(tl.int64) * Q
    offs = tl.arange(0, BLOCK)
    if WHOLE:
        keys = _load_keys(z_ptr, offs, offs < Q, BITS, KEY, NAN_KEY)
        largest = tl.max(keys, 0)
        n_kept = tl.sum((keys > 0).to(tl.int32), 0)
    else:
        largest_of = tl.zeros([BLOCK], KEY)
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, Q, BLOCK):
            keys = _load_keys(z_ptr + start, offs, start + offs < Q, BITS, KEY, NAN_KEY)
            largest_of = tl.maximum(largest_of, keys)
            counts += (keys > 0).to(tl.int32)
        largest = tl.max(largest_of, 0)
        n_kept = tl.sum(counts, 0)
    # n_kept keys are at least `low`: k or more, unless low is 1. Fewer than k are above `high`.
    low = largest * 0 + 1
    high = tl.where(n_kept > k, largest, low)
    while (low < high) & (n_kept != k):
        middle = low + (high - low + 1) // 2
        if WHOLE:
            n = tl.sum((keys >= middle).to(tl.int32), 0)
        else:
            counts = tl.zeros([BLOCK], tl.int32)
            for start in range(0, Q, BLOCK):
                keys = _load_keys(z_ptr + start, offs, start + offs < Q, BITS, KEY, NAN_KEY)
                counts += (keys >= middle).to(tl.int32)
            n = tl.sum(counts, 0)
        high = tl.where(n >= k, high, middle - 1)
        low = tl.where(n >= k, middle, low)
        n_kept = tl.where(n >= k, n, n_kept)
    n_dropped = n_kept - k  # of those equal to `low`: the last ones, if any
    if WHOLE:
        _store_kept(z_ptr, offs, Q, keys, low, n_dropped, BITS)
    else:
        end = (Q + BLOCK - 1) // BLOCK * BLOCK
        for done in range(0, end, BLOCK):  # the last block first, to drop the last ones
            start = end - BLOCK - done
            keys = _load_keys(z_ptr + start, offs, start + offs < Q, BITS, KEY, NAN_KEY)
            n_dropped = _store_kept(z_ptr + start, offs, Q - start, keys, low, n_dropped, BITS)


@triton.jit
def _store_kept(z_ptr, offs, Q, keys, low, n_dropped, BITS: tl.constexpr):
    """Store the ReLU of scores with keys of at least `low`, and 0 for the others, and for the last
    `n_dropped` of the keys that equal `low`. Returns how many of those were not here."""
    if n_dropped > 0:
        equal = (keys == low).to(tl.int32)
        n_equal = tl.sum(equal, 0)
        rank_from_end = n_equal - tl.cumsum(equal, 0)  # 0 for the last one
        keys = tl.where((equal == 1) & (rank_from_end < n_dropped), 0, keys)
        n_dropped = tl.maximum(n_dropped - n_equal, 0)
    kept = tl.where(keys >= low, keys, 0).to(BITS)
    tl.store(z_ptr + offs, kept.to(z_ptr.dtype.element_ty, bitcast=True), offs < Q)
    return n_dropped


def keep_topk_(z: Tensor, k: int) -> None:
    """Keep ReLU of the k largest of each row of z (N, Q), in place, and make all else 0.

    Ties go to the smaller index. NaN ranks above +Inf, and stays. Raises ValueError if z is not
    contiguous.
    """
    if not z.is_contiguous():
        raise ValueError(f"z must be contiguous, got the strides {z.stride()}")
    n, q = z.shape
    if not z.numel():
        return
    block, warps = keep_topk_tile(q)
    bits = _BITS[z.element_size()]
    key = tl.int64 if bits == tl.int64 else tl.int32
    nan_key = 2 ** (8 * z.element_size() - 1) - 1
    with torch.cuda.device_of(z):
        keep_topk_kernel[n,](z, q, k, block, q <= block, bits, key, nan_key, num_warps=warps)


def keep_topk_tile(q: int) -> tuple[int, int]:
    """Scores and warps of one program: a whole row, 32 scores per thread; of a row that is too long
    for registers (with 32 warps they spill), a block."""
    if q > 16384:
        return 8192, 8
    block = max(32, triton.next_power_of_2(q))
    return block, max(1, block // 1024)
