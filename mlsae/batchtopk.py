"""BatchTopK over layers: a budget of k active latents per vector, shared by the vectors of a batch.

Training keeps the k · N largest activations of N vectors together (see `training.selection`), so
that the tokens and layers that need more latents get them (Bussmann et al., arXiv 2412.06410).
Inference cannot ask what else is in the batch: it keeps what exceeds a threshold that training
learned. Both choose among the k_max largest of each vector, so that the scores are never stored.

Legend: D inputs, M latents; "…" any leading shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_topk import SparseTopKSAE, TopK

from .errors import InputError
from .formats import SavedSAE
from .jumprelu import JumpReLUSAE


class BatchTopKSAE(JumpReLUSAE):
    """A `JumpReLUSAE` with one threshold that cuts each vector at its k_max largest latents, since
    they are what the threshold was learned from:

        h = ReLU(TopK_{k_max}((x − b_dec) W_encᵀ + b_enc)), and 0 where h ≤ threshold

    Codes have the shape (…, k_max), with the values 0 where fewer latents are active; k is how many
    are on average, as far as the data are those of the training.
    """

    def encode(self, x: Tensor) -> TopK:
        """The active latents of each vector: values ≥ 0 and int64 indices, each (…, k_max)."""
        return self._above_threshold(x)

    def dense(self, x: Tensor) -> Tensor:
        """The activations as a dense tensor (…, M), k_max per vector at most."""
        return SparseTopKSAE.dense(self, x)

    @torch.no_grad()
    def scale_sums(self, x: Tensor, x_hat: Tensor | None = None) -> Tensor:
        """As `SparseTopKSAE.scale_sums`, with the k largest of each vector: before the training,
        there is no threshold."""
        if x_hat is None:
            x_hat = SparseTopKSAE.reconstruct(self, x).x_hat
        return super().scale_sums(x, x_hat)

    def to_saved(self) -> SavedSAE:
        """What the files are made of."""
        weights = {name: p.detach().cpu() for name, p in self.state_dict().items()}
        threshold = self.threshold.item()
        return SavedSAE(weights, self.k, standardize=False, k_max=self.k_max, threshold=threshold)


def resolve_k_max(activation: str, k: int, k_max: int | None, n_latents: int) -> int | None:
    """k_max of an SAE of `n_latents`, by the settings of its training; None for topk. Raises
    InputError if it exceeds the number of latents."""
    if activation == "topk":
        return None
    if k_max is not None and k_max > n_latents:
        raise InputError(
            f"--sae.k_max must be in [{k}, {n_latents}] (--sae.k to the number of latents), got "
            f"{k_max}"
        )
    return min(4 * k if k_max is None else k_max, n_latents)
