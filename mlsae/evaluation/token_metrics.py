"""Figures of an evaluation with intervals, from sums over each row of text.

Legend: L layers, R rows, D width of the residual stream, B resamples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..metrics import ce_recovered


class RowSums:
    """Sums over the tokens, and over the predictions, of each row: what figures are made of.

    A token is one that is not special. A prediction is made at a token that is not special, of
    the next one in the row, not special either: the last position of a row predicts nothing.
    float64, but for `deviation`: its R · L · D numbers are the only ones that take memory.
    """

    def __init__(self, n_rows: int, n_layers: int, d_in: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(n_rows, *shape, dtype=dtype, device=device)

        self.tokens = zeros()
        self.predictions = zeros()
        self.ce_true = zeros()
        """Cross-entropy of the true logits, nats."""
        self.sq_error = zeros(n_layers)
        """Σ |x − x̂|²."""
        self.l0 = zeros(n_layers)
        self.l1 = zeros(n_layers)
        self.sq_deviation = zeros(n_layers)
        """Σ |x − origin|²."""
        self.deviation = zeros(n_layers, d_in, dtype=torch.float32)
        """Σ (x − origin), (R, L, D)."""
        self.origin = torch.zeros(n_layers, d_in, device=device)
        """A vector near the mean of each layer, (L, D), so that nothing cancels."""
        self.ce = zeros(n_layers)
        self.kl = zeros(n_layers)
        self.top1 = zeros(n_layers)
        self.ce_zero = zeros(n_layers)
        self.ce_mean = zeros(n_layers)

    def mean(self) -> Tensor:
        """The mean residual vector of each layer (L, D), float32."""
        return (
            self.origin + self.deviation.sum(0, dtype=torch.float64) / self.tokens.sum()
        ).float()


class Figures(NamedTuple):
    """Figures per layer, each (B, L) float64: one for each of B ways to weigh the rows."""

    fvu: Tensor
    """Σ|x − x̂|² / Σ|x − mean x|², the mean one of each dimension: `metrics.fvu`."""
    fvu_paper: Tensor
    """The same over the variance of all elements about one scalar mean: `metrics.fvu_paper`, as
    in arXiv 2409.04185, §2."""
    mse: Tensor
    """Mean over tokens and dimensions of (x − x̂)², in the residual's squared units."""
    l0: Tensor
    """Latents with h > 0 a token: at most k."""
    l1: Tensor
    """Σ_j h_j a token, in the units that the SAE encodes: standardized ones, as in the paper."""
    explained: Tensor
    """1 − fvu: to be held against `metrics.pca_explained`."""
    delta_ce: Tensor
    """CE with the reconstruction in place of the residual, less the true CE: nats per token."""
    recovered_zero: Tensor
    """`metrics.ce_recovered` where the ablation replaces the residual by 0."""
    recovered_mean: Tensor
    """`metrics.ce_recovered` where the ablation replaces it by its mean over the same tokens."""
    kl: Tensor
    """KL(true ‖ substituted), nats per token: `metrics.token_scores`."""
    top1: Tensor
    """Share of predictions whose likeliest token the substitution leaves."""


def figures(rows: RowSums, weights: Tensor) -> Figures:
    """The figures where row r counts weights[b, r] times: weights (B, R) float64.

    A weight of 1 everywhere gives the figures themselves; a bootstrap resample counts how often
    it drew each row. Σ|x − mean x|² = Σ|x − origin|² − n |mean x − origin|².
    """
    n = (weights @ rows.tokens)[:, None]  # (B, 1)
    n_predictions = (weights @ rows.predictions)[:, None]
    d_in = rows.deviation.shape[-1]
    shift, scatter_of_mean = [], []  # per layer (B,)
    for layer, origin in enumerate(rows.origin.double()):
        offset = weights @ rows.deviation[:, layer].double() / n  # (B, D)
        shift.append(offset.square().sum(1))
        scatter_of_mean.append(d_in * (origin + offset).var(1, correction=0))
    variance = weights @ rows.sq_deviation / n - torch.stack(shift, 1)
    error = weights @ rows.sq_error / n
    ce_true = (weights @ rows.ce_true)[:, None] / n_predictions
    ce, ce_zero, ce_mean = (
        weights @ sums / n_predictions for sums in (rows.ce, rows.ce_zero, rows.ce_mean)
    )
    return Figures(
        fvu=error / variance,
        fvu_paper=error / (variance + torch.stack(scatter_of_mean, 1)),
        mse=error / d_in,
        l0=weights @ rows.l0 / n,
        l1=weights @ rows.l1 / n,
        explained=1 - error / variance,
        delta_ce=ce - ce_true,
        recovered_zero=ce_recovered(ce_true, ce, ce_zero),
        recovered_mean=ce_recovered(ce_true, ce, ce_mean),
        kl=weights @ rows.kl / n_predictions,
        top1=weights @ rows.top1 / n_predictions,
    )


class Interval(NamedTuple):
    """A figure of each layer, and of the mean of the layers last: (L + 1,) each."""

    value: Tensor
    low: Tensor
    high: Tensor


def with_intervals(
    rows: RowSums, resamples: int, seed: int, level: float = 0.95
) -> dict[str, Interval]:
    """Every figure with its percentile-bootstrap interval (Efron and Tibshirani, 1993, §13.3).

    The unit that is drawn is the row, R of R with replacement, since the tokens of one text are
    alike; the same draw serves every layer and figure. With one row the ends are NaN.
    """
    n_rows, device = len(rows.tokens), rows.tokens.device
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n_rows, (resamples, n_rows), generator=generator)
    weights = torch.zeros(resamples, n_rows, dtype=torch.float64)
    weights.scatter_add_(1, draws, torch.ones_like(weights))
    whole = figures(rows, torch.ones(1, n_rows, dtype=torch.float64, device=device))
    drawn = figures(rows, weights.to(device))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    found = {}
    for name, value, samples in zip(Figures._fields, whole, drawn, strict=True):
        low, high = torch.quantile(_with_mean(samples).cpu(), ends, dim=0)
        if n_rows == 1:
            low = high = torch.full_like(low, math.nan)
        found[name] = Interval(_with_mean(value)[0].cpu(), low, high)
    return found


def _with_mean(values: Tensor) -> Tensor:
    """(B, L) → (B, L + 1), the mean of the layers last."""
    return torch.cat([values, values.mean(1, keepdim=True)], 1)
