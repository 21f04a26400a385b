"""Metrics of an evaluation, with intervals, from sums over the tokens of each row of text.

Legend: L layers, R rows, D width of the residual stream, B ways to weigh the rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..bootstrap import Interval, draw_counts, percentile_interval
from ..metrics import ce_recovered


class TokenSums:
    """Sums over the tokens and predictions of each row: all that the metrics are computed from.

    Only kept tokens count: neither special nor dropped. A prediction is a pair of neighbors in a
    row, both kept: the next token, predicted at this one. The last position of a row predicts
    nothing.

    Everything is float64 except `deviation`, whose R · L · D numbers take nearly all the memory.
    """

    def __init__(self, n_rows: int, n_layers: int, d_in: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(n_rows, *shape, dtype=dtype, device=device)

        self.tokens = zeros()
        """(R,) number of tokens."""
        self.predictions = zeros()
        """(R,) number of predictions."""
        self.ce_true = zeros()
        """(R,) cross-entropy of the true logits, nats."""
        self.sq_error = zeros(n_layers)
        """(R, L) Σ |x − x̂|²."""
        self.l0 = zeros(n_layers)
        """(R, L) latents with h > 0."""
        self.l1 = zeros(n_layers)
        """(R, L) Σ h."""
        self.sq_deviation = zeros(n_layers)
        """(R, L) Σ |x − origin|²."""
        self.deviation = zeros(n_layers, d_in, dtype=torch.float32)
        """(R, L, D) Σ (x − origin)."""
        self.origin = torch.zeros(n_layers, d_in, device=device)
        """(L, D) a vector near the mean of each layer, to avoid cancellation."""
        self.ce = zeros(n_layers)
        """(R, L) cross-entropy with x̂ in place of x, nats."""
        self.kl = zeros(n_layers)
        """(R, L) KL(true ‖ substituted), nats."""
        self.top1 = zeros(n_layers)
        """(R, L) predictions whose likeliest token stays the same."""
        self.ce_zero = zeros(n_layers)
        """(R, L) cross-entropy with 0 in place of x, nats."""
        self.ce_mean = zeros(n_layers)
        """(R, L) cross-entropy with the mean of x in place of x, nats."""
        self.ce_from = zeros(n_layers) + math.nan
        """(R, L) cross-entropy with x̂ in place of x at this layer and all above it, nats; like the
        next two, NaN where it is not measured."""
        self.kl_from = zeros(n_layers) + math.nan
        """(R, L) KL(true ‖ substituted), nats, in the same pass."""
        self.top1_from = zeros(n_layers) + math.nan
        """(R, L) predictions whose likeliest token stays the same in it."""

    def mean(self) -> Tensor:
        """The mean residual vector of each layer, (L, D) float32."""
        return (
            self.origin + self.deviation.sum(0, dtype=torch.float64) / self.tokens.sum()
        ).float()


class TokenMetrics(NamedTuple):
    """Metrics per layer, each (B, L) float64: one row for each of B ways to weigh the rows."""

    fvu: Tensor
    """Σ|x − x̂|² / Σ|x − mean x|², with a mean per dimension: `metrics.fvu`."""
    fvu_paper: Tensor
    """The same over the variance of all elements about one scalar mean: `metrics.fvu_paper`, as
    in arXiv 2409.04185, §2."""
    mse: Tensor
    """Mean over tokens and dimensions of (x − x̂)², in the residual's squared units."""
    l0: Tensor
    """Latents with h > 0 per token: at most k."""
    l1: Tensor
    """Σ_j h_j per token, in the units that the SAE encodes: standardized, as in the paper."""
    explained: Tensor
    """1 − fvu; compare it with `metrics.pca_explained`."""
    delta_ce: Tensor
    """CE with the reconstruction in place of the residual, minus the true CE: nats per token."""
    recovered_zero: Tensor
    """`metrics.ce_recovered`; the ablation replaces the residual by 0."""
    recovered_mean: Tensor
    """`metrics.ce_recovered`; the ablation replaces the residual by its mean over these tokens."""
    kl: Tensor
    """KL(true ‖ substituted), nats per token: `metrics.token_scores`."""
    top1: Tensor
    """Share of predictions whose likeliest token the substitution does not change."""
    delta_ce_from: Tensor
    """`delta_ce` with the reconstructions of this layer and of all above it at once, each of what
    the changed layers below lead to; like the next three, NaN where it was not measured."""
    recovered_from: Tensor
    """`metrics.ce_recovered` of it; the ablation replaces the same layers by their means, which is
    that of the topmost alone."""
    kl_from: Tensor
    """`kl` of it."""
    top1_from: Tensor
    """`top1` of it."""


JOINT_METRICS = ("delta_ce_from", "recovered_from", "kl_from", "top1_from")
"""Those of several layers at once: of each layer and all above it."""


def compute_token_metrics(sums: TokenSums, weights: Tensor) -> TokenMetrics:
    """The metrics of a text in which row r occurs weights[b, r] times: weights (B, R) float64.

    Weights of 1 give the metrics of the text itself; `bootstrap.draw_counts` those of resamples.
    Σ|x − mean x|² = Σ|x − origin|² − n |mean x − origin|².
    """
    n = (weights @ sums.tokens)[:, None]  # (B, 1)
    n_predictions = (weights @ sums.predictions)[:, None]
    d_in = sums.deviation.shape[-1]
    shift, scatter_of_mean = [], []  # per layer (B,)
    for layer, origin in enumerate(sums.origin.double()):
        offset = weights @ sums.deviation[:, layer].double() / n  # (B, D)
        shift.append(offset.square().sum(1))
        scatter_of_mean.append(d_in * (origin + offset).var(1, correction=0))
    variance = weights @ sums.sq_deviation / n - torch.stack(shift, 1)
    error = weights @ sums.sq_error / n
    ce_true = (weights @ sums.ce_true)[:, None] / n_predictions
    ce, ce_zero, ce_mean, ce_from = (
        weights @ ce / n_predictions for ce in (sums.ce, sums.ce_zero, sums.ce_mean, sums.ce_from)
    )
    return TokenMetrics(
        fvu=error / variance,
        fvu_paper=error / (variance + torch.stack(scatter_of_mean, 1)),
        mse=error / d_in,
        l0=weights @ sums.l0 / n,
        l1=weights @ sums.l1 / n,
        explained=1 - error / variance,
        delta_ce=ce - ce_true,
        recovered_zero=ce_recovered(ce_true, ce, ce_zero),
        recovered_mean=ce_recovered(ce_true, ce, ce_mean),
        kl=weights @ sums.kl / n_predictions,
        top1=weights @ sums.top1 / n_predictions,
        delta_ce_from=ce_from - ce_true,
        recovered_from=ce_recovered(ce_true, ce_from, ce_mean[:, -1:]),
        kl_from=weights @ sums.kl_from / n_predictions,
        top1_from=weights @ sums.top1_from / n_predictions,
    )


def bootstrap_token_metrics(sums: TokenSums, resamples: int, seed: int) -> dict[str, Interval]:
    """All `TokenMetrics` by name, each (L + 1,) with its percentile interval: of every layer, then
    of the mean over layers, which is NaN for those of several layers at once.

    Rows are drawn; one draw serves all layers and metrics.
    """
    n_rows, device = len(sums.tokens), sums.tokens.device
    weights = draw_counts(n_rows, resamples, seed).to(device)
    ones = torch.ones(1, n_rows, dtype=torch.float64, device=device)
    values, samples = compute_token_metrics(sums, ones), compute_token_metrics(sums, weights)
    return {
        name: percentile_interval(
            _append_mean_of(name, value)[0].cpu(), _append_mean_of(name, resampled).cpu(), n_rows
        )
        for name, value, resampled in zip(TokenMetrics._fields, values, samples, strict=True)
    }


def _append_mean_of(name: str, values: Tensor) -> Tensor:
    """`append_mean`; sets of layers that contain one another have none."""
    if name in JOINT_METRICS:
        return torch.cat([values, torch.full_like(values[..., :1], math.nan)], -1)
    return append_mean(values)


def append_mean(values: Tensor) -> Tensor:
    """(…, L) → (…, L + 1): the mean over layers comes last."""
    return torch.cat([values, values.mean(-1, keepdim=True)], -1)
