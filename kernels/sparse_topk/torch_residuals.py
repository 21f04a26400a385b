"""The ops of a training step beside its sparse products, in plain torch: `standardize` before the
encoder, and `decode_error` after it, or `reconstruction_error` if the decoder's output is given;
then `note_active_` and `merge_moments`.

The first three read the residual stream, a block of tokens at a time, so that what is computed on
the way stays in the cache; x is never converted whole. None is differentiable: whoever trains with
them writes the backward.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token, T tokens per
block, B blocks per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_BYTES = 2**20  # of one array of a block; with 2**22, D = 512 measured 1.25 times slower


class TokenMoments(NamedTuple):
    """Mean and spread over the kept tokens of a batch, all float64."""

    n_tokens: Tensor
    """() how many they are."""
    mean: Tensor
    """(L, D) their mean; 0 if there are none."""
    sq_dev: Tensor
    """(L, D) Σ_n (x[n] − mean)², per dimension."""


@torch.no_grad()
def standardize(
    x: Tensor, center: Tensor | None, mask: Tensor | None, dtype: torch.dtype, eps: float | None
) -> tuple[Tensor, Tensor, Tensor, TokenMoments]:
    """The vectors that the encoder multiplies, and the moments of x.

        μ, σ = mean and unbiased standard deviation of x[ℓ, n] over its D elements
        centered = (x − μ) / (σ + eps) − center

    With `eps` None, nothing is standardized: μ = 0, σ = 1, centered = x − center. Tokens where
    `mask` is False are not counted, and have centered = 0 and μ = 0, σ = 0 (1 with `eps` None),
    whatever x holds there. A constant vector has σ = 0 and centered = −center, exactly. In kept
    tokens, values that are not finite stay so, here and in the moments.

    x (L, N, D), center (D,), mask (N,) bool → centered (L·N, D) in `dtype`; mean and std (L·N,),
    float32, or float64 if x is; the moments of x.
    """
    (n_layers, n, d), acc_dtype = x.shape, torch.promote_types(x.dtype, torch.float32)
    centered = x.new_empty(n_layers * n, d, dtype=dtype)
    mean = x.new_zeros(n_layers * n, dtype=acc_dtype)
    std = torch.full_like(mean, eps is None)
    shift = x.new_zeros(d, dtype=acc_dtype) if center is None else -center.to(acc_dtype)
    columns = _ColumnMoments(x, mask)
    for rows, tokens, dropped in columns.blocks():
        tokens = tokens.to(acc_dtype)
        if len(dropped):
            tokens = tokens.index_fill(0, dropped, 0)
        columns.add(tokens, dropped)
        if eps is None:
            block = tokens + shift
        else:
            block = _deviations(tokens, mean[rows], std[rows])
            torch.addcdiv(shift, block, (std[rows] + eps)[:, None], out=block)
        centered[rows] = block.index_fill_(0, dropped, 0)
    return centered, mean, std, columns.total()


def _deviations(tokens: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """x − μ of a block (T, D), which may be overwritten; writes μ and σ to `mean` and `std` (T,).

    The first mean is off by a rounding, which the mean of the deviations corrects: a constant
    vector then has deviations of 0.
    """
    torch.mean(tokens, 1, out=mean)
    deviations = tokens - mean[:, None]
    mean += deviations.mean(1)
    torch.sub(tokens, mean[:, None], out=deviations)
    torch.linalg.vector_norm(deviations, dim=1, out=std)
    std /= math.sqrt(tokens.shape[1] - 1) if tokens.shape[1] > 1 else 0.0
    return deviations


@torch.no_grad()
def decode_error(
    values: Tensor,
    indices: Tensor,
    W: Tensor,
    b: Tensor | None,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    mask: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor, TokenMoments]:
    """What the codes leave of x, its square, and its moments.

        x̃̂ = Σ_k values[n, k] · W[indices[n, k]] + b        never rounded
        x̂ = x̃̂ σ + μ
        error = (x − x̂) / (σ + eps)        in standardized units
        sq_error[ℓ] = Σ_n |x − x̂|²         in the units of x

    `mean`, `std`, `mask` and `eps` are those of `standardize`. Tokens where `mask` is False have
    error = 0 and are not counted, whatever x holds there. In kept tokens, values that are not
    finite stay so, in all results.

    values and indices (L·N, K), W (M, D), b (D,), x (L, N, D), mean and std (L·N,), mask (N,) →
    error (L·N, D) in W's dtype; sq_error (L,) float64; the moments of `error` before it is rounded.
    """
    acc_dtype = torch.promote_types(W.dtype, torch.float32)
    rows, weights = W.to(acc_dtype), values.to(acc_dtype)

    def decoded(block: slice) -> Tensor:
        x_hat = F.embedding_bag(indices[block], rows, mode="sum", per_sample_weights=weights[block])
        return x_hat if b is None else x_hat.add_(b)

    return _error(decoded, W.dtype, x, mean, std, mask, eps)


@torch.no_grad()
def reconstruction_error(
    x_hat: Tensor, x: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor, TokenMoments]:
    """`decode_error` with its x̃̂ given, as `x_hat` (L·N, D); the error is in its dtype."""
    return _error(lambda block: x_hat[block], x_hat.dtype, x, mean, std, mask, eps)


def _error(
    decoded: Callable[[slice], Tensor],
    dtype: torch.dtype,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    mask: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor, TokenMoments]:
    """The results of `decode_error`, from `decoded`, which gives x̃̂ (T, D) of a block of rows."""
    n_layers, n, d = x.shape
    error = x.new_empty(n_layers * n, d, dtype=dtype)
    sq_errors = mean.new_empty(n_layers * n, dtype=torch.float64)
    columns = _ColumnMoments(x, mask)
    for rows, tokens, dropped in columns.blocks():
        missed = tokens - mean[rows, None]
        missed.addcmul_(decoded(rows), std[rows, None], value=-1).index_fill_(0, dropped, 0)
        sq_errors[rows] = torch.linalg.vector_norm(missed, dim=1)
        if eps is not None:
            missed /= (std[rows] + eps)[:, None]
        columns.add(missed, dropped)
        error[rows] = missed
    return error, sq_errors.square_().view(n_layers, n).sum(1), columns.total()


def aux_residual(
    e_hat: Tensor, error: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """|r_n|² and weight_n / scale · r_n, where r = ê − error, and 0 where the weight is 0.

    ê and error (N, D), weight (N,), scale () → (N,) in the weight's dtype, (N, D) in the error's.
    """
    r = torch.sub(e_hat.to(weight.dtype), error)
    dropped = (weight == 0)[:, None]
    r.masked_fill_(dropped, 0)
    sq_error = torch.linalg.vector_norm(r, dim=1).square()
    return sq_error, r.mul_((weight[:, None] / scale).masked_fill_(dropped, 0)).to(error.dtype)


@torch.no_grad()
def note_active_(
    last_active: Tensor,
    values: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    threshold: float,
    now: int,
) -> None:
    """last_active[indices[n, k]] = now for the kept tokens n with values[n, k] > threshold.

    last_active (M,) int64, values and indices (L·N, K), mask (N,).
    """
    is_active = values > threshold
    if mask is not None and len(mask):
        is_active &= mask.repeat(len(values) // len(mask))[:, None]
    last_active[indices[is_active]] = now


@torch.no_grad()
def merge_moments(a: TokenMoments, b: TokenMoments) -> TokenMoments:
    """The moments of the tokens of both (Chan, Golub and LeVeque, 1983)."""
    n_tokens = a.n_tokens + b.n_tokens
    share = b.n_tokens / n_tokens.clamp_min(1)
    delta = b.mean - a.mean
    sq_dev = a.sq_dev + b.sq_dev + delta.square() * (a.n_tokens * share)
    return TokenMoments(n_tokens, a.mean + delta * share, sq_dev)


class _ColumnMoments:
    """Moments of vectors that come in blocks, as x (L, N, D) does: each block's about its own mean
    and in its own dtype, merged in float64 (Chan, Golub and LeVeque, 1983)."""

    def __init__(self, x: Tensor, mask: Tensor | None) -> None:
        (_, n, d), self.x = x.shape, x
        self.size = max(1, _BLOCK_BYTES // (4 * max(1, d)))  # T
        kept = x.new_ones(n, dtype=torch.bool) if mask is None else mask
        self.count = kept.sum(dtype=torch.float64)
        self.counts = torch.stack([part.sum(dtype=torch.float64) for part in kept.split(self.size)])
        # Few tokens are dropped: their ids cost less than a pass over the block with the mask.
        self.dropped = [(~part).nonzero()[:, 0] for part in kept.split(self.size)]
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each block's place in (L·N, D), its tokens (T, D), and the ids in it of those that are
        dropped."""
        n_layers, n, _ = self.x.shape
        for layer in range(n_layers):
            for start in range(0, n, self.size):
                block = slice(start, min(start + self.size, n))
                rows = slice(layer * n + block.start, layer * n + block.stop)
                yield rows, self.x[layer, block], self.dropped[start // self.size]

    def add(self, block: Tensor, dropped: Tensor) -> None:
        """Add the next block (T, D), which is 0 in the rows that are dropped."""
        count = self.counts[len(self.parts) % len(self.counts)].clamp_min(1)
        mean = block.sum(0) / count
        deviations = (block - mean).index_fill_(0, dropped, 0)
        shift = deviations.sum(0) / count  # `mean` is off by a rounding
        self.parts.append((mean, shift, deviations.square_().sum(0)))

    def total(self) -> TokenMoments:
        """The moments of all blocks."""
        n_layers, _, d = self.x.shape
        if not self.parts:
            nothing = self.x.new_zeros(n_layers, d, dtype=torch.float64)
            return TokenMoments(self.count, nothing, nothing.clone())
        means, shifts, sq_devs = (
            torch.stack(part).double().view(n_layers, -1, d)
            for part in zip(*self.parts, strict=True)
        )
        counts = self.counts[:, None]  # (B, 1)
        means += shifts  # (L, B, D)
        mean = (counts * means).sum(1) / self.count.clamp_min(1)
        spread = (means - mean[:, None]).square() - shifts.square()
        return TokenMoments(self.count, mean, (sq_devs + counts * spread).sum(1))
