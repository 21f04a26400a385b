"""The search for the K-th largest key: halve the range that holds it. It is apart because each of
the three steps of a selection searches among keys that lie elsewhere."""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import HIGHEST, LOWEST


@triton.jit
def smallest_of(keys):
    """The smallest key of a score, HIGHEST if there is none."""
    return tl.min(tl.where(keys == LOWEST, HIGHEST, keys), 0)


@triton.jit
def middle_of(low, high):
    """(low + high) / 2, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def narrow(low, high, count, middle, K):
    """Halve the range of keys that holds the K-th, given how many are at least `middle`. If that
    is just K, the search is over: `low` becomes a key that they, and only they, exceed."""
    below = tl.where(count == K, middle - 1, tl.where(count > K, middle, low))
    return below, tl.where(count > K, high, middle - 1)
