"""Keys: int32 values in the order of the float32 scores that they stand for.

The largest of several keys takes one integer instruction each, and a key's last bits can carry
something else, such as the place of a latent in its group. This file is apart because both the
product and the groups that are computed again make keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # the key of no score: below every score's
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def key_of(score, RELU: tl.constexpr):
    """The keys of float32 scores, −Inf < … < 0 < … < +Inf < NaN; with RELU, of ReLU(score).

    With RELU, scores that are not positive all have the key 0, and the key of a positive one is its
    bits: one instruction to clip, which passes NaN on, and one to clear the sign that a NaN or a
    zero may have. Without it, 0.0 is added first, so −0.0 equals 0.0, and subtracting 0x400000
    wraps negative NaNs, which would sort below −Inf, around to the top.
    """
    if RELU:
        clipped = tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return clipped.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) - 0x400000


@triton.jit
def score_of(key, STEP: tl.constexpr, RELU: tl.constexpr):
    """The score of a key whose last log2(STEP) bits are 0, having been lost: of the scores that it
    may stand for, the one nearest to zero, so that an infinity stays one."""
    if RELU:
        return key.to(tl.float32, bitcast=True)
    bits = key + 0x400000
    bits = tl.where(bits < 0, bits | (STEP - 1), bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
