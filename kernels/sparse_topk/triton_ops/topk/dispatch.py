"""`topk_encode` in Triton: two ways to the scores, one way from them to the K largest.

    fused     a matrix product whose scores never leave the registers (`product.py`)
    chunked   torch.mm (cuBLAS) into a bounded workspace, a chunk of tokens at a time (`chunked.py`)

Both end with the best of each group of latents, from which `select.py` takes the K largest.

Legend: N tokens, D inputs, M latents, K active latents per token, Q latents of a subset, G latents
per group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .chunked import encode_chunked
from .product import encode_fused, fused_group

Path = Literal["fused", "chunked"]


def topk_encode(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    k: int,
    latents: Tensor | None = None,
    *,
    path: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """The K largest scores of each row of x Wᵀ + b, among `latents` only if given.

    x (N, D), W (M, D), b (M,), latents (Q,) int64 ascending → values (N, K) in x's dtype and
    indices (N, K) int64. Indices ascend within a row; ties go to the smaller index; NaN ranks
    above +Inf, as in `torch.topk`, so it is never dropped.

    Scores are summed in float32 and never rounded to the dtype of x before they are compared.
    `path` overrides `choose`. "chunked" takes exactly the K largest of its float32 scores, with
    their values. "fused" compares scores to a part in 2¹⁷ (2¹⁸ at G = 32), a smaller difference
    than the order of a float32 sum makes. Its half-precision values are truncated that way before
    they are rounded to 8 or 11 bits; its float32 values are computed again in float32.

    float32 inputs follow torch's own switch (`torch.set_float32_matmul_precision`). While it
    forbids TF32, "fused" takes three TF32 products for one, which keeps about 22 bits of each
    factor, and "chunked" takes cuBLAS's float32 product.

    Raises TypeError if x is not float32, bfloat16 or float16.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if latents is not None:
        bias = None if b is None else b[latents]
        values, indices = topk_encode(x, W[latents], bias, k, path=path)
        return values, latents[indices]
    (n, d), m = x.shape, len(W)
    x, W, b = x.contiguous(), W.contiguous(), None if b is None else b.contiguous()
    values = torch.empty(n, k, device=x.device, dtype=x.dtype)
    indices = torch.empty(n, k, device=x.device, dtype=torch.int64)
    if n == 0:
        return values, indices
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    encode = {"fused": encode_fused, "chunked": encode_chunked}
    with torch.cuda.device_of(x):
        encode[path or choose(n, d, m, k, x.dtype, capability)](x, W, b, values, indices)
    return values, indices


def choose(n: int, d: int, m: int, k: int, dtype: torch.dtype, capability: tuple[int, int]) -> Path:
    """The faster way by a cost model, in units of the bare half-precision matrix product.

    fused     1 / η + 200 / D for the keys + 72 (K G / M)² for opened groups, computed again
    chunked   1 + 550 / D for float32 scores written and read + 65 / D for the selection

    η is the share of cuBLAS's speed that Triton reaches. In float32 the product itself takes 3.5
    times as long with three TF32 products, and 13 times with cuBLAS, which then has no tensor cores
    to use. Few tokens do not fill the fused kernel's tiles.

    The terms are estimates from published rates and compiled code. On one H100 (2026-11-26, torch
    2.11, Triton 3.6) this chose the faster way at every shape timed with 1024 tokens or more. At
    128 tokens it chose "fused", and "chunked" was faster.
    """
    if n < 128:
        return "chunked"
    efficiency = 0.93 if capability[0] == 9 else 0.85
    product, cublas = (3.5, 13.0) if dtype == torch.float32 else (1.0, 1.0)
    opened = 72 * (k * fused_group(m, k) / m) ** 2
    fused = product / efficiency + 200 / d + opened
    chunked = cublas + 615 / d
    return "fused" if fused < chunked else "chunked"
