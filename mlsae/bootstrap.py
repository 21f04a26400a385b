"""95 % bootstrap intervals of two kinds, and why evaluation and analysis need different ones.

Both draw units of text (rows, or groups of rows: tokens of one text are alike) with replacement,
as many as there are, and compute the metric θ of each draw: θ*_1 … θ*_B. With q the quantile:

    percentile    [q_2.5(θ*), q_97.5(θ*)]                                       evaluation
    recentered    [θ + q_2.5(θ*) − mean(θ*), θ + q_97.5(θ*) − mean(θ*)]         analysis

Evaluation's metrics (FVU, ΔCE, KL, …) are ratios of sums over thousands of tokens. A draw estimates
them with next to no bias, so the plain quantiles are right, and they stay in the metric's range: a
share never leaves [0, 1].

Analysis takes variances over layers, of each latent, and many latents are active at a handful of
tokens. A draw repeats some of them, so that its variances are too small: by a factor of 1 − 1 / n
for n independent tokens. θ* then lies below θ, and the percentile interval can miss θ altogether.
Recentering removes that bias; in exchange, an end may leave the metric's range.

Legend: B resamples, U units.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_LEVEL = 0.95


class Interval(NamedTuple):
    """A metric and the ends of its interval, of one shape. Ends are NaN where there is none."""

    value: Tensor
    low: Tensor
    high: Tensor

    def as_dict(self) -> dict[str, float | None]:
        """A scalar's, JSON-serializable: None stands for NaN and infinity."""
        return {name: finite_or_none(number) for name, number in self._asdict().items()}


def without_interval(value: Tensor) -> Interval:
    """A metric that has no interval."""
    unknown = torch.full_like(value, math.nan)
    return Interval(value, low=unknown, high=unknown)


def finite_or_none(number: Tensor) -> float | None:
    """The number in a tensor (), or None for NaN and infinity: JSON cannot represent them."""
    return number.item() if number.isfinite() else None


def draw_counts(n_units: int, resamples: int, seed: int) -> Tensor:
    """How often each unit is drawn in each resample of U units with replacement: (B, U) float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_units, (resamples, n_units), generator=generator)
    ones = torch.ones(resamples, n_units, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def percentile_interval(value: Tensor, samples: Tensor, n_units: int) -> Interval:
    """Percentile interval of a metric (…,) from its resamples (B, …), both on the CPU.

    NaN ends if there is only one unit: all resamples are the text itself. Source: Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, §13.3.
    """
    if n_units == 1:
        return without_interval(value)
    low, high = torch.quantile(samples, _ends(samples), dim=0)
    return Interval(value, low, high)


def recentered_interval(value: Tensor, samples: Tensor) -> Interval:
    """Recentered interval of a metric () from its resamples (B,), both on the CPU.

    Resamples that are not finite are left out. NaN ends if the metric is not finite, or all
    resamples are equal, as they are if there is only one unit.
    """
    samples = samples[samples.isfinite()]
    if not value.isfinite() or len(samples) < 2 or samples.min() == samples.max():
        return without_interval(value)
    low, high = torch.quantile(samples, _ends(samples)) - samples.mean() + value
    return Interval(value, low, high)


def _ends(samples: Tensor) -> Tensor:
    return torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=samples.dtype)
