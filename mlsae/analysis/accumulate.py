"""Sums over a text of where latents are active, updated with one batch at a time.

Legend: L layers, N tokens, D width of the residual stream, K active latents per token, M latents,
G groups of rows, R rows, E entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_topk import TopK

from .layer_spread import LayerSums, ReleasedSums

_WORKSPACE_ELEMENTS = 2**22  # of (tokens, latents) at a time: two of 32 MB


class Accumulator:
    """Counts, totals and layer distributions of M latents over R rows, in one pass.

    Rows come in order, any number at a time, and are counted in G groups of neighbors, which the
    bootstrap draws. (The rows of `data.Rows` are shuffled, so neighbors are no more alike than
    others.) Each group has its own `LayerSums` in float32, on the CPU: 4 · G · M · (2 L + 1) bytes,
    G · L / D of the two weights, or about a third for the paper's models with G = 32. They are
    needed because ratio A and the entropy are not means over tokens, but functions of each latent's
    distribution in each resample; sums per resample would take 1000 / G times as much memory. The
    sums over the whole text are float64.

    No (L, N, M) tensor is made: a workspace of fixed size holds the (tokens, latents) matrix of a
    few tokens, and only its active entries are read and written.
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
        # Sums over the closed groups, over the open one, and of each (G, …); (M, L) is flat.
        self._whole = LayerSums(zeros(slots), zeros(slots), zeros(n_latents))
        self._open = LayerSums(*(torch.zeros_like(sums) for sums in self._whole))
        self._grouped = LayerSums(
            *(torch.zeros(self.groups, len(sums), dtype=torch.float32) for sums in self._whole)
        )
        self._group = 0  # the open one
        self._rows = ReleasedSums(*(zeros(n_rows) for _ in ReleasedSums._fields))
        size = max(1, _WORKSPACE_ELEMENTS // n_latents) * n_latents
        self._total, self._mean = zeros(size), zeros(size)  # the workspace

    def update(self, codes: TopK, row: Tensor) -> None:
        """Update with the codes (L, N, K) of N tokens of whole rows.

        row (N,) is the row of each token, ascending.
        """
        if not len(row):
            return
        group = row * self.groups // self.n_rows
        first = int(row[0])
        row_means = self._total.new_zeros(int(row[-1]) + 1 - first, self.n_latents)
        step = len(self._total) // self.n_latents
        for g in group.unique().tolist():
            self._switch_to(g)
            for part in (group == g).nonzero()[:, 0].split(step):
                tokens = slice(int(part[0]), int(part[-1]) + 1)
                self._add(
                    TopK(codes.values[:, tokens], codes.indices[:, tokens]),
                    row[tokens],
                    row_means,
                    first,
                )
        self._rows.mean_squared[first : first + len(row_means)] = row_means.square().sum(1)
        self._rows.tokens.index_add_(0, row, torch.ones_like(row, dtype=torch.float64))

    def _add(self, codes: TopK, row: Tensor, row_means: Tensor, first: int) -> None:
        """Add codes (L, N, K) of tokens of the open group, few enough for the workspace.

        row_means (rows from `first` on, M) receives Σ_t E[L | t, j].

        An entry e is one of the L · N · K active latents, with share w_e = P(ℓ | t, j). As the
        shares of the entries of one token and latent add up to 1, Σ_t f(t, j) = Σ_e w_e f(t, j).
        """
        n_layers, n_tokens, k = codes.values.shape
        h, latent = codes.values.flatten().double(), codes.indices.flatten()  # (E,)
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
        self._open.profile.index_add_(0, slot, share)
        self._open.totals.index_add_(0, slot, h)
        self._open.within.index_add_(0, latent, within)
        self.counts.index_add_(0, slot, (h > 0).long())
        self.max.scatter_reduce_(0, latent, codes.values.flatten().float(), "amax")

        entry_row = row[token]
        row_means.view(-1).index_add_(0, (entry_row - first) * self.n_latents + latent, weighted)
        self._rows.mean.index_add_(0, entry_row, weighted)
        self._rows.square.index_add_(0, entry_row, weighted * layer)
        self._rows.within.index_add_(0, entry_row, within)

    def _switch_to(self, group: int) -> None:
        """Close the open group if rows now belong to another one."""
        if group != self._group:
            for grouped, open_, whole in zip(self._grouped, self._open, self._whole, strict=True):
                grouped[self._group] = open_
                whole += open_
                open_.zero_()
            self._group = group

    def finish(self) -> tuple[LayerSums, LayerSums, ReleasedSums]:
        """After the last row, the sums over all rows (one group, float64), of each group, and of
        each row; all on the CPU."""
        self._switch_to(self.groups)
        shape = (-1, self.n_latents, self.n_layers)
        whole, grouped = (
            LayerSums(
                profile=sums.profile.cpu().reshape(shape),
                totals=sums.totals.cpu().reshape(shape),
                within=sums.within.cpu().reshape(shape[:2]),
            )
            for sums in (self._whole, self._grouped)
        )
        return whole, grouped, ReleasedSums(*(sums.cpu() for sums in self._rows))


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
        """Update with residuals (L, N, D)."""
        x = x - self.center[:, None]
        self.n += x.shape[1]
        self.norms += x.norm(dim=-1).sum(1, dtype=torch.float64)
        cosines = F.cosine_similarity(x[1:], x[:-1], dim=-1)
        self.cosines += cosines.sum(1, dtype=torch.float64)

    def as_dict(self) -> dict[str, list[float]]:
        """The means, JSON-serializable."""
        cosine, norm = (self.cosines / self.n).tolist(), (self.norms / self.n).tolist()
        return {"cosine": cosine, "norm": norm}
