"""The loss of a part of a batch and its gradients, written out as ops, without autograd.

    x̃ = (x − μ) / (σ + ε)                     c = x̃ − b_pre
    h = ReLU(TopK(W_enc c + b_enc))            x̂ = (Σ_k h · W_dec rows + b_pre) σ + μ
    e = (x − x̂) / (σ + ε)
    loss = mean_ℓ [ Σ_n |x − x̂|² / (n_tokens · variance_ℓ) ] + aux_weight · aux
    aux  = mean_ℓ [ Σ_n |e − ê|² / (n_tokens · error_variance_ℓ) ]
    ê = Σ ReLU(TopK_{k_aux} of W_enc c + b_enc among the dead latents) · W_dec rows, e being fixed

The gradient with respect to the decoder's output is −2 σ (σ + ε) e / (L · n_tokens · variance_ℓ): a
number per vector, times e. So e is all that is stored of the reconstruction: the loss, its gradient
and AuxK need no more. The gradient of aux reaches W_enc, W_dec and b_enc of dead latents only.

With batchtopk, TopK is the k · N largest of all vectors of the part (see `selection`).

The variances are of tokens seen before the step (see `metrics.Moments.variance`), and `n_tokens` is
the whole step's: so the losses and gradients of a step's parts add up to those of the whole,
however it is split; but batchtopk selects within a part. A masked token has weight 0 in all of it:
shapes do not depend on the mask, and nothing here waits for the device.

Legend: L layers, N tokens, D width of the residual stream, M latents, K active latents per token, Q
dead latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_topk import SparseTopKSAE, TopK, ops
from sparse_topk.auxk import auxk
from sparse_topk.torch_ops import CSC
from sparse_topk.training_ops import (
    decode_backward,
    decode_error,
    note_active_,
    reconstruction_error,
    standardize,
)

from ..model import ACTIVE, SIGMA_EPS
from ..sharding import Selection
from .selection import keep_largest
from .state import TrainState
from .step import Step


class _Weights(NamedTuple):
    """The weights in the dtype of the step."""

    W_enc: Tensor
    b_enc: Tensor | None
    W_dec: Tensor


@torch.no_grad()
def forward_backward(
    state: TrainState,
    step: Step,
    x: Tensor,
    mask: Tensor | None = None,
    lap: Callable[[str], None] = lambda stage: None,
) -> None:
    """Add the gradient of a part of the batch to the parameters' `grad`, and its metrics to `step`.

    Residuals x (L, N, D) in any floating-point dtype, of which the tokens where `mask` (N,) is
    False have no part in anything, whatever their residuals are; None: all have. Computed in
    `state.dtype`, with sums in float32 at least. `lap` is told when a stage ends. Collective when
    sharded.
    """
    mlsae, sae = state.mlsae, state.mlsae.sae
    eps = SIGMA_EPS if mlsae.config.standardize else None
    of = state.shadows.of
    weights = _Weights(of(sae.W_enc), None if sae.b_enc is None else of(sae.b_enc), of(sae.W_dec))
    shards = None if mlsae.shards.size == 1 else Selection(mlsae.shards, mlsae.config.k)

    centered, mean, std, moments = standardize(x, sae.b_dec, mask, state.dtype, eps)
    k = min(mlsae.config.k_max or mlsae.config.k, len(weights.W_enc))
    values, indices = ops.topk_encode(centered, weights.W_enc, weights.b_enc, k, relu=True)
    lap("encode")
    selected = None
    if mlsae.config.k_max is not None:
        values, selected = keep_largest(values, mask, len(x), mlsae.config.k, sae.n_latents)
    if shards is None:
        error, sq_error, error_moments = decode_error(
            values, indices, weights.W_dec, sae.b_dec, x, mean, std, mask, eps
        )
    else:
        values = shards.keep(values)
        x_hat = shards.sum(ops.gather_sum(values, indices, weights.W_dec)).add_(sae.b_dec)
        error, sq_error, error_moments = reconstruction_error(x_hat, x, mean, std, mask, eps)

    _add_gradients(
        sae, weights, centered, TopK(values, indices), error, std, step.factor, eps, shards
    )
    aux = _add_aux(state, step, weights, centered, error, mask)
    loss = sq_error @ step.factor
    loss = loss if aux is None else loss + state.aux_weight * aux
    step.metrics.add_part(loss, aux, sq_error, moments, error_moments, selected)
    now = state.tokens + step.n_tokens
    note_active_(state.last_active, values, indices, mask, ACTIVE, now)
    lap("rest of the SAE")


def _add_gradients(
    sae: SparseTopKSAE,
    weights: _Weights,
    centered: Tensor,
    codes: TopK,
    error: Tensor,
    std: Tensor,
    factor: Tensor,
    eps: float | None,
    shards: Selection | None,
) -> None:
    """Add the gradients of Σ_ℓ factor_ℓ Σ_n |x − x̂|²."""
    values, indices = codes
    d_scores, scaled, scale = decode_backward(
        error, indices, weights.W_dec, values, std, factor, eps
    )
    csc = ops.csc_by_latent(indices, len(weights.W_enc))
    _add_outer(sae.W_dec, scaled, csc, error)
    _add_outer(sae.W_enc, d_scores, csc, centered)
    by_latent = ops.sum_by_latent(d_scores, indices, csc)
    if sae.b_enc is not None:
        _add(sae.b_enc, by_latent)
    # b_pre is added to the output, and subtracted before the encoder: Σ_n d_centered[n] =
    # by_latent @ W_enc, one matrix-vector product.
    d_centered = by_latent.to(weights.W_enc.dtype) @ weights.W_enc
    if shards is not None:
        d_centered = shards.sum(d_centered)
    _add(sae.b_dec, scale @ error - d_centered)


def _add_aux(
    state: TrainState,
    step: Step,
    weights: _Weights,
    centered: Tensor,
    error: Tensor,
    mask: Tensor | None,
) -> Tensor | None:
    """Add the gradients of aux, times its weight; the value of aux (). None with no dead latents,
    with a weight of 0, and in the first step, which has no variance of errors to divide by."""
    sae, group, dead = state.mlsae.sae, state.mlsae.shards, step.dead
    if dead is None or state.aux_weight == 0:
        return None
    variance = state.error_variance
    if variance is None:
        return None
    n_layers = len(variance)
    wide = torch.promote_types(error.dtype, torch.float32)
    factor = (1 / (n_layers * step.n_tokens) / variance).to(wide)  # (L,)
    weight = factor[:, None].expand(-1, len(error) // n_layers)
    weight = (weight if mask is None else weight * mask).flatten()  # (L·N,)
    b_enc = None if weights.b_enc is None else weights.b_enc[dead]
    result = auxk(
        centered, error, weight * state.aux_weight,
        weights.W_enc[dead], b_enc, weights.W_dec[dead], state.k_aux,
        shards=None if group.size == 1 else Selection(group, state.k_aux),
        max_latents=None if group.size == 1 else math.ceil(sae.n_latents / group.size),
    )  # fmt: skip
    of_dead = (sae.W_enc, result.W_enc), (sae.W_dec, result.W_dec), (sae.b_enc, result.b_enc)
    for parameter, grad in of_dead:
        # The loss has begun all gradients; a missing bias has none.
        if parameter is not None and parameter.grad is not None and grad is not None:
            parameter.grad.index_add_(0, dead, grad.to(parameter.dtype))
    return weight.double() @ result.sq_error.double()


def _add_outer(parameter: nn.Parameter, values: Tensor, csc: CSC, x: Tensor) -> None:
    """Add `scatter_outer` to the parameter's gradient, or begin the gradient with it."""
    if parameter.grad is None:
        parameter.grad = ops.scatter_outer(values, csc, x, dtype=parameter.dtype)
    else:
        ops.scatter_outer(values, csc, x, out=parameter.grad)


def _add(parameter: nn.Parameter, grad: Tensor) -> None:
    """Add to the parameter's gradient, or begin it."""
    if parameter.grad is None:
        parameter.grad = grad.to(parameter.dtype)
    else:
        parameter.grad += grad
