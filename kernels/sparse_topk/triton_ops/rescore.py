"""Selection without stored scores: what a few groups hold is computed once more.

Legend: N tokens, D inputs, M latents, K active latents a token, G latents a group, J groups, P
picked groups a token at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense import pieces
from .select import pick_groups, rank

_BYTES = 256 * 2**20  # of opened groups' scores held at a time


@triton.jit
def rescore_kernel(  # type: ignore[no-untyped-def]
    x,  # (N, D)
    W,  # (M, D)
    bias,  # (M,) or None
    picks,  # (N, P) int32
    scores,  # (N, P, G) float32 out, of opened groups only
    D,
    M,
    P,
    G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes the scores of a row's opened groups again, group after group."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK_P)
    pick = tl.load(picks + row * P + slots, mask=slots < P, other=-1)
    waiting = tl.where((pick >= 0) & ((pick & 1) == 1), slots, BLOCK_P)
    slot = tl.min(waiting, 0)
    member = tl.arange(0, G)
    d = tl.arange(0, BLOCK_D)
    while slot < BLOCK_P:
        latent = (tl.load(picks + row * P + slot) >> 1) * G + member
        real = latent < M
        weight = W + latent.to(tl.int64)[:, None] * D + d[None, :]
        sums = tl.zeros((G, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            left = d < D - start
            w = tl.load(weight + start, mask=real[:, None] & left[None, :], other=0.0)
            part = tl.load(x + row * D + start + d, mask=left, other=0.0)
            sums += w.to(tl.float32) * part.to(tl.float32)[None, :]
        score = tl.sum(sums, 1)
        if bias is not None:
            score += tl.load(bias + latent, mask=real, other=0.0).to(tl.float32)
        tl.store(scores + (row * P + slot) * G + member, score)
        waiting = tl.where(waiting > slot, waiting, BLOCK_P)
        slot = tl.min(waiting, 0)


def rescore_width(group: int) -> int:
    """Inputs a step of `rescore_kernel`: 4096 products, 32 a thread of 4 warps. From compiled
    code; not yet measured on a GPU."""
    return 4096 // group


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
    for rows in pieces(len(x), 4 * slots * group, _BYTES):
        part = x[rows]
        picks = pick_groups(best[rows], second[rows], k, m, group)
        scores = torch.empty(len(part), slots, group, device=x.device, dtype=torch.float32)
        rescore_kernel[(len(part),)](
            part, W, bias, picks, scores, d, m, slots,
            G=group, BLOCK_P=triton.next_power_of_2(slots), BLOCK_D=rescore_width(group),
            num_warps=4,
        )  # fmt: skip
        rank(scores, best[rows], None, picks, values[rows], indices[rows], m, group, two=True)
        del scores  # before the next are made
