"""Which activations of a part of a batch stay, for BatchTopK; and the threshold for inference.

    t = the (k · n)-th largest of the candidates of the part's n kept vectors
    h ← h where h ≥ t, else 0

The candidates are the k_max largest of each vector. That is exact unless a vector has all its
candidates kept, since more of its activations may exceed t then: such vectors are `capped`, and
are counted. Ties at t all stay, so the budget can be exceeded by them: which latents are active
depends on no order, and equal vectors have equal codes.

Legend: L layers, N tokens, k_max candidates per vector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DECAY = 0.9  # per step: longer means lag, as thresholds fall while the SAE learns


class Selected(NamedTuple):
    """What a selection tells, summed over the parts of a step."""

    threshold: Tensor
    """() float64, t times the number of kept tokens."""
    capped: Tensor
    """() float64, vectors that have all their candidates kept, though there are more latents."""


def keep_largest(
    values: Tensor, mask: Tensor | None, n_layers: int, k: int, n_latents: int
) -> tuple[Tensor, Selected]:
    """The candidates, with 0 for those that do not stay, and in tokens that `mask` (N,) leaves out.

    values (L·N, k_max), ≥ 0 or NaN, with k ≤ k_max → the same shape. NaN counts as the largest, and
    stays. With fewer than k · n positive candidates, t is 0 and all stay. The host does not wait
    for the device: how many tokens are kept is known there only.
    """
    n_vectors, k_max = values.shape
    if n_vectors == 0:
        nothing = values.new_zeros((), dtype=torch.float64)
        return values, Selected(nothing, nothing)
    if mask is None:
        mask = values.new_ones(n_vectors // n_layers, dtype=torch.bool)
    values = values.where(mask.repeat(n_layers)[:, None], 0)
    n_tokens = mask.sum()
    ranked = values.flatten().topk(k * n_vectors).values  # the budget if no token is left out
    last = (k * n_layers * n_tokens - 1).clamp_min(0)
    threshold = ranked.index_select(0, last.view(1))  # indexing with `last` would wait
    kept = values.masked_fill(values < threshold, 0)
    full = (kept > 0).all(1) if k_max < n_latents else torch.zeros_like(kept[:, 0])
    return kept, Selected(threshold[0].double() * n_tokens, full.sum(dtype=torch.float64))


class RunningThreshold:
    """The mean of the steps' thresholds, older steps counting less:

        m ← 0.9 m + 0.1 t        threshold = m / (1 − 0.9ˢ) after s steps

    A step's t is the mean over its parts, in all processes, weighted by their tokens.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self._mean = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, threshold: Tensor) -> Tensor:
        """Add a step's t (); the threshold () float64 after it."""
        self.steps += 1
        self._mean = self._mean.lerp(threshold, 1 - DECAY)
        return self.value()

    def value(self) -> Tensor:
        """The threshold () float64; 0 before the first step."""
        return self._mean / (1 - DECAY**self.steps) if self.steps else self._mean

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""
        return {"steps": self.steps, "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.steps, self._mean = state["steps"], state["mean"].to(self._mean.device)
