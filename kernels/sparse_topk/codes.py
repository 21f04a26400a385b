"""What an SAE's functions take and give beside tensors.

Legend: N tokens, D inputs, K active latents per token; "…" any leading shape.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class TopK(NamedTuple):
    """The active latents of each token."""

    values: Tensor
    """(…, K) activations, ≥ 0."""
    indices: Tensor
    """(…, K) int64 ids of the latents, ascending within a token."""


class SAEOutput(NamedTuple):
    """The output of an SAE, and the active latents that it comes from.

    The order is that of sparsify's `sae_out, latent_acts, latent_indices`.
    """

    x_hat: Tensor
    """(…, D) the reconstruction."""
    values: Tensor
    """(…, K) activations, ≥ 0."""
    indices: Tensor
    """(…, K) int64 ids of the latents, ascending within a token."""

    @property
    def codes(self) -> TopK:
        """The active latents, as `sparse_decode` takes them."""
        return TopK(self.values, self.indices)


class Shards(Protocol):
    """Processes that each hold some of the latents, and all see the same tokens."""

    def keep(self, values: Tensor) -> Tensor:
        """This shard's candidates (N, K) ≥ 0, with 0 for those that are not selected."""

    def sum(self, partial: Tensor) -> Tensor:
        """Σ over the shards, the same in each."""
