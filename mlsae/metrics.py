"""Metrics: each docstring is the definition that the whole project uses.

Legend: L layers, N tokens, D width of the residual stream, M latents, K active latents per token,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_topk.torch_residuals import TokenMoments
from sparse_topk.training_ops import merge_moments

from .distributed import Group


class Moments:
    """Mean and spread of vectors per layer, over any number of batches.

    Batches merge exactly (Chan, Golub and LeVeque, 1983), so the result does not depend on how the
    tokens were split. The state is float64 and stays on the device: the number of tokens (), their
    mean (L, D), and their summed squared deviation from it per dimension (L, D). Nothing is written
    to in place, so what is merged may be shared.
    """

    def __init__(self, n_layers: int, d_in: int, device: torch.device | str = "cpu") -> None:
        self._shape, self._device = (n_layers, d_in), torch.device(device)
        self._merged: TokenMoments | None = None  # none yet: no launch, and none to merge with

    @property
    def _state(self) -> TokenMoments:
        if self._merged is None:
            zero = torch.zeros((), dtype=torch.float64, device=self._device)
            self._merged = TokenMoments(zero, zero.expand(self._shape), zero.expand(self._shape))
        return self._merged

    @property
    def n_tokens(self) -> Tensor:
        """() how many tokens."""
        return self._state.n_tokens

    @property
    def mean(self) -> Tensor:
        """(L, D) their mean."""
        return self._state.mean

    @property
    def sq_dev(self) -> Tensor:
        """(L, D) Σ_n (x[ℓ, n] − mean)², per dimension."""
        return self._state.sq_dev

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Update with x (L, N, D)."""
        if x.shape[1] == 0:
            return
        mean = x.mean(1, dtype=torch.float64)
        sq_dev = (x - mean[:, None].to(x.dtype)).square().sum(1, dtype=torch.float64)
        self.merge(TokenMoments(mean.new_tensor(float(x.shape[1])), mean, sq_dev))

    def merge(self, other: Moments | TokenMoments) -> None:
        """Update with the tokens of `other`."""
        added = other._merged if isinstance(other, Moments) else other
        if added is not None:
            own = self._merged
            self._merged = added if own is None else merge_moments(own, added)

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""
        return {"count": int(self.n_tokens), "mean": self.mean, "sq_dev": self.sq_dev}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        device = self._device
        n_tokens = torch.tensor(float(state["count"]), dtype=torch.float64, device=device)
        self._merged = TokenMoments(n_tokens, state["mean"].to(device), state["sq_dev"].to(device))

    def variance(self) -> Tensor:
        """Σ_d Var_n(x[ℓ, n, d]): the mean squared distance from the layer's mean vector, (L,)."""
        return self.sq_dev.sum(1) / self.n_tokens.clamp_min(1)

    def variance_of_elements(self) -> Tensor:
        """D · Var_{n,d}(x[ℓ, n, d]): as `variance`, but about one scalar mean per layer, (L,).

        It exceeds `variance` by the spread of the dimensions' means.
        """
        return self.variance() + (self.mean - self.mean.mean(1, keepdim=True)).square().sum(1)


def reduce(moments: Sequence[Moments], sums: Sequence[Tensor], group: Group) -> None:
    """Merge the `moments` of all processes of the group, and sum their `sums`, in place: every
    process ends up with the same bits.

    Collective: two messages, whose size does not grow with the group. They are Σ n and Σ n · mean,
    then Σ [squared deviations + n · (own mean − common mean)²]: the merge of Chan et al., for many
    batches at once.
    """
    if group.size == 1:
        return
    parts = [*sums, *(m.n_tokens for m in moments), *(m.n_tokens * m.mean for m in moments)]
    totals = iter(_sum_all(parts, group))
    for sum_ in sums:
        sum_.copy_(next(totals))
    counts = [next(totals) for _ in moments]
    means = [next(totals) / count.clamp_min(1) for count in counts]
    spread = [
        m.sq_dev + m.n_tokens * (m.mean - mean).square()
        for m, mean in zip(moments, means, strict=True)
    ]
    for m, count, mean, sq_dev in zip(moments, counts, means, _sum_all(spread, group), strict=True):
        m._merged = TokenMoments(count, mean, sq_dev)


def _sum_all(parts: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Each tensor summed over the group: one message, in float64."""
    message = torch.cat([part.double().flatten() for part in parts])
    sums = group.sum_(message).split([part.numel() for part in parts])
    return [sum_.view(part.shape) for sum_, part in zip(sums, parts, strict=True)]


def fvu(sq_error: Tensor, n_tokens: int | Tensor, moments: Moments) -> Tensor:
    """Fraction of variance unexplained, per layer (L,): Σ|x − x̂|² / Σ|x − mean_n x|².

    Each dimension has its own mean, so predicting the mean vector scores 1. `sq_error` (L,) is
    Σ_n |x − x̂|² over `n_tokens` tokens; `moments` are those of the same tokens, or of other tokens
    from the same distribution.
    """
    return sq_error / n_tokens / moments.variance()


def fvu_paper(sq_error: Tensor, n_tokens: int | Tensor, moments: Moments) -> Tensor:
    """FVU as the paper computes it, per layer (L,), with the variance of all elements about one
    scalar mean (arXiv 2409.04185, §2). Where dimensions have large means, it is smaller than
    `fvu`."""
    return sq_error / n_tokens / moments.variance_of_elements()


def top_share(sq_deviation: Tensor) -> Tensor:
    """The share of the variance that the 1 % of vectors farthest from the mean carry: sq_deviation
    (L, N) = |x − mean_n x|² → (L,), in [0, 1]. 0.01 if all are as far; 0 for N < 100."""
    n = sq_deviation.shape[1] // 100
    largest = sq_deviation.topk(n, dim=1).values
    return largest.sum(1, dtype=torch.float64) / sq_deviation.sum(1, dtype=torch.float64)


def latent_layer_totals(values: Tensor, indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Σ_n h_j(n, ℓ) and the number of tokens with h_j(n, ℓ) > 0, each (M, L) float64.

    values and indices (L, N, K).
    """
    n_layers = len(values)
    flat = indices.flatten(1)  # (L, N·K)
    zeros = torch.zeros(n_layers, n_latents, dtype=torch.float64, device=values.device)
    totals = zeros.scatter_add(1, flat, values.flatten(1).double())
    counts = zeros.scatter_add(1, flat, (values.flatten(1) > 0).double())
    return totals.T, counts.T


def mean_layer(totals: Tensor) -> Tensor:
    """E[L] = Σ_ℓ ℓ p(ℓ), in units of layers: totals (…, L) → (…,).

    The distribution is p ∝ totals: a latent's summed activation, or its profile (see
    `analysis.layer_spread.LayerSums`). NaN for a latent that is never active.
    """
    layers = torch.arange(totals.shape[-1], dtype=totals.dtype, device=totals.device)
    return totals @ layers / totals.sum(-1)


def var_layer(totals: Tensor) -> Tensor:
    """Var(L) = Σ_ℓ ℓ² p(ℓ) − E[L]², with p as in `mean_layer`: totals (…, L) → (…,)."""
    layers = torch.arange(totals.shape[-1], dtype=totals.dtype, device=totals.device)
    return totals @ layers.square() / totals.sum(-1) - mean_layer(totals).square()


def normalized_entropy(totals: Tensor) -> Tensor:
    """H(L) / ln L, with p as in `mean_layer`: totals (…, L) → (…,). 0 if one layer has all, 1 if
    all layers have the same."""
    p = totals / totals.sum(-1, keepdim=True)
    n_layers = max(totals.shape[-1], 2)
    return torch.special.entr(p).sum(-1) / torch.tensor(float(n_layers)).log()


def pca_explained(scatter: Tensor, k: int) -> Tensor:
    """Fraction of variance explained by the first k principal components: Σ_{i≤k} λ_i / Σ_i λ_i.

    The λ_i, in descending order, are the eigenvalues of `scatter` (…, D, D) = Σ_n (x_n − mean)
    (x_n − mean)ᵀ. No affine map through k dimensions explains more of these tokens (Eckart and
    Young, 1936), so compare it with an SAE's 1 − `fvu`. → (…), in [0, 1].
    """
    eigenvalues = torch.linalg.eigvalsh(scatter).clamp_min(0)  # ascending
    return eigenvalues[..., -k:].sum(-1) / eigenvalues.sum(-1)


def token_scores(
    true_log_p: Tensor, logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How well substituted `logits` (N, V) predict at each position: three of (N,) float32.

        −ln q(target)                     cross-entropy, nats
        KL(p ‖ q) = Σ_v p (ln p − ln q)   nats; true p, substituted q; ≥ 0
        argmax_v q = argmax_v p           top-1 agreement, 0 or 1

    true_log_p (N, V) = ln p, float32; q = softmax(logits); targets (N,) int64. (The paper's
    released code computes KL(q ‖ p), summed over positions.)
    """
    log_q = logits.float().log_softmax(-1)
    cross_entropy = -log_q.gather(-1, targets[:, None]).squeeze(-1)
    agree = log_q.argmax(-1) == true_log_p.argmax(-1)
    kl = (true_log_p.exp() * (true_log_p - log_q)).sum(-1)
    return cross_entropy, kl, agree.float()


def ce_recovered(true: Tensor, substituted: Tensor, ablated: Tensor) -> Tensor:
    """(CE_ablated − CE_substituted) / (CE_ablated − CE_true): 1 if the substitution costs nothing,
    0 if it costs as much as the ablation (Gao et al., arXiv 2406.04093; SAEBench, arXiv 2503.09532,
    with zero-ablation)."""
    return (ablated - substituted) / (ablated - true)
