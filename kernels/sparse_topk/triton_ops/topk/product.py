"""The fused way to the scores: a matrix product that keeps of each group of scores the best two.

    x Wᵀ + b → int32 keys (N, J), twice: 8 bytes per group of G latents instead of G scores

The scores stay in the registers of the tensor cores' accumulators. A key is a score's key
(`keys.py`), its last log2(G) bits replaced by the number of latents that follow in its group. So a
larger key is a larger score, or of equal scores (to a part in 2²³ / G) the smaller index.

On one H100 (2026-11-26, torch 2.11, Triton 3.6), persistent programs that multiply 128 × 256 × 64
tiles of bf16 with 8 warps were the fastest tried, as fast as cuBLAS. The other tiles are the
largest that compile without spilling, and sizes of groups are from the cost model.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group, J groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...matmul import segments
from ..precision import dot_precision
from ..sparse import gather_dot
from .keys import LOWEST, ordered
from .rescore import select_recomputed

_KEY_BYTES = 256 * 2**20  # of keys held at a time
_X_BYTES = 16 * 2**20  # of x that tiles in flight share: it stays in the L2 cache


class Tile(NamedTuple):
    """What one program multiplies at a time."""

    block_n: int
    block_m: int
    block_d: int
    warps: int
    stages: int


def encode_fused(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    values: Tensor,
    indices: Tensor,
    *,
    tma: bool | None = None,
) -> None:
    """Write the K largest of each row of x Wᵀ + b. The (N, M) scores are never stored, and at most
    256 MiB of keys are held at a time.

    x (N, D), W (M, D), b (M,) → values, indices (N, K). `tma` is as in `best_two`.
    """
    if not x.is_cuda and x.dtype == torch.bfloat16:  # the interpreter's `tl.dot` misreads it
        x, W = x.float(), W.float()
    m, k = len(W), values.shape[1]
    group = fused_group(m, k)
    for rows in segments(len(x), 8 * triton.cdiv(m, group), _KEY_BYTES):
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
    """Keys of the best and the second best of each group: two (N, J) int32.

    x (N, D), W (M, D), b (M,). `tma` picks the kernel with tensor descriptors, which needs rows of
    a multiple of 16 bytes; by default it is used wherever `describes` and alignment allow it.
    """
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
    band = max(8, min(64, _X_BYTES // (tile.block_n * d * x.element_size())))
    shared = {
        "G": group, "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "BLOCK_D": tile.block_d,
        "PRECISION": precision, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tma:
        x_desc = TensorDescriptor.from_tensor(x, [tile.block_n, tile.block_d])
        W_desc = TensorDescriptor.from_tensor(W, [tile.block_m, tile.block_d])
        best_two_tma_kernel[(min(tiles, programs),)](
            x_desc, W_desc, b, best, second, n, m, d, band, **shared
        )
    else:
        best_two_kernel[(tiles,)](x, W, b, best, second, n, m, d, band, **shared)
    return best, second


def fused_tile(capability: tuple[int, int], dtype: torch.dtype, precision: str, tma: bool) -> Tile:
    """The tile for a chip (compute capability; (0, 0) is the interpreter), an input dtype, a
    `tl.dot` precision, and loads by tensor descriptor (`tma`) or by pointer."""
    if capability[0] == 0:
        return Tile(8, 64, 16, 4, 1)
    if precision == "tf32x3":
        return Tile(128, 128 if tma else 64, 32, 8, 3)
    return Tile(128, 256 if tma else 128, 128 // dtype.itemsize, 8, 3)


def describes(capability: tuple[int, int]) -> bool:
    """Whether a chip takes tiles by tensor descriptor: sm_90 to sm_110. sm_120 knows descriptors
    too, but tiles spill there, and take 112 KiB of shared memory where 99 are (Triton 3.7)."""
    return 9 <= capability[0] < 12


def fused_group(m: int, k: int) -> int:
    """Latents per group: 64, or 32 if with 64 a token would open more than about one group (it
    opens K² G / 2M)."""
    return 64 if 32 * k * k <= m else 32


@triton.jit
def _block_of(tile, N, M, BAND_N, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Block of tokens and block of latents of a tile. BAND_N blocks of tokens pass over all latents
    together, so W is read once for all of them."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    band_tiles = BAND_N * tl.cdiv(M, BLOCK_M)
    first_n = tile // band_tiles * BAND_N
    band = min(blocks_n - first_n, BAND_N)
    return first_n + tile % band_tiles % band, tile % band_tiles // band


@triton.jit
def _best_two(best_a, second_a, best_b, second_b):
    second = tl.maximum(tl.minimum(best_a, best_b), tl.maximum(second_a, second_b))
    return tl.maximum(best_a, best_b), second


@triton.jit
def _store_best_two(
    scores,  # (BLOCK_N, BLOCK_M) float32, without the bias
    bias_ptr,  # (M,) or None
    best_ptr,  # (N, J) int32 out
    second_ptr,  # (N, J) int32 out
    pid_n,
    pid_m,
    N,
    M,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Pack a tile's scores into keys, and store the two largest of each row and group."""
    member = tl.arange(0, BLOCK_M)
    offs_m = pid_m * BLOCK_M + member
    bias = tl.zeros((BLOCK_M,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)
    scores += bias[None, :]
    keys = (ordered(scores) & -G) | (G - 1 - member % G)[None, :]
    if (pid_m + 1) * BLOCK_M > M:
        keys = tl.where((offs_m < M)[None, :], keys, LOWEST)
    keys = tl.reshape(keys, (BLOCK_N, BLOCK_M // G, G))
    best, second = tl.reduce((keys, tl.full(keys.shape, LOWEST, tl.int32)), 2, _best_two)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    offs_j = (pid_m * (BLOCK_M // G) + tl.arange(0, BLOCK_M // G))[None, :]
    J = tl.cdiv(M, G)
    offs = offs_n.to(tl.int64) * J + offs_j
    mask = (offs_n < N) & (offs_j < J)
    tl.store(best_ptr + offs, best, mask=mask)
    tl.store(second_ptr + offs, second, mask=mask)


@triton.jit
def best_two_tma_kernel(
    x_desc,  # descriptor of (N, D), blocks (BLOCK_N, BLOCK_D)
    W_desc,  # descriptor of (M, D), blocks (BLOCK_M, BLOCK_D)
    bias_ptr,  # (M,) or None
    best_ptr,  # (N, J) int32 out
    second_ptr,  # (N, J) int32 out
    N,
    M,
    D,
    BAND_N,  # blocks of tokens that pass over all latents together
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P programs, as many as the chip has processors: each multiplies every P-th tile."""
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        pid_n, pid_m = _block_of(tile, N, M, BAND_N, BLOCK_N, BLOCK_M)
        scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start_d in range(0, D, BLOCK_D):
            x = x_desc.load([pid_n * BLOCK_N, start_d])
            W = W_desc.load([pid_m * BLOCK_M, start_d])
            scores = tl.dot(x, W.T, scores, input_precision=PRECISION)
        _store_best_two(
            scores, bias_ptr, best_ptr, second_ptr, pid_n, pid_m, N, M, G, BLOCK_N, BLOCK_M
        )


@triton.jit
def best_two_kernel(
    x_ptr,  # (N, D)
    W_ptr,  # (M, D)
    bias_ptr,  # (M,) or None
    best_ptr,  # (N, J) int32 out
    second_ptr,  # (N, J) int32 out
    N,
    M,
    D,
    BAND_N,  # blocks of tokens that pass over all latents together
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program multiplies one tile: for chips and shapes that have no tensor descriptors."""
    pid_n, pid_m = _block_of(tl.program_id(0), N, M, BAND_N, BLOCK_N, BLOCK_M)
    # Past the end, another row's scores are computed twice; they are not stored.
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
    W_ptrs = W_ptr + offs_m.to(tl.int64)[None, :] * D + offs_d[:, None]
    scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        mask_d = offs_d < D - start_d
        x = tl.load(x_ptrs + start_d, mask=mask_d[None, :], other=0.0)
        W = tl.load(W_ptrs + start_d, mask=mask_d[:, None], other=0.0)
        scores = tl.dot(x, W, scores, input_precision=PRECISION)
    _store_best_two(scores, bias_ptr, best_ptr, second_ptr, pid_n, pid_m, N, M, G, BLOCK_N, BLOCK_M)
