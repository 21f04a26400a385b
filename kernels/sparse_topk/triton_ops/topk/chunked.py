"""The chunked way to the scores: torch.mm (cuBLAS) into a bounded workspace.

The scores of a chunk of tokens are stored in float32, and read once for the best of each group of
latents and once more for the groups that the selection picks. Sizes of groups and blocks are from
the cost model and compiled code, not from timings.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group, J groups.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...matmul import product, segments
from .keys import LOWEST, ordered
from .select import select_stored

_WORKSPACE_BYTES = 512 * 2**20  # of float32 scores held at a time


def encode_chunked(x: Tensor, W: Tensor, b: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """Write the K largest of each row of x Wᵀ + b, with at most 512 MiB of scores at a time.

    x (N, D), W (M, D), b (M,) → values, indices (N, K).
    """
    m, k = len(W), values.shape[1]
    for rows in segments(len(x), 4 * m, _WORKSPACE_BYTES):
        _encode_chunk(x[rows], W, b, chunked_group(m, k), values[rows], indices[rows])


def _encode_chunk(
    x: Tensor, W: Tensor, b: Tensor | None, group: int, values: Tensor, indices: Tensor
) -> None:
    """The rows of one chunk. On return its scores are freed, before the next chunk's are made."""
    scores = product(x, W.T)
    n, m = scores.shape
    n_groups, block = triton.cdiv(m, group), group_best_block(group)
    best = torch.empty(n, n_groups, device=x.device, dtype=torch.int32)
    group_best_kernel[(n, triton.cdiv(n_groups, block))](
        scores, b, best, m, n_groups, G=group, BLOCK_J=block, num_warps=4
    )
    select_stored(scores, b, best, group, values, indices)


def chunked_group(m: int, k: int) -> int:
    """Latents per group: near √(M / K), where there are as many bests as scores in picked groups,
    both of which the selection holds in registers."""
    return min(256, max(8, 2 ** round(math.log2(math.sqrt(m / k)))))


def group_best_block(group: int) -> int:
    """Groups per program of `group_best_kernel`: 4096 scores, 8 vectors of 16 bytes for each thread
    of 4 warps."""
    return 4096 // group


@triton.jit
def group_best_kernel(
    scores_ptr,  # (N, M) float32
    bias_ptr,  # (M,) or None
    best_ptr,  # (N, J) int32 out
    M,
    J,
    G: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program writes the key of the largest score + bias of BLOCK_J groups of one row."""
    pid_n = tl.program_id(0).to(tl.int64)
    offs_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_m = offs_j[:, None] * G + tl.arange(0, G)[None, :]
    mask_m = offs_m < M
    scores = tl.load(scores_ptr + pid_n * M + offs_m, mask=mask_m, other=0.0)
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)
    keys = tl.where(mask_m, ordered(scores + 0.0), LOWEST)
    tl.store(best_ptr + pid_n * J + offs_j, tl.max(keys, 1), mask=offs_j < J)
