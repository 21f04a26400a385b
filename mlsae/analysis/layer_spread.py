"""At which layers latents are active: variances over layers, their ratios, entropies, intervals.

J is a latent, drawn uniformly; T a token, drawn uniformly from those where J is active at any
layer; L a layer, with

    P(L = ℓ | T = t, J = j) = h_j(t, ℓ) / Σ_ℓ' h_j(t, ℓ')
    q_j(ℓ) = P(L = ℓ | J = j) = its mean over the N_j tokens where latent j is active
    P(L = ℓ) = the mean of q_j(ℓ) over the latents with N_j > 0

(arXiv 2409.04185, Eqs. 10–12, 14, 15). Layers are counted 0 … L − 1 in the order analyzed.

Legend: L layers, M latents, G groups of rows, B ways to weigh them, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..bootstrap import Interval, draw_counts, recentered_interval
from ..metrics import mean_layer, normalized_entropy, var_layer

RATIOS = ("var_layer", "var_given_latent", "var_given_latent_token", "A", "B")
"""The metrics that both estimators give."""

_SAMPLES_ELEMENTS = 2**22  # of (B, latents, L) held at a time


class LayerSums(NamedTuple):
    """Sums over the tokens of each group of rows: all that `LayerSpread` is computed from."""

    profile: Tensor
    """(G, M, L) Σ_t P(ℓ | t, j), over the tokens where latent j is active at any layer."""
    totals: Tensor
    """(G, M, L) Σ_t h_j(t, ℓ)."""
    within: Tensor
    """(G, M) Σ_t Var(L | t, j), over the same tokens."""


class LayerSpread(NamedTuple):
    """Metrics by the paper's equations, each (B,) float64: for each way to weigh the groups."""

    var_layer: Tensor
    """Var(L)."""
    var_given_latent: Tensor
    """E[Var(L | J)]."""
    var_given_latent_token: Tensor
    """E[Var(L | J, T)]."""
    A: Tensor
    """E[Var(L | J)] / Var(L): the share of the spread over layers that is left within a latent."""
    B: Tensor
    """E[Var(L | J, T)] / E[Var(L | J)]: the share of that which is left within a token."""
    entropy: Tensor
    """Mean over latents of H(q_j) / ln L."""
    entropy_totals: Tensor
    """The same of the distribution of summed activation, Σ_t h_j(t, ℓ) / Σ_{t,ℓ'} h_j(t, ℓ')."""


class _LatentSums(NamedTuple):
    """Sums over active latents, each (B,); before summing, of each latent, (B, latents)."""

    latents: Tensor
    """1."""
    mean: Tensor
    """E[L | j]."""
    square: Tensor
    """E[L² | j]."""
    variance: Tensor
    """Var(L | j)."""
    within: Tensor
    """E[Var(L | j, T)]."""
    entropy: Tensor
    entropy_totals: Tensor


def compute_layer_spread(sums: LayerSums, weights: Tensor) -> LayerSpread:
    """The metrics of a text in which group g occurs weights[b, g] times: weights (B, G).

        Var(L) = E_J[Σ ℓ² q_J] − E_J[Σ ℓ q_J]²
        E[Var(L | J)] = E_J[Σ ℓ² q_J − (Σ ℓ q_J)²]
        E[Var(L | J, T)] = E_J[mean over its N_J tokens of Var(L | t, J)]

    Latents that are active nowhere in the weighted text are left out of every mean.
    """
    _, n_latents, n_layers = sums.profile.shape
    weights = weights.to(sums.profile.dtype)
    zeros = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    over_latents = _LatentSums(*(zeros.clone() for _ in _LatentSums._fields))
    size = max(1, _SAMPLES_ELEMENTS // (len(weights) * n_layers))
    for start in range(0, n_latents, size):
        latents = slice(start, start + size)
        profile, totals, within = (
            torch.tensordot(weights, tensor[:, latents], 1).double()  # (B, latents, …)
            for tensor in sums
        )
        n = profile.sum(-1)  # N_j
        mean, variance = mean_layer(profile), var_layer(profile)
        of_each = _LatentSums(
            latents=torch.ones_like(n),
            mean=mean,
            square=mean.square() + variance,
            variance=variance,
            within=within / n,
            entropy=normalized_entropy(profile),
            entropy_totals=normalized_entropy(totals),
        )
        for total, values in zip(over_latents, of_each, strict=True):
            total += torch.where(n > 0, values, 0).sum(1)
    means = _LatentSums(*(total / over_latents.latents for total in over_latents))
    spread = means.square - means.mean.square()
    return LayerSpread(
        var_layer=spread,
        var_given_latent=means.variance,
        var_given_latent_token=means.within,
        A=means.variance / spread,
        B=means.within / means.variance,
        entropy=means.entropy,
        entropy_totals=means.entropy_totals,
    )


class ReleasedSums(NamedTuple):
    """Sums over the tokens and latents of each row, (R,) each: for the released estimator."""

    tokens: Tensor
    """Number of tokens."""
    mean: Tensor
    """Σ_j Σ_t E[L | t, j]."""
    square: Tensor
    """Σ_j Σ_t E[L² | t, j]."""
    mean_squared: Tensor
    """Σ_j (Σ_t E[L | t, j])²."""
    within: Tensor
    """Σ_j Σ_t Var(L | t, j)."""


def released_spread(sums: ReleasedSums, n_latents: int) -> dict[str, Tensor]:
    """The `RATIOS` of each row, (R,) each, as the paper's released code estimates them.

    The released code reports their means over rows. It sets P(ℓ | t, j) = 0 wherever latent j is
    not active at token t and averages over all tokens of a row and all latents, so that its
    "distributions" p sum to the rate at which a latent is active:

        p_j = Σ_t P(· | t, j) / tokens;   p = Σ_j p_j / M
        Var(L) = Σ ℓ² p − (Σ ℓ p)²;   E[Var(L | J)] = mean_j [Σ ℓ² p_j − (Σ ℓ p_j)²]

    For rare latents the squares vanish beside Σ ℓ² p, so ratio A tends to 1 whatever the truth is.
    """
    n = sums.tokens * n_latents
    square = sums.square / n
    spread = square - (sums.mean / n).square()
    given_latent = square - sums.mean_squared / (sums.tokens.square() * n_latents)
    given_both = sums.within / n
    return {
        "var_layer": spread,
        "var_given_latent": given_latent,
        "var_given_latent_token": given_both,
        "A": given_latent / spread,
        "B": given_both / given_latent,
    }


def bootstrap_layer_spread(
    whole: LayerSums, grouped: LayerSums, resamples: int, seed: int
) -> dict[str, Interval]:
    """`LayerSpread` of a text by name, each () with its recentered interval.

    `whole` are the sums of the text, as one group; `grouped` those of the groups that are drawn.
    """
    values = compute_layer_spread(whole, torch.ones(1, 1, dtype=torch.float64))
    weights = draw_counts(len(grouped.within), resamples, seed)
    samples = compute_layer_spread(grouped, weights)
    return {
        name: recentered_interval(value[0], resampled)
        for name, value, resampled in zip(LayerSpread._fields, values, samples, strict=True)
    }


def bootstrap_released_spread(
    sums: ReleasedSums, n_latents: int, resamples: int, seed: int
) -> dict[str, Interval]:
    """`released_spread`, means over rows, each () with its recentered interval; rows are drawn."""
    sums = ReleasedSums(*(row_sums[sums.tokens > 0] for row_sums in sums))
    weights = draw_counts(len(sums.tokens), resamples, seed)
    weights /= weights.sum(1, keepdim=True)
    return {
        name: recentered_interval(values.mean(), weights @ values)
        for name, values in released_spread(sums, n_latents).items()
    }
