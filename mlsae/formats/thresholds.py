"""What the formats with thresholds share: their names here, and the room that a code has.

Legend: D inputs, M latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .saved import THRESHOLD, is_integer

_ROOM, _LEAST = 4, 512  # k_max is 4 times the mean, which few tokens exceed, and 512 at least
_ROWS = 4096  # of W_enc in float64 at a time


def center(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an SAE that encodes x W_encᵀ + b_enc, without subtracting b_dec, as those of
    one that subtracts it: b_enc ← b_enc + W_enc b_dec, summed in float64, then float32."""
    b_dec = weights["b_dec"].double()
    shift = torch.cat([rows.double() @ b_dec for rows in weights["W_enc"].split(_ROWS)])
    return {**weights, "b_enc": (weights["b_enc"].double() + shift).float()}


def thresholded(
    weights: dict[str, Tensor], threshold: object, path: Path, mean: object = None
) -> dict[str, Any]:
    """`weights`, `k` and `k_max` of a SavedSAE of jumprelu, whose `threshold` () or (M,) the file
    `path` has: one below 0 is 0, since ReLU makes 0 of the scores between, and equal ones are one.
    `mean`, if it is a number, is how many latents are active per token in the mean.

    Raises InputError if it is no tensor, or not finite.
    """
    if not isinstance(threshold, Tensor) or threshold.ndim > 1 or not threshold.numel():
        got = tuple(threshold.shape) if isinstance(threshold, Tensor) else threshold
        raise InputError(f"threshold in {path} must be a tensor, one per latent or one, got {got}")
    threshold = threshold.detach().float().clamp_min(0)
    if threshold.ndim == 1 and (threshold == threshold[0]).all():
        threshold = threshold[0].clone()
    n_latents = len(weights["W_enc"])
    k = mean if is_integer(mean) and 1 <= mean <= n_latents else None
    k_max = min(n_latents, max(_LEAST, _ROOM * (k or 0)))
    return {"weights": {**weights, THRESHOLD: threshold}, "k": k or k_max, "k_max": k_max}
