"""Initialization: the size of the SAE, and the center and spread of the first batch of residuals.

Legend: L layers, N tokens, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import metrics
from ..config import TrainConfig
from ..data.stream import Shape
from ..distributed import ALONE, Group
from ..errors import InputError
from ..model import MLSAE, MLSAEConfig

_MEDIAN_VECTORS = 2**16  # more would take memory, and hardly move the median


def mlsae_config(config: TrainConfig, shape: Shape) -> MLSAEConfig:
    """The MLSAE to train by `config` on residuals of `shape`. Raises InputError if it has fewer
    latents than k."""
    k, n_latents = config.sae.k, config.sae.n_latents or config.sae.expansion * shape.d_in
    if k > n_latents:
        raise InputError(f"--sae.k must be in [1, {n_latents}] (the number of latents), got {k}")
    standardize, model = config.sae.standardize, config.data.model
    return MLSAEConfig(shape.d_in, n_latents, k, shape.layers, standardize, model)


def init_stats(
    mlsae: MLSAE, parts: Iterable[Tensor], data: Group = ALONE.data
) -> tuple[metrics.Moments, Tensor]:
    """The moments of residuals (L, N, D) that come in parts, and the geometric median (D,) of their
    first 2¹⁶ vectors, standardized by `mlsae`.

    Each process of the group `data` has the parts of its own tokens, lower ranks the earlier ones;
    all get the same result, as one process would with all the tokens.

    Raises InputError if the residuals of a layer do not vary or are not finite.
    """
    config, device = mlsae.config, mlsae.sae.W_dec.device
    moments = metrics.Moments(len(config.layers), config.d_in, device)
    standard = [torch.zeros(len(config.layers), 0, config.d_in, device=device)]
    room = max(1, _MEDIAN_VECTORS // len(config.layers))  # tokens
    for x in parts:
        left = max(0, room - int(moments.n_tokens))
        moments.update(x)
        if left > 0:
            standard.append(mlsae.standardize(x[:, :left])[0])
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
    return moments, geometric_median(first, group=data)


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
