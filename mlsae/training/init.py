"""Initialization: the size of the SAE, and the center and spread of the first batch of residuals.

Legend: L layers, N tokens, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_topk import SparseTopKSAE

from .. import metrics
from ..batchtopk import resolve_k_max
from ..config import TrainConfig
from ..data.stream import Shape
from ..distributed import ALONE, Group
from ..errors import InputError
from ..model import MLSAE, MLSAEConfig

_MEDIAN_VECTORS = 2**16  # more would take memory, and hardly move the median
_VECTORS_AT_ONCE = 2**13  # encoded and reconstructed, to fit the scale


def mlsae_config(config: TrainConfig, shape: Shape) -> MLSAEConfig:
    """The MLSAE to train by `config` on residuals of `shape`. Raises InputError if it has fewer
    latents than k, or k_max."""
    k, n_latents = config.sae.k, config.sae.n_latents or config.sae.expansion * shape.d_in
    if k > n_latents:
        raise InputError(f"--sae.k must be in [1, {n_latents}] (the number of latents), got {k}")
    k_max = resolve_k_max(config.sae.activation, k, config.sae.k_max, n_latents)
    standardize, model = config.sae.standardize, config.data.model
    return MLSAEConfig(shape.d_in, n_latents, k, shape.layers, standardize, model, k_max=k_max)


class FirstBatch(NamedTuple):
    """What a training learns of its first batch."""

    moments: metrics.Moments
    """Of all its residuals."""
    center: Tensor
    """(D,) the geometric median of its first 2¹⁶ vectors, standardized."""
    vectors: Tensor
    """(N, D) those vectors; in each process, those of its own tokens."""


def init_stats(mlsae: MLSAE, parts: Iterable[Tensor], data: Group = ALONE.data) -> FirstBatch:
    """What residuals (L, N, D) that come in parts tell, standardized by `mlsae`, in whose basis all
    of it is.

    Each process of the group `data` has the parts of its own tokens, lower ranks the earlier ones;
    all get the same moments and center, as one process would with all the tokens.

    Raises InputError if the residuals of a layer do not vary or are not finite.
    """
    config, device = mlsae.config, mlsae.sae.W_dec.device
    moments = metrics.Moments(len(config.layers), config.d_in, device)
    standard = [torch.zeros(len(config.layers), 0, config.d_in, device=device)]
    room = max(1, _MEDIAN_VECTORS // len(config.layers))  # tokens
    for x in parts:
        left = max(0, room - int(moments.n_tokens))
        moments.update(mlsae.carry(x, config.layers).z)
        if left > 0:
            standard.append(mlsae.standardize(x[:, :left], config.layers).x)
    counts = data.all_gather(moments.n_tokens).tolist()
    own = max(0, room - int(sum(counts[: data.rank])))  # tokens that lower ranks leave to take
    first = torch.cat(standard, dim=1)[:, :own].flatten(0, 1)
    metrics.reduce([moments], [], data)
    for layer, variance in zip(config.layers, moments.variance().tolist(), strict=True):
        if not 0 < variance < math.inf:
            raise InputError(
                f"MODEL's residuals must be finite and vary, and those of layer {layer} have "
                f"the variance {variance}; leave the layer out with --layers"
            )
    return FirstBatch(moments, geometric_median(first, group=data), first)


def fit_scale_(sae: SparseTopKSAE, vectors: Tensor, data: Group = ALONE.data) -> None:
    """`SparseTopKSAE.fit_scale_` on the vectors (N, D) of all processes of the group `data`."""
    sums = torch.zeros(2, dtype=torch.float64, device=vectors.device)
    for part in vectors.split(_VECTORS_AT_ONCE):
        sums += sae.scale_sums(part)
    sae.scale_encoder_(data.sum_(sums))


@torch.no_grad()
def draw_linear_(sae: SparseTopKSAE) -> None:
    """Draw W_enc as the paper's code has it, torch.nn.Linear's own: uniform in ±1/√D, with rows of
    a norm near 1/√3; and W_dec as its rows, brought to norm 1."""
    bound = 1 / math.sqrt(sae.d_in)
    drawn = torch.empty(sae.n_latents, sae.d_in, device=sae.W_enc.device).uniform_(-bound, bound)
    sae.W_enc.copy_(sae.own_rows(drawn))
    sae.W_dec.copy_(nn.functional.normalize(sae.W_enc, dim=1))


def geometric_median(
    x: Tensor, iterations: int = 100, tolerance: float = 1e-6, group: Group = ALONE.data
) -> Tensor:
    """argmin_c Σ_n |x_n − c| by Weiszfeld's iteration: x (N, D) → (D,), over the vectors of all
    processes of `group`; the same in each.

    Stops when the center moves by less than `tolerance` of its own norm plus 1.
    """
    center = group.sum_(x.sum(0)) / group.sum_int(len(x))
    for _ in range(iterations):
        weight = 1 / (x - center).norm(dim=1).clamp_min(1e-12)
        moved = group.sum_(weight @ x) / group.sum_(weight.sum())
        close = (moved - center).norm() <= tolerance * (center.norm() + 1)
        center = moved
        if close:
            break
    return center
