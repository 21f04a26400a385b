"""Selection without stored scores: the scores of the few opened groups are computed again.

`rescore_width` is from compiled code, not from timings.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group, J groups, P
picked groups per token at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...matmul import segments
from .select import pick_groups, rank

_BYTES = 256 * 2**20  # of opened groups' scores held at a time


def select_recomputed(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    best: Tensor,
    second: Tensor,
    group: int,
    values: Tensor,
    indices: Tensor,
) -> None:
    """Write the K largest of each row of x Wᵀ + bias, compared without their last log2(G) bits.

    x (N, D), W (M, D), bias (M,), best and second (N, J) int32, whose last log2(G) bits count the
    members of a group that follow → values (truncated alike), indices (N, K).
    """
    k, (m, d) = values.shape[1], W.shape
    slots = min(k, best.shape[1])
    for rows in segments(len(x), 4 * slots * group, _BYTES):
        x_rows = x[rows]
        picks = pick_groups(best[rows], second[rows], k, m, group)
        scores = torch.empty(len(x_rows), slots, group, device=x.device, dtype=torch.float32)
        rescore_kernel[(len(x_rows),)](
            x_rows, W, bias, picks, scores, d, m, slots,
            G=group, BLOCK_P=triton.next_power_of_2(slots), BLOCK_D=rescore_width(group),
            num_warps=4,
        )  # fmt: skip
        rank(scores, best[rows], None, picks, values[rows], indices[rows], m, group, two=True)
        del scores  # before the next are made


def rescore_width(group: int) -> int:
    """Inputs per step of `rescore_kernel`: 4096 products, 32 for each thread of 4 warps."""
    return 4096 // group


@triton.jit
def rescore_kernel(
    x_ptr,  # (N, D)
    W_ptr,  # (M, D)
    bias_ptr,  # (M,) or None
    picks_ptr,  # (N, P) int32
    scores_ptr,  # (N, P, G) float32 out, of opened groups only
    D,
    M,
    P,
    G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes the scores of a row's opened groups again, group after group."""
    pid_n = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    picks = tl.load(picks_ptr + pid_n * P + offs_p, mask=offs_p < P, other=-1)
    waiting = tl.where((picks >= 0) & ((picks & 1) == 1), offs_p, BLOCK_P)
    slot = tl.min(waiting, 0)
    offs_g = tl.arange(0, G)
    offs_d = tl.arange(0, BLOCK_D)
    while slot < BLOCK_P:
        offs_m = (tl.load(picks_ptr + pid_n * P + slot) >> 1) * G + offs_g
        mask_m = offs_m < M
        W_ptrs = W_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
        acc = tl.zeros((G, BLOCK_D), tl.float32)
        for start_d in range(0, D, BLOCK_D):
            mask_d = offs_d < D - start_d
            W = tl.load(W_ptrs + start_d, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
            x = tl.load(x_ptr + pid_n * D + start_d + offs_d, mask=mask_d, other=0.0)
            acc += W.to(tl.float32) * x.to(tl.float32)[None, :]
        scores = tl.sum(acc, 1)
        if bias_ptr is not None:
            scores += tl.load(bias_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)
        tl.store(scores_ptr + (pid_n * P + slot) * G + offs_g, scores)
        waiting = tl.where(waiting > slot, waiting, BLOCK_P)
        slot = tl.min(waiting, 0)
