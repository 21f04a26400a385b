"""The products of sparse codes and their backward pass, in plain torch. No (N, K, D) array is made.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CSC(NamedTuple):
    """The codes' (N, M) matrix by columns, without its values: which tokens chose each latent.

    Latent m was chosen by the selections perm[indptr[m] : indptr[m + 1]], tokens ascending.
    Selection n · K + k is the k-th of token n.
    """

    perm: Tensor
    """(N·K,) the selections, sorted by latent."""
    indptr: Tensor
    """(M + 1,) where each latent's run begins in `perm`."""


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
