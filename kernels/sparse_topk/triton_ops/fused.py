"""The fused producer: a matrix product that keeps of each group of scores the best two.

    x Wᵀ + b → int32 keys (N, J), twice: 8 bytes a group of G latents instead of G scores

The scores stay in the registers of the tensor cores' accumulators. A key is a score in order-
preserving int32, its last log2(G) bits replaced by the number of latents that follow in its group;
so a larger key is a larger score, or of equal ones (to a part in 2²³ / G) the smaller index.

Legend: N tokens, D inputs, M latents, K active latents a token, G latents a group, J groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .dense import pieces
from .rescore import select_recomputed
from .select import LOWEST, ordered
from .sparse import gather_dot

_KEY_BYTES = 256 * 2**20  # of keys held at a time
_X_BYTES = 16 * 2**20  # of x that tiles in flight share: it stays in the L2 cache


class Tile(NamedTuple):
    """What one program multiplies at a time."""

    block_n: int
    block_m: int
    block_d: int
    warps: int
    stages: int


def fused_tile(capability: tuple[int, int], dtype: torch.dtype, precision: str, tma: bool) -> Tile:
    """The tile for a chip (compute capability; (0, 0) the interpreter), an input dtype, a `tl.dot`
    precision, and loads by tensor descriptor or by pointer: the largest that compiles without
    spilling. Not yet measured on a GPU."""
    if capability[0] == 0:
        return Tile(8, 64, 16, 4, 1)
    if precision == "tf32x3":
        return Tile(128, 128 if tma else 64, 32, 8, 3)
    return Tile(128, 256 if tma else 128, 128 // dtype.itemsize, 8, 3)


def describes(capability: tuple[int, int]) -> bool:
    """Whether a chip takes tiles by tensor descriptor: sm_90 to sm_110. sm_120 knows them, but they
    spill there, and take 112 KiB of shared memory where 99 are (Triton 3.7)."""
    return 9 <= capability[0] < 12


def fused_group(m: int, k: int) -> int:
    """Latents a group: 64, or 32 where with 64 a token would open more than a group or so
    (K² G / 2M of them). Not yet measured on a GPU."""
    return 64 if 32 * k * k <= m else 32


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: one TF32 product where torch's own switch allows it, else three,
    which keep about 22 bits of each factor. Half-precision products are exact in any case."""
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9: the old switch raises once this one is used
        allowed = matmul.fp32_precision == "tf32"
    else:
        allowed = matmul.allow_tf32
    return "tf32" if allowed else "tf32x3"


@triton.jit
def _tile_at(tile, N, M, ROWS, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Block of tokens and block of latents of a tile: ROWS blocks of tokens pass together over
    all latents, so that W streams past once for all of them."""
    blocks = tl.cdiv(N, BLOCK_N)
    band = ROWS * tl.cdiv(M, BLOCK_M)
    first = tile // band * ROWS
    height = min(blocks - first, ROWS)
    return first + tile % band % height, tile % band // height


@triton.jit
def _best_two(best_a, second_a, best_b, second_b):  # type: ignore[no-untyped-def]
    second = tl.maximum(tl.minimum(best_a, best_b), tl.maximum(second_a, second_b))
    return tl.maximum(best_a, best_b), second


@triton.jit
def _store_best_two(  # type: ignore[no-untyped-def]
    scores,  # (BLOCK_N, BLOCK_M) float32, without the bias
    bias,  # (M,) or None
    best,  # (N, J) int32 out
    second,  # (N, J) int32 out
    block_n,
    block_m,
    N,
    M,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Pack a tile's scores into keys, and store the two largest of each row and group."""
    member = tl.arange(0, BLOCK_M)
    latent = block_m * BLOCK_M + member
    addend = tl.zeros((BLOCK_M,), tl.float32)
    if bias is not None:
        addend += tl.load(bias + latent, mask=latent < M, other=0.0).to(tl.float32)
    scores += addend[None, :]
    keys = (ordered(scores) & -G) | (G - 1 - member % G)[None, :]
    if (block_m + 1) * BLOCK_M > M:
        keys = tl.where((latent < M)[None, :], keys, LOWEST)
    keys = tl.reshape(keys, (BLOCK_N, BLOCK_M // G, G))
    largest, next_largest = tl.reduce((keys, tl.full(keys.shape, LOWEST, tl.int32)), 2, _best_two)
    row = (block_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    group = (block_m * (BLOCK_M // G) + tl.arange(0, BLOCK_M // G))[None, :]
    J = tl.cdiv(M, G)
    out = row.to(tl.int64) * J + group
    inside = (row < N) & (group < J)
    tl.store(best + out, largest, mask=inside)
    tl.store(second + out, next_largest, mask=inside)


@triton.jit
def best_two_tma_kernel(  # type: ignore[no-untyped-def]
    x,  # descriptor of (N, D), blocks (BLOCK_N, BLOCK_D)
    W,  # descriptor of (M, D), blocks (BLOCK_M, BLOCK_D)
    bias,  # (M,) or None
    best,  # (N, J) int32 out
    second,  # (N, J) int32 out
    N,
    M,
    D,
    ROWS,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program of as many as the chip has processors multiplies every so-many-th tile."""
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block_n, block_m = _tile_at(tile, N, M, ROWS, BLOCK_N, BLOCK_M)
        scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for d in range(0, D, BLOCK_D):
            left = x.load([block_n * BLOCK_N, d])
            right = W.load([block_m * BLOCK_M, d])
            scores = tl.dot(left, right.T, scores, input_precision=PRECISION)
        _store_best_two(scores, bias, best, second, block_n, block_m, N, M, G, BLOCK_N, BLOCK_M)


@triton.jit
def best_two_kernel(  # type: ignore[no-untyped-def]
    x,  # (N, D)
    W,  # (M, D)
    bias,  # (M,) or None
    best,  # (N, J) int32 out
    second,  # (N, J) int32 out
    N,
    M,
    D,
    ROWS,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program multiplies one tile: for chips and shapes that have no tensor descriptors."""
    block_n, block_m = _tile_at(tl.program_id(0), N, M, ROWS, BLOCK_N, BLOCK_M)
    # Past the end, another row's scores are computed twice; they are not stored.
    token = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    latent = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    d = tl.arange(0, BLOCK_D)
    lefts = x + token.to(tl.int64)[:, None] * D + d[None, :]
    rights = W + latent.to(tl.int64)[None, :] * D + d[:, None]
    scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        real = d < D - start
        left = tl.load(lefts + start, mask=real[None, :], other=0.0)
        right = tl.load(rights + start, mask=real[:, None], other=0.0)
        scores = tl.dot(left, right, scores, input_precision=PRECISION)
    _store_best_two(scores, bias, best, second, block_n, block_m, N, M, G, BLOCK_N, BLOCK_M)


def encode_fused(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    values: Tensor,
    indices: Tensor,
    *,
    tma: bool | None = None,
) -> None:
    """Write the K largest of each row of x Wᵀ + b, its (N, M) scores never stored; at most
    256 MiB of keys at a time.

    x (N, D), W (M, D), b (M,) → values, indices (N, K). `tma` picks the kernel with tensor
    descriptors (rows of a multiple of 16 bytes), by default wherever `describes` and they allow.
    """
    if not x.is_cuda and x.dtype == torch.bfloat16:  # the interpreter's `tl.dot` misreads it
        x, W = x.float(), W.float()
    m, k = len(W), values.shape[1]
    group = fused_group(m, k)
    for rows in pieces(len(x), 8 * triton.cdiv(m, group), _KEY_BYTES):
        keys = best_two(x[rows], W, b, group, tma=tma)
        select_recomputed(x[rows], W, b, *keys, group, values[rows], indices[rows])
        del keys  # before the next are made
    if values.dtype == torch.float32:
        values.copy_(gather_dot(x, indices, W))
        if b is not None:
            values += b[indices]


def best_two(
    x: Tensor, W: Tensor, b: Tensor | None, group: int, *, tma: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Keys of the best and the second best of each group: two (N, J) int32."""
    (n, d), m = x.shape, len(W)
    capability, programs = (0, 0), 3
    if x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    if tma is None:
        aligned = d * x.element_size() % 16 == 0 and x.data_ptr() % 16 == W.data_ptr() % 16 == 0
        tma = describes(capability) and aligned
    precision = dot_precision(x.dtype)
    tile = fused_tile(capability, x.dtype, precision, tma)
    n_groups = triton.cdiv(m, group)
    best = torch.empty(n, n_groups, device=x.device, dtype=torch.int32)
    second = torch.empty_like(best)
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    rows = max(8, min(64, _X_BYTES // (tile.block_n * d * x.element_size())))
    shared = {
        "G": group, "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "BLOCK_D": tile.block_d,
        "PRECISION": precision, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tma:
        x_blocks = TensorDescriptor.from_tensor(x, [tile.block_n, tile.block_d])
        W_blocks = TensorDescriptor.from_tensor(W, [tile.block_m, tile.block_d])
        best_two_tma_kernel[(min(tiles, programs),)](
            x_blocks, W_blocks, b, best, second, n, m, d, rows, **shared
        )
    else:
        best_two_kernel[(tiles,)](x, W, b, best, second, n, m, d, rows, **shared)
    return best, second
