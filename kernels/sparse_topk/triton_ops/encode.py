"""`topk_encode` in Triton: two ways to the scores, one way from them to the K largest.

    fused     a matrix product whose scores never leave the registers (`fused.py`)
    chunked   torch.mm (cuBLAS) into a bounded workspace, a chunk of tokens at a time

Either way ends with the best of each group of latents, from which `select.py` takes the K largest.

Legend: N tokens, D inputs, M latents, K active latents a token, G latents a group, J groups.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense import pieces, product
from .fused import encode_fused, fused_group
from .select import LOWEST, ordered, select_stored

Path = Literal["fused", "chunked"]

_WORKSPACE_BYTES = 512 * 2**20  # of float32 scores held at a time


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
    their values; "fused" compares them to a part in 2¹⁷ (2¹⁸ at G = 32), less than what the order
    of a float32 sum changes; it returns half-precision values so truncated before they are rounded
    to 8 or 11 bits, and float32 ones computed again in float32.

    float32 inputs follow torch's own switch (`torch.set_float32_matmul_precision`): as long as it
    forbids TF32, "fused" uses three TF32 products for one, which keeps about 22 bits of each
    factor, and "chunked" cuBLAS's float32.

    Raises TypeError if x is not float32, bfloat16 or float16.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if latents is not None:
        some = None if b is None else b[latents]
        values, indices = topk_encode(x, W[latents], some, k, path=path)
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

    η is what Triton reaches of cuBLAS's speed. In float32 the product itself is 3.5 times as long
    with three TF32 products, and 13 times with cuBLAS, which then has no tensor cores to use. Few
    tokens do not fill the fused kernel's tiles. All of this is estimated from published rates and
    from compiled code; not yet measured on a GPU.
    """
    if n < 128:
        return "chunked"
    efficiency = 0.93 if capability[0] == 9 else 0.85
    product, cublas = (3.5, 13.0) if dtype == torch.float32 else (1.0, 1.0)
    opened = 72 * (k * fused_group(m, k) / m) ** 2
    fused = product / efficiency + 200 / d + opened
    chunked = cublas + 615 / d
    return "fused" if fused < chunked else "chunked"


@triton.jit
def group_best_kernel(  # type: ignore[no-untyped-def]
    scores,  # (N, M) float32
    bias,  # (M,) or None
    best,  # (N, J) int32 out
    M,
    J,
    G: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program writes the key of the largest score + bias of BLOCK_J groups of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    latent = group[:, None] * G + tl.arange(0, G)[None, :]
    real = latent < M
    score = tl.load(scores + row * M + latent, mask=real, other=0.0)
    if bias is not None:
        score += tl.load(bias + latent, mask=real, other=0.0).to(tl.float32)
    key = tl.where(real, ordered(score + 0.0), LOWEST)
    tl.store(best + row * J + group, tl.max(key, 1), mask=group < J)


def chunked_group(m: int, k: int) -> int:
    """Latents a group: near √(M / K), where the bests and the picked groups' scores, both of which
    the selection holds in registers, are equally many. Not yet measured on a GPU."""
    return min(256, max(8, 2 ** round(math.log2(math.sqrt(m / k)))))


def group_best_block(group: int) -> int:
    """Groups a program of `group_best_kernel`: 4096 scores, 8 vectors of 16 bytes for each thread
    of 4 warps. From compiled code; not yet measured on a GPU."""
    return 4096 // group


def encode_chunked(x: Tensor, W: Tensor, b: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """Write the K largest of each row of x Wᵀ + b, at most 512 MiB of scores at a time.

    x (N, D), W (M, D), b (M,) → values, indices (N, K).
    """
    m, k = len(W), values.shape[1]
    for rows in pieces(len(x), 4 * m, _WORKSPACE_BYTES):
        _encode_chunk(x[rows], W, b, chunked_group(m, k), values[rows], indices[rows])


def _encode_chunk(
    x: Tensor, W: Tensor, b: Tensor | None, group: int, values: Tensor, indices: Tensor
) -> None:
    """The rows of one chunk; the scores are freed on return, before the next chunk's are made."""
    scores = product(x, W.T)
    n, m = scores.shape
    n_groups, block = triton.cdiv(m, group), group_best_block(group)
    best = torch.empty(n, n_groups, device=x.device, dtype=torch.int32)
    group_best_kernel[(n, triton.cdiv(n_groups, block))](
        scores, b, best, m, n_groups, G=group, BLOCK_J=block, num_warps=4
    )
    select_stored(scores, b, best, group, values, indices)
