"""Oracles: slow and simple computations that results are compared with."""

import torch


def stable_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest of each row by sorting all of it: ties to the smaller index, then indices
    ascending. scores (N, M) → values and indices (N, K)."""
    indices = scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    return scores.gather(1, indices), indices
