"""The ops in plain torch: what runs on a CPU, and wherever Triton is turned off.

No (N, K, D) array is ever made, and the (N, M) scores are made a block of rows at a time.
`functional` checks the arguments; here they are trusted.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_optim import adam_unit_norm_ as adam_unit_norm_
from .torch_optim import apply_rows_ as apply_rows_
from .torch_optim import tangent_momentum_ as tangent_momentum_
from .torch_residuals import aux_residual as aux_residual
from .torch_residuals import decode_error as decode_error
from .torch_residuals import merge_moments as merge_moments
from .torch_residuals import note_active_ as note_active_
from .torch_residuals import reconstruction_error as reconstruction_error
from .torch_residuals import standardize as standardize

_BLOCK_BYTES = 64 * 2**20  # of scores held at a time
_TILE_BYTES = 4 * 2**20  # of scores computed at a time: their maxima are then taken in the cache
_MIN_BLOCK_ROWS = 256  # with fewer, W is read too often: 32 measured 2.1 times slower


class CSC(NamedTuple):
    """The codes' (N, M) matrix by columns, without its values: which tokens chose each latent.

    Latent m was chosen by the selections perm[indptr[m] : indptr[m + 1]], tokens ascending.
    Selection n · K + k is the k-th of token n.
    """

    perm: Tensor
    """(N·K,) the selections, sorted by latent."""
    indptr: Tensor
    """(M + 1,) where each latent's run begins in `perm`."""


def topk_encode(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """The K largest scores of each row of x Wᵀ + b; with `relu`, their ReLU.

    x (N, D), W (M, D), b (M,) → values (N, K) in x's dtype and indices (N, K) int64. Indices ascend
    within a row; ties go to the smaller index; NaN ranks above +Inf, as in `torch.topk`, so it is
    never dropped. With `relu`, which latents have the values 0 is left open; they are distinct.
    """
    n, m = len(x), len(W)
    rows = max(_MIN_BLOCK_ROWS, _BLOCK_BYTES // max(1, m * x.element_size()))
    values, indices = x.new_empty(n, k), x.new_empty(n, k, dtype=torch.int64)
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        values[block], indices[block] = _encode_block(x[block], W, b, k)
    return values.relu_() if relu else values, indices


def gather_sum(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n] = Σ_k values[n, k] · W[indices[n, k]]. (N, K), (N, K), (M, D) → (N, D)."""
    return F.embedding_bag(indices, W, mode="sum", per_sample_weights=values)


def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n, k] = x[n] · W[indices[n, k]]. (N, D), (N, K), (M, D) → (N, K)."""
    n, k = indices.shape
    offsets = torch.arange(0, n * k, k, device=x.device)
    tokens = torch.arange(n, device=x.device).repeat_interleave(k)
    # The gradient that torch itself uses for embedding_bag's weights: no (N, K, D) array.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, W, indices.flatten(), offsets, tokens, 0
    )
    return dots.view(n, k)


def csc_by_latent(indices: Tensor, n_latents: int) -> CSC:
    """Sort the selections (N, K) by latent, stably: every `scatter_outer` shares this one sort."""
    latents, perm = indices.flatten().int().sort(stable=True)
    bounds = torch.arange(n_latents + 1, device=indices.device, dtype=torch.int32)
    return CSC(perm, torch.searchsorted(latents, bounds))


def scatter_outer(
    values: Tensor,
    csc: CSC,
    x: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """out[m] = Σ values[n, k] · x[n] over the (n, k) that chose m; in a fixed order.

    values (N, K), x (N, D) → (M, D) in `dtype`, or x's; zero where no token chose m. If `out`
    (M, D) is given, in float32 at least, the sums are added to it, in its dtype.
    """
    dtype = out.dtype if out is not None else dtype or x.dtype
    values, x = values.to(dtype), x.to(dtype)
    tokens = csc.perm // values.shape[1]
    weights = values.flatten()[csc.perm]
    outer = F.embedding_bag(
        tokens, x, csc.indptr, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    return outer if out is None else out.add_(outer)


def sum_by_latent(values: Tensor, indices: Tensor, csc: CSC) -> Tensor:
    """out[m] = Σ values[n, k] over the (n, k) that chose m, in float32 at least; in a fixed order.

    values and indices (N, K) → (M,).
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    total = values.new_zeros(len(csc.indptr) - 1, dtype=dtype)
    return total.index_add_(0, indices.flatten(), values.flatten().to(dtype))


@torch.no_grad()
def decode_backward(
    error: Tensor,
    indices: Tensor,
    W: Tensor,
    values: Tensor,
    std: Tensor,
    factor: Tensor,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the error back to the scores: the gradient of Σ_ℓ factor_ℓ · sq_error_ℓ.

        scale[n] = −2 factor[ℓ] σ (σ + eps)          −2 factor[ℓ] with `eps` None
        scale[n] · error[n] is the gradient of the decoder's output, which is not stored
        d_scores[n, k] = scale[n] · error[n] · W[indices[n, k]], and 0 where values[n, k] <= 0
        scaled[n, k] = scale[n] · values[n, k]        so that dW = scatter_outer(scaled, error)

    A value that is NaN passes its gradient on.

    error (L·N, D), indices and values (L·N, K), W (M, D), std (L·N,), factor (L,) → d_scores and
    scaled (L·N, K) in values' dtype, scale (L·N,) in error's dtype.
    """
    wide = std if eps is None else std * (std + eps)
    scale = (wide.view(len(factor), -1) * (-2 * factor.to(std.dtype))[:, None]).flatten()
    d_values = gather_dot(error, indices, W).mul_(scale[:, None])
    d_scores = torch.ops.aten.threshold_backward(d_values, values, 0)
    scaled = torch.mul(values, scale[:, None], out=d_values)  # whose memory is free now
    return d_scores, scaled, scale.to(error.dtype)


def keep_topk_(z: Tensor, k: int) -> None:
    """Keep ReLU of the k largest of each row of z (N, Q), in place, and make all else 0.

    Ties go to the smaller index. NaN ranks above +Inf, and stays.
    """
    n_top = min(k + 1, z.shape[1])
    if k >= n_top:
        z.relu_()
        return
    top, indices = z.topk(n_top, dim=1)
    kth = top[:, k - 1]
    tied = ((kth == top[:, k]) & (kth > 0)).nonzero()[:, 0]  # topk took any of the equal ones
    if len(tied):
        indices[tied, :k] = _top_positions(z[tied], k)
    values = z.gather(1, indices[:, :k]).relu_()
    z.zero_().scatter_(1, indices[:, :k], values)


def _group_size(m: int, k: int) -> int:
    """Latents per group: near √(M/K), where group maxima and candidates cost the least together,
    and at least 32, because amax is not vectorized below; 1, no groups, if groups do not pay."""
    if m < 128 * k:
        return 1
    return max(32, 2 ** round(math.log2(math.sqrt(m / k))))


def _encode_block(x: Tensor, W: Tensor, b: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """`topk_encode` of few rows. The K groups with the largest maxima hold the top K: if one of
    them were in another group, K groups would each hold a larger one.

    The scores are laid out tile by tile, (M/C, N, C), so that a tile's maxima are taken while it
    is in the cache (see bench/NOTES.md, 2026-11-24).
    """
    n, m, group = len(x), len(W), _group_size(len(W), k)
    if group == 1:
        scores = x @ W.T if b is None else torch.addmm(b, x, W.T)
        indices = _top_positions(scores, k)
        return scores.gather(1, indices), indices
    width = max(1, min(_TILE_BYTES // (max(1, n) * x.element_size()), m) // group) * group
    tile_groups = width // group
    scores = x.new_empty(math.ceil(m / width), n, width)
    maxima = []
    for tile, first in zip(scores, range(0, m, width), strict=True):
        W_rows = W[first : first + width]
        if len(W_rows) < width:  # padding comes last, so it wins no tie with a latent
            tile[:, len(W_rows) :] = -math.inf
        if b is None:
            torch.mm(x, W_rows.T, out=tile[:, : len(W_rows)])
        else:
            torch.addmm(b[first : first + width], x, W_rows.T, out=tile[:, : len(W_rows)])
        wide = tile.to(torch.promote_types(x.dtype, torch.float32))  # bf16's amax is slow
        maxima.append(wide.unflatten(1, (tile_groups, group)).amax(2))
    groups = _top_positions(torch.cat(maxima, 1), k)  # (N, K)
    tokens = torch.arange(n, device=x.device)[:, None]
    group_rows = (groups // tile_groups * n + tokens) * tile_groups + groups % tile_groups
    candidates = F.embedding(group_rows, scores.view(-1, group)).flatten(1)  # (N, K·G), by latent
    positions = _top_positions(candidates, k)
    indices = groups.gather(1, positions // group) * group + positions % group
    return candidates.gather(1, positions), indices


def _top_positions(scores: Tensor, k: int) -> Tensor:
    """Positions of the K largest of each row, ascending, ties to the smaller position."""
    n_top = min(k + 1, scores.shape[1])
    top = scores.topk(n_top, dim=1)
    positions = top.indices[:, :k].sort(1).values
    if n_top > k:
        kth = top.values[:, k - 1, None]
        tied_rows = (kth == top.values[:, k:]).nonzero()[:, 0]
        if len(tied_rows):  # topk took any of the equal scores
            scores, kth = scores[tied_rows], kth[tied_rows]
            kept, equal = (scores <= kth).logical_not_(), scores == kth  # NaN is larger
            missing = k - kept.sum(1, keepdim=True)
            kept |= equal & (equal.cumsum(1) <= missing)
            positions[tied_rows] = kept.nonzero()[:, 1].view(-1, k)
    return positions
