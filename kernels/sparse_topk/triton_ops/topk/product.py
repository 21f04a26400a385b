"""The scores: a matrix product that keeps of each group of G scores the T largest, as keys.

    x Wᵀ + b → int32 keys (N, T, J): 4 T bytes per group of latents instead of G scores

The scores stay in the registers of the tensor cores' accumulators. A key is a score's key
(`keys.py`), its last log2(G) bits replaced by the number of latents that follow in its group. So a
larger key is a larger score, or of equal scores (to a part in 2²³ / G) the smaller index.

Legend: N tokens, D inputs, M latents, G latents per group, J groups, T keys per group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..precision import dot_precision
from .keys import LOWEST, key_of

_X_BYTES = 16 * 2**20  # of x that tiles in flight share: it stays in the L2 cache


class Tile(NamedTuple):
    """What one program multiplies at a time."""

    block_n: int
    block_m: int
    block_d: int
    warps: int
    stages: int


def top_keys(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    n_keys: int,
    group: int,
    relu: bool,
    *,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> Tensor:
    """The keys of each group's `n_keys` largest scores, the largest first: (N, T, J) int32. A group
    with fewer latents than keys ends in LOWEST. With `relu`, keys are of ReLU(score).

    x (N, D), W (M, D), b (M,). `tile` overrides `product_tile`. `tma` picks the kernel with tensor
    descriptors, which needs rows of a multiple of 16 bytes; by default it is used wherever
    `describes` and alignment allow it.
    """
    (n, d), m = x.shape, len(W)
    capability, processors = (0, 0), 3
    if x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    if tma is None:
        aligned = d * x.element_size() % 16 == 0 and x.data_ptr() % 16 == W.data_ptr() % 16 == 0
        tma = describes(capability) and aligned
    precision = dot_precision(x.dtype)
    if tile is None:
        tile = product_tile(capability, x.dtype, precision, tma, group, n, m, processors)
    keys = torch.empty(n, n_keys, triton.cdiv(m, group), device=x.device, dtype=torch.int32)
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    band = max(8, min(64, _X_BYTES // (tile.block_n * d * x.element_size())))
    shared = {
        "G": group, "T": n_keys, "RELU": relu, "PRECISION": precision,
        "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "BLOCK_D": tile.block_d,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tma:
        x_desc = TensorDescriptor.from_tensor(x, [tile.block_n, tile.block_d])
        W_desc = TensorDescriptor.from_tensor(W, [tile.block_m, tile.block_d])
        top_keys_tma_kernel[(min(tiles, processors),)](
            x_desc, W_desc, b, keys, n, m, d, band, **shared
        )
    else:
        top_keys_kernel[(tiles,)](x, W, b, keys, n, m, d, band, **shared)
    return keys


def product_tile(
    capability: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    tma: bool,
    group: int,
    n: int,
    m: int,
    processors: int,
) -> Tile:
    """The tile for a chip (compute capability, (0, 0) is the interpreter; and its number of
    processors), an input dtype, a `tl.dot` precision, loads by tensor descriptor (`tma`) or by
    pointer, G, and N tokens and M latents.

    On one H100 (2026-11-26, torch 2.11, Triton 3.6), persistent programs that multiply
    128 × 256 × 64 tiles of bf16 with 8 warps were the fastest tried for 8192 tokens, as fast as
    cuBLAS. All others are not timed: the largest that compile without spilling, and for few tokens
    the smallest that hold them, with blocks of latents that leave no processor idle.
    """
    if capability[0] == 0:
        return Tile(min(8, triton.next_power_of_2(n)), 64, 16, 4, 1)
    block_d = 128 // dtype.itemsize
    if n <= 64:
        block_n = max(16, triton.next_power_of_2(n))
        return Tile(block_n, 128 if m >= 128 * processors else 64, block_d, 4, 4)
    if precision == "tf32x3":
        return Tile(128, 128 if tma and group == 64 else 64, 32, 8, 3)
    fills = triton.cdiv(n, 128) * triton.cdiv(m, 256) >= processors
    wide = tma and fills and group >= (32 if capability[0] == 9 else 64)
    return Tile(128, 256 if wide else 128, block_d, 8, 3)


def describes(capability: tuple[int, int]) -> bool:
    """Whether a chip takes tiles by tensor descriptor: sm_90 to sm_110. sm_120 knows descriptors
    too, but tiles spill there, and take 112 KiB of shared memory where 99 are (Triton 3.7)."""
    return 9 <= capability[0] < 12


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
def _largest_2(a1, a2, b1, b2):
    return tl.maximum(a1, b1), tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))


@triton.jit
def _largest_3(a1, a2, a3, b1, b2, b3):
    c1, c2 = _largest_2(a1, a2, b1, b2)
    mixed = tl.maximum(tl.minimum(a1, b2), tl.minimum(a2, b1))
    return c1, c2, tl.maximum(tl.maximum(a3, b3), mixed)


@triton.jit
def _largest_4(a1, a2, a3, a4, b1, b2, b3, b4):
    c1, c2, c3 = _largest_3(a1, a2, a3, b1, b2, b3)
    mixed = tl.maximum(tl.minimum(a1, b3), tl.minimum(a3, b1))
    return c1, c2, c3, tl.maximum(tl.maximum(tl.maximum(a4, b4), tl.minimum(a2, b2)), mixed)


@triton.jit
def _largest(keys, T: tl.constexpr):
    """The T largest along axis 2, in order. Each key starts as the first of T, the others LOWEST;
    two such lists merge into the T largest of both."""
    tl.static_assert(T == 2 or T == 3 or T == 4)
    none = tl.full(keys.shape, LOWEST, tl.int32)
    if T == 2:
        largest = tl.reduce((keys, none), 2, _largest_2)
    elif T == 3:
        largest = tl.reduce((keys, none, none), 2, _largest_3)
    else:
        largest = tl.reduce((keys, none, none, none), 2, _largest_4)
    return largest


@triton.jit
def _store_top_keys(
    scores,  # (BLOCK_N, BLOCK_M) float32, without the bias
    bias_ptr,  # (M,) or None
    keys_ptr,  # (N, T, J) int32 out
    pid_n, pid_m, N, M,
    G: tl.constexpr, T: tl.constexpr, RELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Pack a tile's scores into keys, and store the T largest of each row and group."""
    member = tl.arange(0, BLOCK_M)
    offs_m = pid_m * BLOCK_M + member
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)
        scores += bias[None, :]
    keys = (key_of(scores, RELU) & -G) | (G - 1 - member % G)[None, :]
    if (pid_m + 1) * BLOCK_M > M:
        keys = tl.where((offs_m < M)[None, :], keys, LOWEST)
    largest = _largest(tl.reshape(keys, (BLOCK_N, BLOCK_M // G, G)), T)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    offs_j = (pid_m * (BLOCK_M // G) + tl.arange(0, BLOCK_M // G))[None, :]
    J = tl.cdiv(M, G)
    ptrs = keys_ptr + offs_n.to(tl.int64) * (J * T) + offs_j
    mask = (offs_n < N) & (offs_j < J)
    for t in tl.static_range(T):
        tl.store(ptrs + t * J, largest[t], mask=mask)


@triton.jit
def top_keys_tma_kernel(
    x_desc,  # descriptor of (N, D), blocks (BLOCK_N, BLOCK_D)
    W_desc,  # descriptor of (M, D), blocks (BLOCK_M, BLOCK_D)
    bias_ptr,  # (M,) or None
    keys_ptr,  # (N, T, J) int32 out
    N,
    M,
    D,
    BAND_N,  # blocks of tokens that pass over all latents together
    G: tl.constexpr,
    T: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
        _store_top_keys(
            scores, bias_ptr, keys_ptr, pid_n, pid_m, N, M, G, T, RELU, BLOCK_N, BLOCK_M
        )


@triton.jit
def top_keys_kernel(
    x_ptr,  # (N, D)
    W_ptr,  # (M, D)
    bias_ptr,  # (M,) or None
    keys_ptr,  # (N, T, J) int32 out
    N,
    M,
    D,
    BAND_N,  # blocks of tokens that pass over all latents together
    G: tl.constexpr,
    T: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    _store_top_keys(scores, bias_ptr, keys_ptr, pid_n, pid_m, N, M, G, T, RELU, BLOCK_N, BLOCK_M)
