"""Sums over a text of where latents are active, taken in a batch at a time.

Legend: L layers, N tokens, D width of the residual stream, K active latents a token, M latents,
G groups of rows, R rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_topk import TopK

from .layer_spread import LayerSums, RowSums

_WORKSPACE_ELEMENTS = 2**22  # of (tokens, latents) at a time: two of 32 MB


class Accumulator:
    """Counts, totals and layer distributions of M latents over R rows, in one pass.

    Rows come in order, any number at a time, and are counted in G groups of neighbors: the units
    of the bootstrap. The rows of `data.Rows` are shuffled, so neighbors are no more alike than
    others. Each group keeps the sums of `LayerSums` in float32: 4 · G · M · (2 L + 1) bytes, on
    the CPU. That is G · L / D of the two weights: about a third for the paper's models with G = 32.
    Less would not do for what is no mean over tokens: ratio A and the entropy need each latent's
    distribution in each resample. Sums of every resample would take 1000 / G times as much. A
    latent's sums over all the text are float64.

    No (L, N, M) tensor is made: a token's latents meet in a workspace of fixed size, of which only
    the active entries are touched.
    """

    def __init__(
        self, n_latents: int, n_layers: int, n_rows: int, groups: int, device: torch.device
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.n_latents, self.n_layers, self.n_rows = n_latents, n_layers, n_rows
        self.groups = min(groups, n_rows)
        slots = n_latents * n_layers  # slot j · L + ℓ
        self.counts = zeros(slots, dtype=torch.int64)
        self.max = zeros(n_latents, dtype=torch.float32)
        self._sums = [zeros(slots), zeros(slots), zeros(n_latents)]  # profile, totals, within
        self._open = [torch.zeros_like(x) for x in self._sums]  # of the group that rows come to
        self._closed = [zeros(self.groups, len(x), dtype=torch.float32).cpu() for x in self._sums]
        self._group = 0
        self._rows = zeros(5, n_rows)  # in the order of RowSums
        size = max(1, _WORKSPACE_ELEMENTS // n_latents) * n_latents
        self._total, self._mean = zeros(size), zeros(size)

    def update(self, codes: TopK, row: Tensor) -> None:
        """Take in the codes (L, N, K) of N tokens of whole rows; row (N,) is that of each token,
        ascending."""
        if not len(row):
            return
        group = row * self.groups // self.n_rows
        first = int(row[0])
        moments = self._total.new_zeros(int(row[-1]) + 1 - first, self.n_latents)
        step = len(self._total) // self.n_latents
        for g in group.unique().tolist():
            self._turn_to(g)
            for part in (group == g).nonzero()[:, 0].split(step):
                some = slice(int(part[0]), int(part[-1]) + 1)
                self._add(codes.values[:, some], codes.indices[:, some], row[some], moments, first)
        self._rows[3, first : first + len(moments)] = moments.square().sum(1)
        self._rows[0].index_add_(0, row, torch.ones_like(row, dtype=torch.float64))

    def _add(
        self, values: Tensor, indices: Tensor, row: Tensor, moments: Tensor, first: int
    ) -> None:
        """Take in codes (L, N, K), few enough for the workspace, all of the open group; and into
        moments (rows from `first`, M) their Σ_t E[L | t, j].

        An entry e is one of the L · N · K active latents, with share w_e = P(ℓ | t, j). As the
        shares of the entries of one token and latent add up to 1, Σ_t f(t, j) = Σ_e w_e f(t, j).
        """
        n_layers, n_tokens, k = values.shape
        h, latent = values.flatten().double(), indices.flatten()
        layer = torch.arange(n_layers, device=h.device).repeat_interleave(n_tokens * k)
        token = torch.arange(n_tokens, device=h.device).repeat_interleave(k).repeat(n_layers)
        pair = token * self.n_latents + latent
        self._total.index_add_(0, pair, h)
        share = torch.where(h > 0, h / self._total[pair], 0)
        weighted = share * layer
        self._mean.index_add_(0, pair, weighted)
        within = share * (layer - self._mean[pair]).square()
        self._total[pair], self._mean[pair] = 0, 0

        slot = latent * n_layers + layer
        for sums, index, entry in zip(
            self._open, (slot, slot, latent), (share, h, within), strict=True
        ):
            sums.index_add_(0, index, entry)
        self.counts.index_add_(0, slot, (h > 0).long())
        self.max.scatter_reduce_(0, latent, values.flatten().float(), "amax")
        of = row[token]
        moments.view(-1).index_add_(0, (of - first) * self.n_latents + latent, weighted)
        for i, entry in ((1, weighted), (2, weighted * layer), (4, within)):
            self._rows[i].index_add_(0, of, entry)

    def _turn_to(self, group: int) -> None:
        """Close the open group, if rows now come to another."""
        if group != self._group:
            for closed, opened, whole in zip(self._closed, self._open, self._sums, strict=True):
                closed[self._group] = opened
                whole += opened
                opened.zero_()
            self._group = group

    def finish(self) -> tuple[LayerSums, LayerSums, RowSums]:
        """The sums over all rows, one group, float64; those of each group; those of each row. All
        on the CPU, after the last row."""
        self._turn_to(self.groups)
        shape = (-1, self.n_latents, self.n_layers)
        whole, grouped = (
            LayerSums(profile.reshape(shape), totals.reshape(shape), within.reshape(shape[:2]))
            for profile, totals, within in ([x.cpu() for x in self._sums], self._closed)
        )
        return whole, grouped, RowSums(*self._rows.cpu())


class Adjacent:
    """Cosines and norms of the centered residuals of neighboring layers, means over tokens.

        cosine_ℓ = mean_t cos(x_ℓ − c_ℓ, x_{ℓ+1} − c_{ℓ+1});   norm_ℓ = mean_t |x_ℓ − c_ℓ|

    c (L, D) is the mean residual of each layer.
    """

    def __init__(self, center: Tensor) -> None:
        self.center = center
        self.n = 0
        self.cosines = center.new_zeros(len(center) - 1, dtype=torch.float64)
        self.norms = center.new_zeros(len(center), dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Take in residuals (L, N, D)."""
        x = x - self.center[:, None]
        self.n += x.shape[1]
        self.norms += x.norm(dim=-1).sum(1, dtype=torch.float64)
        cosines = F.cosine_similarity(x[1:], x[:-1], dim=-1)
        self.cosines += cosines.sum(1, dtype=torch.float64)

    def as_dict(self) -> dict[str, list[float]]:
        """The means."""
        cosine, norm = (self.cosines / self.n).tolist(), (self.norms / self.n).tolist()
        return {"cosine": cosine, "norm": norm}
