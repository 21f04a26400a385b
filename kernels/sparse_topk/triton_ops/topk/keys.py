"""Keys: int32 values in the order of the float32 scores that they stand for.

The largest of several keys takes one integer instruction each, and a key's last bits can carry
something else, such as the place of a latent in its group. This file is apart from `select.py`
because both ways to the scores (`product.py`, `chunked.py`) make keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # the key of no score: below −Inf's
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(score):
    """The keys of float32 scores: −Inf < … < 0 < … < +Inf < NaN.

    Callers add 0.0 first, so −0.0 never occurs. Subtracting 0x400000 wraps negative NaNs, which
    would sort below −Inf, around to the top.
    """
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) - 0x400000


@triton.jit
def score_of(key, STEP: tl.constexpr):
    """The score of a key whose last log2(STEP) bits are lost: of the scores that it may stand for,
    the one nearest to zero, so that an infinity stays one."""
    bits = key + 0x400000
    bits = tl.where(bits < 0, bits | (STEP - 1), bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
