"""The encoder in plain torch: the K largest scores of each token, a block of the scores at a time.

Torch's topk takes longer than the product that makes the scores. So latents are put in groups,
whose maxima are cheap, and the K largest scores are looked for in the K + 1 groups of the largest
maxima. If the K-th of them is above the (K + 1)-th, no other group has one that is as large.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group, C latents
per tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TILE_BYTES = 4 * 2**20  # of scores computed at a time: their maxima are then taken in the cache
_BLOCK_BYTES = 64 * 2**20  # of scores held at a time, if W is not in the cache
_CACHED_BYTES = 16 * 2**20  # of W, if it is; then a block is a tile, which is still there for topk
_MIN_BLOCK_ROWS = 256  # with fewer, W is read too often: 32 measured 2.1 times slower


def topk_encode(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """The K largest scores of each row of x Wᵀ + b; with `relu`, their ReLU.

    x (N, D), W (M, D), b (M,) → values (N, K) in x's dtype and indices (N, K) int64. Indices ascend
    within a row; ties go to the smaller index; NaN ranks above +Inf, as in `torch.topk`, so it is
    never dropped. With `relu`, which latents have the values 0 is left open; they are distinct.
    """
    n, m = len(x), len(W)
    held = _TILE_BYTES if W.nbytes <= _CACHED_BYTES else _BLOCK_BYTES
    rows = max(_MIN_BLOCK_ROWS, held // max(1, m * x.element_size()))
    values, indices = x.new_empty(n, k), x.new_empty(n, k, dtype=torch.int64)
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        values[block], indices[block] = _encode_block(x[block], W, b, k)
    return values.relu_() if relu else values, indices


def keep_topk_(z: Tensor, k: int) -> None:
    """Keep ReLU of the k largest of each row of z (N, Q), in place, and make all else 0.

    Ties go to the smaller index. NaN ranks above +Inf, and stays.
    """
    n_top = min(k + 1, z.shape[1])
    if k >= n_top:
        z.relu_()
        return
    top, indices = z.topk(n_top, dim=1)
    kth = top[:, k - 1]
    tied = ((kth == top[:, k]) & (kth > 0)).nonzero()[:, 0]  # topk took any of the equal ones
    if len(tied):
        indices[tied, :k] = _largest(z[tied], k)[1]
    values = z.gather(1, indices[:, :k]).relu_()
    z.zero_().scatter_(1, indices[:, :k], values)


def _encode_block(x: Tensor, W: Tensor, b: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """`topk_encode` of few rows."""
    group = _group_size(len(W), k)
    if group == 1:
        return _largest(_product(x, W, b), k)
    scores = _Scores(x, W, b, group)
    candidates, latents = scores.candidates(k + 1)
    top = candidates.topk(k + 1, dim=1)
    indices, order = latents.gather(1, top.indices[:, :k]).sort(1)
    values = top.values[:, :k].gather(1, order)
    tied_rows = (top.values[:, k - 1] == top.values[:, k]).nonzero()[:, 0]
    if len(tied_rows):  # topk took any of the equal scores
        values[tied_rows], indices[tied_rows] = _largest(scores.rows(tied_rows), k)
    return values, indices


class _Scores:
    """The scores of a block of rows x (N, D), in float32 at least, laid out tile by tile, (M/C, N,
    C), so that a tile's maxima are taken while it is in the cache.

    Group j of a tile has its latents j, j + C/G, j + 2 C/G, …: so the maxima of all groups are
    those of G vectors, whatever G is.
    """

    def __init__(self, x: Tensor, W: Tensor, b: Tensor | None, group: int) -> None:
        n, m = len(x), len(W)
        dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16's amax is slow
        width = max(1, min(_TILE_BYTES // (max(1, n) * dtype.itemsize), m) // group) * group
        self.n_latents, self.steps = m, torch.arange(0, width, width // group, device=x.device)
        self.tiles = x.new_empty(math.ceil(m / width), n, width, dtype=dtype)
        maxima = []
        for tile, first in zip(self.tiles, range(0, m, width), strict=True):
            rows = slice(first, min(first + width, m))
            n_own = rows.stop - first
            tile[:, n_own:] = -math.inf  # padding comes last, so it wins no tie with a latent
            _product(x, W[rows], None if b is None else b[rows], tile[:, :n_own])
            maxima.append(tile.unflatten(1, (group, -1)).amax(1))
        self.maxima = torch.cat(maxima, 1)
        """(N, M/G)."""

    def candidates(self, n_groups: int) -> tuple[Tensor, Tensor]:
        """The scores in the `n_groups` groups of the largest maxima, and their latents: (N,
        n_groups · G) each."""
        n_tiles, n, width = self.tiles.shape
        groups = self.maxima.topk(n_groups, dim=1, sorted=False).indices
        groups_per_tile = width // len(self.steps)
        tile, first = groups // groups_per_tile, groups % groups_per_tile
        latents = ((tile * width + first).unsqueeze(2) + self.steps).flatten(1)
        if n_tiles == 1:
            return self.tiles[0].gather(1, latents), latents
        token = torch.arange(n, device=groups.device)[:, None]
        places = ((tile * n + token) * width + first).unsqueeze(2) + self.steps
        return self.tiles.take(places.flatten(1)), latents

    def rows(self, rows: Tensor) -> Tensor:
        """All scores of the tokens `rows` (T,), (T, M)."""
        return self.tiles[:, rows].transpose(0, 1).flatten(1)[:, : self.n_latents]


def _product(x: Tensor, W: Tensor, b: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x Wᵀ + b; in `out` if given, whose dtype may be wider."""
    direct = out if out is not None and out.dtype == x.dtype else None
    scores = torch.mm(x, W.T, out=direct) if b is None else torch.addmm(b, x, W.T, out=direct)
    return scores if out is None or direct is not None else out.copy_(scores)


def _group_size(m: int, k: int) -> int:
    """Latents per group: near √(0.6 M/K), where the group maxima and the candidates, both of which
    go through topk, cost the least together; 1, no groups, if groups do not pay."""
    return 2 ** max(0, round(math.log2(math.sqrt(0.6 * m / k))))


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K largest of each row (N, M) and their positions, which ascend; ties go to the smaller
    position."""
    n_top = min(k + 1, scores.shape[1])
    top = scores.topk(n_top, dim=1)
    positions = top.indices[:, :k].sort(1).values
    if n_top > k:
        kth = top.values[:, k - 1, None]
        tied_rows = (kth == top.values[:, k:]).nonzero()[:, 0]
        if len(tied_rows):  # topk took any of the equal scores
            tied, kth = scores[tied_rows], kth[tied_rows]
            kept, equal = (tied <= kth).logical_not_(), tied == kth  # NaN is larger
            missing = k - kept.sum(1, keepdim=True)
            kept |= equal & (equal.cumsum(1) <= missing)
            positions[tied_rows] = kept.nonzero()[:, 1].view(-1, k)
    return scores.gather(1, positions), positions
