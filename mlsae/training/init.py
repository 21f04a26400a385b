"""What training begins with: the center and the spread of the first batch of residuals.

Legend: L layers, N tokens, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import metrics
from ..distributed import ALONE, Group
from ..errors import InputError
from ..model import MLSAE

_MEDIAN_VECTORS = 2**16  # of a larger first batch, the rest would take memory and move it little


def survey(
    mlsae: MLSAE, parts: Iterable[Tensor], data: Group = ALONE.data
) -> tuple[metrics.Moments, Tensor]:
    """What training begins with: the moments of residuals (L, N, D) that come in parts, and the
    geometric median (D,) of the vectors as `mlsae` standardizes them, of the first tokens with
    2¹⁶ vectors. Of the processes of the group `data`, each has the parts of its tokens, those of
    the lower ranks being the first; they get the same, as one process would of all of them.

    Raises InputError if the residuals of a layer do not vary or are not finite.
    """
    config, device = mlsae.config, mlsae.sae.W_dec.device
    moments = metrics.Moments(len(config.layers), config.d_in, device)
    standard = [torch.zeros(len(config.layers), 0, config.d_in, device=device)]
    room = max(1, _MEDIAN_VECTORS // len(config.layers))  # tokens
    for x in parts:
        left = max(0, room - moments.count)
        moments.update(x)
        if left > 0:
            standard.append(mlsae.standardize(x[:, :left])[0])
    counts = data.all_gather(torch.tensor(moments.count, device=device)).tolist()
    own = max(0, room - sum(counts[: data.rank]))  # of the first tokens of all
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
    """argmin_c Σ_n |x_n − c| by Weiszfeld's iteration: x (N, D) → (D,); of all vectors that the
    processes of `group` have together, and the same in each.

    Stops where the center moves by less than `tolerance` of its own norm plus 1.
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
