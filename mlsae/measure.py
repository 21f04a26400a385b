"""Measure an MLSAE on residuals that it was not trained on.

Legend: L layers, N tokens, D width of the residual stream, M latents, K active latents a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from . import metrics
from .model import MLSAE


class Evaluation(NamedTuple):
    """Figures of one pass over residuals, per layer, and where each latent was active."""

    n_tokens: int
    fvu: Tensor
    """(L,) see `metrics.fvu`."""
    fvu_paper: Tensor
    """(L,) see `metrics.fvu_paper`."""
    l0: Tensor
    """(L,) mean number of latents with h > 0 a token: at most k."""
    totals: Tensor
    """(M, L) Σ_n h_j(n, ℓ)."""
    counts: Tensor
    """(M, L) tokens with h_j(n, ℓ) > 0."""

    def as_dict(self) -> dict[str, Any]:
        """The figures, means and lists over layers, as JSON has them."""
        figures: dict[str, Any] = {"n_tokens": self.n_tokens}
        for name in ("fvu", "fvu_paper", "l0"):
            values = getattr(self, name)
            figures |= {name: values.mean().item(), f"{name}_layers": values.tolist()}
        figures["never_active"] = (self.counts.sum(1) == 0).double().mean().item()
        return figures

    def table(self, layers: Iterable[int]) -> Table:
        """A row a layer and one of means, to print."""
        table = Table(title=f"Held-out figures, {self.n_tokens:,} tokens")
        for name in ("layer", "FVU", "FVU as in the paper", "L0"):
            table.add_column(name, justify="right")
        columns = (self.fvu, self.fvu_paper, self.l0)
        means = [column.mean().item() for column in columns]
        for layer, *row in zip(layers, *(column.tolist() for column in columns), strict=True):
            table.add_row(str(layer), f"{row[0]:.4f}", f"{row[1]:.4f}", f"{row[2]:.1f}")
        table.add_section()
        table.add_row("mean", f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[2]:.1f}")
        return table


@torch.inference_mode()
def evaluate(mlsae: MLSAE, residuals: Iterable[Tensor]) -> Evaluation:
    """One pass over batches of residuals (L, N, D). It changes nothing, in the MLSAE or elsewhere.

    Raises ValueError where there are no tokens.
    """
    config = mlsae.config
    n_layers, device = len(config.layers), mlsae.sae.W_dec.device
    moments = metrics.Moments(n_layers, config.d_in, device)
    sq_error = torch.zeros(n_layers, dtype=torch.float64, device=device)
    totals = torch.zeros(config.n_latents, n_layers, dtype=torch.float64, device=device)
    counts = torch.zeros_like(totals)
    for x in residuals:
        x = x.float()
        standard, mean, std = mlsae.standardize(x)
        reconstruction, codes = mlsae.sae.reconstruct(standard)
        moments.update(x)
        sq_error += (x - reconstruction * std - mean).square().sum((1, 2))
        some_totals, some_counts = metrics.latent_layer_totals(*codes, config.n_latents)
        totals += some_totals
        counts += some_counts
    if moments.count == 0:
        raise ValueError("residuals must hold at least one token, got none")
    return Evaluation(
        moments.count,
        metrics.fvu(sq_error, moments.count, moments),
        metrics.fvu_paper(sq_error, moments.count, moments),
        counts.sum(0) / moments.count,
        totals,
        counts,
    )
