"""A lens in closed form, from the second moments of residuals: no training.

    A_ℓ = C_L^½ R_ℓ C_ℓ^(−½)            b_ℓ = m_L − A_ℓ m_ℓ
    R_ℓ = the rotation that maximizes tr(R C_ℓ^(−½) C_{ℓL} C_L^(−½))

m are means and C covariances, L the last layer: Procrustes' problem between whitened residuals of
the same tokens. z then has the mean and the covariance of the last layer's residuals, and of all
such maps this one's correlate most with them. Least squares would come nearer to them, but shrinks
what it cannot predict, so its inverse blows that up: on the built-in model's first layer its
condition number is 5,200 where this one's is 31, and its predictions are no better (bench/NOTES.md,
2026-11-27).

Both covariances have 1 % of their mean variance added, so that no direction without variance is
divided by: the condition number is at most 100 D + 1.

Legend: L layers, the last of them last; N tokens, D width of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 0.01  # of the mean variance, added to every direction's


class SecondMoments:
    """Means, spreads and covariances with the last layer, over any number of tokens, in float64."""

    def __init__(self, n_layers: int, d_in: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.n_tokens = 0
        self._origin: Tensor | None = None  # (L, 1, D) near the means, against cancellation
        self._sum = zeros(n_layers, d_in)
        self._own = zeros(n_layers, d_in, d_in)  # Σ x_ℓ x_ℓᵀ
        self._cross = zeros(n_layers, d_in, d_in)  # Σ x_last x_ℓᵀ

    def update(self, x: Tensor) -> None:
        """Add residuals x (L, N, D)."""
        if not x.shape[1]:
            return
        if self._origin is None:
            self._origin = x.double().mean(1, keepdim=True)
        self.n_tokens += x.shape[1]
        last = (x[-1].double() - self._origin[-1]).T
        for i, part in enumerate(x):
            own = part.double() - self._origin[i]
            self._sum[i] += own.sum(0)
            self._own[i] += own.T @ own
            self._cross[i] += last @ own

    def mean(self) -> Tensor:
        """(L, D)."""
        assert self._origin is not None, "there are tokens"
        return self._origin[:, 0] + self._sum / self.n_tokens

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Of each layer, and of the last layer with each: both (L, D, D)."""
        mean = self._sum / self.n_tokens
        own = self._own / self.n_tokens - mean[:, :, None] * mean[:, None, :]
        cross = self._cross / self.n_tokens - mean[-1][None, :, None] * mean[:, None, :]
        return own, cross


def affine_maps(moments: SecondMoments) -> tuple[Tensor, Tensor]:
    """A (L, D, D) and b (L, D), float64; those of the last layer are the identity up to rounding.

    Procrustes' problem by the singular value decomposition (Schönemann, 1966).
    """
    mean = moments.mean()
    own, cross = moments.covariance()
    d_in = mean.shape[1]
    eye = torch.eye(d_in, dtype=own.dtype, device=own.device)
    floor = _FLOOR * own.diagonal(dim1=1, dim2=2).mean(1)
    roots = [_roots(c + least * eye) for c, least in zip(own, floor, strict=True)]
    root_last, whiten_last = roots[-1]
    maps = []
    for c, (_, whiten) in zip(cross, roots, strict=True):
        left, _, right = torch.linalg.svd(whiten_last @ c @ whiten)
        maps.append(root_last @ (left @ right) @ whiten)
    matrix = torch.stack(maps)
    return matrix, mean[-1] - (matrix @ mean[..., None])[..., 0]


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^(−½) of a positive definite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
