"""`topk_encode` in Triton, in two launches: a product that keeps the keys of each group's T largest
scores, and a selection of the K largest from them. T is such that few groups hide one of those.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group, J groups, T
keys per group.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ...matmul import segments
from .product import top_keys
from .select import select

_KEY_BYTES = 512 * 2**20  # of keys, and of places to select them in, held at a time
_MOST_REOPENED = 1024  # of the K for which groups are opened again
_OPENED = 160  # keys that cost as much as one latent of an opened group


def topk_encode(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """The K largest scores of each row of x Wᵀ + b; with `relu`, their ReLU.

    x (N, D), W (M, D), b (M,) → values (N, K) in x's dtype and indices (N, K) int64. Indices ascend
    within a row; ties go to the smaller index; NaN ranks above +Inf, as in `torch.topk`, so it is
    never dropped. With `relu`, which latents have the values 0 is left open; they are distinct.

    Scores are summed in float32, never rounded to the dtype of x, and compared to a part in 2²³ / G
    (2¹⁷ at G = 64), a smaller difference than the order of a float32 sum makes. Half-precision
    values are truncated that way before they are rounded to 8 or 11 bits; float32 values are
    computed again in float32. At most 512 MiB of keys are held at a time.

    float32 inputs follow torch's own switch (`torch.set_float32_matmul_precision`). While it
    forbids TF32, the product takes three TF32 products for one, which keeps about 22 bits of each
    factor.

    Raises TypeError if x is not float32, bfloat16 or float16.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    n, m = len(x), len(W)
    values = torch.empty(n, k, device=x.device, dtype=x.dtype)
    indices = torch.empty(n, k, device=x.device, dtype=torch.int64)
    x, W, b = x.contiguous(), W.contiguous(), None if b is None else b.contiguous()
    if not x.is_cuda and x.dtype == torch.bfloat16:  # the interpreter's `tl.dot` misreads it
        x, W = x.float(), W.float()
    group, n_keys = group_size(m, k)
    with torch.cuda.device_of(x):
        for rows in segments(n, 4 * (n_keys * math.ceil(m / group) + 2 * k), _KEY_BYTES):
            keys = top_keys(x[rows], W, b, n_keys, group, relu)
            select(keys, x[rows], W, b, group, relu, values[rows], indices[rows])
            del keys  # before the next are made
    return values, indices


@lru_cache(maxsize=64)
def group_size(m: int, k: int) -> tuple[int, int]:
    """G latents per group and T keys of each, such that keys and opened groups cost the least.

    A selection takes as long as its keys, T M / G, and an opened group as long as 160 (G + 32) more
    (from the cost model: D = 1024 to 2048 in half precision, and the time to wait for it). On one
    H100 (2026-11-26) G = 64 with T = 3 at K = 32 and T = 4 at K = 256 were the fastest, which this
    reproduces; other K are not timed.
    """

    def cost(group: int, n_keys: int) -> float:
        opened = expected_opened(m, k, group, n_keys)
        return n_keys * m / group + _OPENED * (group + 32) * opened

    fitting = [
        (group, n_keys)
        for group in (4, 16, 32, 64)
        for n_keys in (2, 3, 4)
        if (group == n_keys or k <= _MOST_REOPENED)
        and n_keys * (m // group) + min(n_keys, m % group) >= k
    ]
    return min(fitting, key=lambda sizes: cost(*sizes))


def expected_opened(m: int, k: int, group: int, n_keys: int) -> float:
    """Groups per token that hold at least T of the K largest of M scores, which are in no order:
    K (K G / M)^(T−1) / T!, the first term of a Poisson distribution's tail; an upper bound."""
    if group == n_keys:
        return 0.0  # nothing is hidden
    return k * (k * group / m) ** (n_keys - 1) / math.factorial(n_keys)
