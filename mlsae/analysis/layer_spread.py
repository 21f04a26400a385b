"""At which layers latents are active: distributions, variances and their ratios, intervals.

J is a latent, drawn uniformly; T a token, drawn uniformly from those where J is active at any
layer; L a layer, with

    P(L = ℓ | T = t, J = j) = h_j(t, ℓ) / Σ_ℓ' h_j(t, ℓ')
    q_j(ℓ) = P(L = ℓ | J = j) = the mean of it over the N_j tokens where latent j is active
    P(L = ℓ) = the mean of q_j(ℓ) over the latents with N_j > 0

(arXiv 2409.04185, Eqs. 10–12, 14, 15). Layers are counted 0 … L − 1 in the order analyzed.

Legend: L layers, M latents, G groups of rows, B ways to weigh them, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..metrics import mean_layer, normalized_entropy, var_layer

RATIOS = ("var_layer", "var_given_latent", "var_given_latent_token", "A", "B")
"""The figures that both estimators give."""

_SAMPLES_ELEMENTS = 2**22  # of (B, latents, L) held at a time


class LayerSums(NamedTuple):
    """What all figures of this file are made of: sums over tokens, for each group of rows."""

    profile: Tensor
    """(G, M, L) Σ_t P(ℓ | t, j), over the tokens where latent j is active at any layer."""
    totals: Tensor
    """(G, M, L) Σ_t h_j(t, ℓ)."""
    within: Tensor
    """(G, M) Σ_t Var(L | t, j), over the same tokens."""


class Figures(NamedTuple):
    """Each (B,) float64: one for each of B ways to weigh the groups of rows."""

    var_layer: Tensor
    """Var(L)."""
    var_given_latent: Tensor
    """E[Var(L | J)]."""
    var_given_latent_token: Tensor
    """E[Var(L | J, T)]."""
    A: Tensor
    """E[Var(L | J)] / Var(L): the spread over layers that is left within a latent."""
    B: Tensor
    """E[Var(L | J, T)] / E[Var(L | J)]: how much of that is left for a single token."""
    entropy: Tensor
    """Mean over latents of H(q_j) / ln L."""
    entropy_totals: Tensor
    """The same of the totals-weighted distribution Σ_t h_j(t, ℓ) / Σ_{t,ℓ'} h_j(t, ℓ')."""


def figures(sums: LayerSums, weights: Tensor) -> Figures:
    """The figures by the paper's equations, where group g counts weights[b, g] times: (B, G).

        Var(L) = E_J[Σ ℓ² q_J] − E_J[Σ ℓ q_J]²
        E[Var(L | J)] = E_J[Σ ℓ² q_J − (Σ ℓ q_J)²]
        E[Var(L | J, T)] = E_J[mean over its N_J tokens of Var(L | t, J)]

    Latents that are active nowhere in the text so weighed are no part of any mean.
    """
    _, n_latents, n_layers = sums.profile.shape
    weights = weights.to(sums.profile.dtype)
    found = torch.zeros(7, len(weights), dtype=torch.float64, device=weights.device)
    size = max(1, _SAMPLES_ELEMENTS // (len(weights) * n_layers))
    for start in range(0, n_latents, size):
        part = slice(start, start + size)
        profile, totals, within = (
            torch.tensordot(weights, tensor[:, part], 1).double()  # (B, latents, …)
            for tensor in sums
        )
        n = profile.sum(-1)  # N_j
        mean, variance = mean_layer(profile), var_layer(profile)
        alive = n > 0
        for i, values in enumerate((
            torch.ones_like(n),
            mean,
            mean.square() + variance,
            variance,
            within / n,
            normalized_entropy(profile),
            normalized_entropy(totals),
        )):  # fmt: skip
            found[i] += torch.where(alive, values, 0).sum(1)
    mean, square, given_latent, given_both, profile_entropy, totals_entropy = found[1:] / found[0]
    spread = square - mean.square()
    return Figures(
        spread,
        given_latent,
        given_both,
        given_latent / spread,
        given_both / given_latent,
        profile_entropy,
        totals_entropy,
    )


class RowSums(NamedTuple):
    """What the released estimator needs of each row of text: sums over its tokens and latents."""

    tokens: Tensor
    """(R,)"""
    mean: Tensor
    """(R,) Σ_j Σ_t E[L | t, j]."""
    square: Tensor
    """(R,) Σ_j Σ_t E[L² | t, j]."""
    mean_squared: Tensor
    """(R,) Σ_j (Σ_t E[L | t, j])²."""
    within: Tensor
    """(R,) Σ_j Σ_t Var(L | t, j)."""


def released(rows: RowSums, n_latents: int) -> dict[str, Tensor]:
    """The variances and ratios of each row as the paper's released code has them, (R,) each; its
    figures are their means over rows.

    It takes P(ℓ | t, j) = 0 wherever latent j is not active at token t, and means over all tokens
    of a row and all latents, so its "distributions" p sum to the rate at which a latent is active:

        p_j = Σ_t P(· | t, j) / tokens;   p = Σ_j p_j / M
        Var(L) = Σ ℓ² p − (Σ ℓ p)²;   E[Var(L | J)] = mean_j [Σ ℓ² p_j − (Σ ℓ p_j)²]

    For rare latents the squares vanish beside Σ ℓ² p, and ratio A tends to 1 whatever the truth.
    """
    n = rows.tokens * n_latents
    square = rows.square / n
    spread = square - (rows.mean / n).square()
    given_latent = square - rows.mean_squared / (rows.tokens.square() * n_latents)
    given_both = rows.within / n
    return {
        "var_layer": spread,
        "var_given_latent": given_latent,
        "var_given_latent_token": given_both,
        "A": given_latent / spread,
        "B": given_both / given_latent,
    }


def draws(n: int, resamples: int, seed: int) -> Tensor:
    """How often each of `n` units is drawn, in each of `resamples` draws of n with replacement:
    (resamples, n) float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    ones = torch.ones(resamples, n, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def interval(value: Tensor, samples: Tensor, level: float = 0.95) -> dict[str, float | None]:
    """A figure () with its bootstrap interval, from resamples (B,): their quantiles about their
    own mean, put about the figure. None where it is not a number, or all resamples are one.

    A variance over few tokens is smaller in a resample, which draws some of them twice, so that
    plain percentiles would lie below the figure itself where latents are rare.
    """
    samples = samples[samples.isfinite()].cpu()
    if not value.isfinite() or len(samples) < 2 or samples.min() == samples.max():
        return {"value": value.item() if value.isfinite() else None, "low": None, "high": None}
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=samples.dtype)
    low, high = (torch.quantile(samples, ends) - samples.mean() + value.cpu()).tolist()
    return {"value": value.item(), "low": low, "high": high}


def with_intervals(
    whole: LayerSums, grouped: LayerSums, resamples: int, seed: int
) -> dict[str, dict[str, float | None]]:
    """All `Figures` of the sums over a text (one group), with intervals from those of its groups of
    rows: these are what is drawn, since the tokens of one text are alike."""
    n_groups = len(grouped.within)
    values = figures(whole, torch.ones(1, 1, dtype=torch.float64))
    samples = figures(grouped, draws(n_groups, resamples, seed))
    return {
        name: interval(value[0], drawn)
        for name, value, drawn in zip(Figures._fields, values, samples, strict=True)
    }


def released_with_intervals(
    rows: RowSums, n_latents: int, resamples: int, seed: int
) -> dict[str, dict[str, float | None]]:
    """The figures of `released`, means over the rows, with intervals from draws of the rows."""
    rows = RowSums(*torch.stack(rows)[:, rows.tokens > 0])
    weights = draws(len(rows.tokens), resamples, seed)
    weights /= weights.sum(1, keepdim=True)
    return {
        name: interval(values.mean(), weights @ values)
        for name, values in released(rows, n_latents).items()
    }
