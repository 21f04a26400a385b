"""Measure MLSAEs on residuals that they were not trained on.

Legend: L layers, N tokens, D width of the residual stream, M latents, K active latents a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from .. import metrics
from ..distributed import ALONE, Group
from ..model import MLSAE


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


class _Sums:
    """What is summed for one MLSAE; of shards, for this process's latents."""

    def __init__(self, mlsae: MLSAE) -> None:
        n_layers, n_latents = len(mlsae.config.layers), len(mlsae.sae.W_dec)
        device = mlsae.sae.W_dec.device
        self.mlsae = mlsae
        self.moments = metrics.Moments(n_layers, mlsae.config.d_in, device)
        self.sq_error = torch.zeros(n_layers, dtype=torch.float64, device=device)
        self.totals = torch.zeros(n_latents, n_layers, dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.totals)

    def add(self, x: Tensor) -> None:
        """Take in residuals (L, N, D) float32."""
        standard, mean, std = self.mlsae.standardize(x)
        out = self.mlsae.sae.reconstruct(standard)
        reconstruction, codes = out.x_hat, out.codes
        self.moments.update(x)
        self.sq_error += (x - reconstruction * std - mean).square().sum((1, 2))
        totals, counts = metrics.latent_layer_totals(*codes, len(self.totals))
        self.totals += totals
        self.counts += counts

    def evaluation(self, data: Group) -> Evaluation:
        """The figures of all that has been added, in any process."""
        metrics.reduce([self.moments], [self.sq_error, self.totals, self.counts], data)
        active = self.mlsae.shards.sum_(self.counts.sum(0))
        n_tokens = self.moments.count
        if n_tokens == 0:
            raise ValueError("residuals must hold at least one token, got none")
        return Evaluation(
            n_tokens,
            metrics.fvu(self.sq_error, n_tokens, self.moments),
            metrics.fvu_paper(self.sq_error, n_tokens, self.moments),
            active / n_tokens,
            self.mlsae.gather_rows(self.totals),
            self.mlsae.gather_rows(self.counts),
        )


@torch.inference_mode()
def evaluate(
    mlsaes: Sequence[MLSAE], residuals: Iterable[Tensor], data: Group = ALONE.data
) -> list[Evaluation]:
    """One pass over batches of residuals (L, N, D), for all of `mlsaes`. It changes nothing, in
    them or elsewhere.

    Each process of the group `data` has residuals of its own, and the figures are of all. Where
    latents are shared out, `totals` and `counts` of all of them are in the first process only.

    Raises ValueError if there are no tokens.
    """
    sums = [_Sums(mlsae) for mlsae in mlsaes]
    for x in residuals:
        for one in sums:
            one.add(x.float())
    return [one.evaluation(data) for one in sums]
