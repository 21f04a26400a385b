"""Validation: metrics of MLSAEs on residuals that they were not trained on.

Legend: L layers, N tokens, D width of the residual stream, M latents, K active latents per token.
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


class Validation(NamedTuple):
    """Metrics of one pass over residuals, per layer, and where each latent was active: of the
    tokens that are kept, unless said otherwise."""

    n_tokens: int
    n_dropped: int
    """Tokens that are not special, and yet dropped."""
    fvu: Tensor
    """(L,) see `metrics.fvu`."""
    fvu_paper: Tensor
    """(L,) see `metrics.fvu_paper`."""
    l0: Tensor
    """(L,) mean number of latents with h > 0 per token: at most k."""
    fvu_all: Tensor
    """(L,) `fvu` with the dropped tokens."""
    top_share: Tensor
    """(L,) see `metrics.top_share`."""
    totals: Tensor
    """(M, L) Σ_n h_j(n, ℓ)."""
    counts: Tensor
    """(M, L) tokens with h_j(n, ℓ) > 0."""
    fvu_lens: Tensor | None = None
    """(L,) `fvu` in the basis of the lens, of z and ẑ; None without a lens."""

    def as_dict(self) -> dict[str, Any]:
        """The metrics, as means and lists over layers; JSON-serializable."""
        values_by_name: dict[str, Any] = {"n_tokens": self.n_tokens}
        if self.n_dropped:
            values_by_name["n_dropped"] = self.n_dropped
        for name in (*self._metrics(), "top_share"):
            values = getattr(self, name)
            values_by_name |= {name: values.mean().item(), f"{name}_layers": values.tolist()}
        values_by_name["never_active"] = (self.counts.sum(1) == 0).double().mean().item()
        return values_by_name

    def title(self) -> str:
        """What was measured, in words."""
        dropped = f", {self.n_dropped:,} more left out" if self.n_dropped else ""
        return f"Validation: {self.n_tokens:,} held-out tokens{dropped}"

    def table(self, layers: Iterable[int]) -> Table:
        """A row per layer and one of means, to print."""
        table = Table(title=self.title())
        metrics_shown = self._metrics()
        for heading in ("layer", *metrics_shown.values()):
            table.add_column(heading, justify="right")
        columns = [getattr(self, name) for name in metrics_shown]
        forms = [".1f" if name == "l0" else ".4f" for name in metrics_shown]
        means = [column.mean().item() for column in columns]
        rows = list(zip(layers, *(column.tolist() for column in columns), strict=True))
        for layer, *row in (*rows, ("mean", *means)):
            if layer == "mean":
                table.add_section()
            table.add_row(str(layer), *map(format, row, forms))
        return table

    def _metrics(self) -> dict[str, str]:
        """The headings of the metrics by name."""
        everything = {"fvu_all": "FVU with tokens left out"} if self.n_dropped else {}
        lens = {} if self.fvu_lens is None else {"fvu_lens": "FVU in the lens's basis"}
        return {"fvu": "FVU", "fvu_paper": "FVU as in the paper", "l0": "L0", **lens, **everything}


class _ValidationSums:
    """What is summed for one MLSAE; when sharded, for this process's latents."""

    def __init__(self, mlsae: MLSAE) -> None:
        n_layers, n_latents = len(mlsae.config.layers), len(mlsae.sae.W_dec)
        device = mlsae.sae.W_dec.device
        self.mlsae = mlsae
        self.moments = metrics.Moments(n_layers, mlsae.config.d_in, device)
        self.sq_error = torch.zeros(n_layers, dtype=torch.float64, device=device)
        self.lens_moments = metrics.Moments(n_layers, mlsae.config.d_in, device)  # of z
        self.lens_sq_error = torch.zeros_like(self.sq_error)
        self.dropped_moments = metrics.Moments(n_layers, mlsae.config.d_in, device)
        self.dropped_sq_error = torch.zeros_like(self.sq_error)
        self.totals = torch.zeros(n_latents, n_layers, dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.totals)

    def update(self, x: Tensor, dropped: Tensor) -> None:
        """Add residuals x (L, N, D), and those of dropped tokens, float32."""
        layers = self.mlsae.config.layers
        if dropped.shape[1]:
            error = self.mlsae.reconstruct(dropped, layers).error
            self.dropped_moments.update(dropped)
            self.dropped_sq_error += error.square().sum((1, 2))
        reconstruction = self.mlsae.reconstruct(x, layers)
        self.moments.update(x)
        self.sq_error += reconstruction.error.square().sum((1, 2))
        if self.mlsae.lens is not None:
            self.lens_moments.update(reconstruction.standard.carried.z)
            self.lens_sq_error += reconstruction.error_in_basis.square().sum((1, 2))
        totals, counts = metrics.latent_layer_totals(*reconstruction.codes, len(self.totals))
        self.totals += totals
        self.counts += counts

    def validation(self, top_share: Tensor, data: Group) -> Validation:
        """The metrics of all residuals added in any process of the group `data`."""
        sums = [self.sq_error, self.lens_sq_error, self.dropped_sq_error, self.totals, self.counts]
        metrics.reduce([self.moments, self.lens_moments, self.dropped_moments], sums, data)
        active = self.mlsae.shards.sum_(self.counts.sum(0))
        n_tokens = int(self.moments.n_tokens)
        if n_tokens == 0:
            raise ValueError("residuals must hold at least one token, got none")
        gather_rows = self.mlsae.sae.gather_rows
        n_dropped, moments_all = int(self.dropped_moments.n_tokens), self.dropped_moments
        moments_all.merge(self.moments)
        sq_error_all = self.sq_error + self.dropped_sq_error
        return Validation(
            n_tokens,
            n_dropped,
            metrics.fvu(self.sq_error, n_tokens, self.moments),
            metrics.fvu_paper(self.sq_error, n_tokens, self.moments),
            active / n_tokens,
            metrics.fvu(sq_error_all, moments_all.n_tokens, moments_all),
            top_share,
            gather_rows(self.totals),
            gather_rows(self.counts),
            None
            if self.mlsae.lens is None
            else metrics.fvu(self.lens_sq_error, n_tokens, self.lens_moments),
        )


@torch.inference_mode()
def validate(
    mlsaes: Sequence[MLSAE], residuals: Iterable[tuple[Tensor, Tensor]], data: Group = ALONE.data
) -> list[Validation]:
    """One pass over batches of residuals (L, N, D), kept and dropped (see
    `data.stream.DataStream.kept_and_dropped`), for all of `mlsaes`. Nothing else changes.

    Each process of the group `data` has residuals of its own, and the metrics are of all. When
    sharded, only rank 0 receives the `totals` and `counts` of all latents.

    Raises ValueError if there are no tokens.
    """
    all_sums = [_ValidationSums(mlsae) for mlsae in mlsaes]
    weights = mlsaes[0].sae.W_dec
    sq_deviation = [weights.new_zeros(len(mlsaes[0].config.layers), 0)]
    center = None  # the mean of the first batch: near enough to the mean
    for kept, dropped in residuals:
        for sums in all_sums:
            sums.update(kept.float(), dropped.float())
        if kept.shape[1]:
            center = kept.mean(1, keepdim=True) if center is None else center
            sums_of_squares = (kept - center).float().square().sum(-1)
            # Copied, because it lies beyond what was computed on the way, and would keep the next
            # part from the memory before it.
            sq_deviation.append(sums_of_squares.clone())
    top_share = metrics.top_share(data.all_cat(torch.cat(sq_deviation, 1)))
    return [sums.validation(top_share, data) for sums in all_sums]
