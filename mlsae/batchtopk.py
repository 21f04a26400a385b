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

from sparse_topk import SAEOutput, SparseTopKSAE, TopK, topk_encode

from .errors import InputError


class BatchTopKSAE(SparseTopKSAE):
    """A `SparseTopKSAE` whose latents are active above a `threshold`, k_max per vector at most:

        h = ReLU(TopK_{k_max}((x − b_dec) W_encᵀ + b_enc)), and 0 where h ≤ threshold
        x̂ = Σ h · W_dec rows + b_dec

    Codes have the shape (…, k_max), with the values 0 where fewer latents are active; k is how many
    are on average, as far as the data are those of the training. Differentiable as a
    `SparseTopKSAE`, the threshold being fixed.
    """

    threshold: Tensor
    """() float32, ≥ 0: a buffer that `state_dict` leaves out; `config.json` has it."""

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int,
        k_max: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(d_in, n_latents, k, bias=bias, device=device)
        self.k_max = k_max
        self.register_buffer("threshold", torch.zeros((), device=device), persistent=False)

    def encode(self, x: Tensor) -> TopK:
        """The active latents of each vector: values ≥ 0 and int64 indices, each (…, k_max)."""
        values, indices = topk_encode(x - self.b_dec, self.W_enc, self.b_enc, self.k_max)
        low = values.to(torch.promote_types(values.dtype, torch.float32)) <= self.threshold
        return TopK(values.masked_fill(low, 0), indices)  # NaN is not low, and stays

    def reconstruct(self, x: Tensor) -> SAEOutput:
        """x̂ (…, D), and the active latents (…, k_max)."""
        codes = self.encode(x)
        x_hat = self.decode(codes)
        if not torch.is_autocast_enabled(self.W_dec.device.type):
            x_hat = x_hat.to(x.dtype)
        return SAEOutput(x_hat, *codes)

    @torch.no_grad()
    def scale_sums(self, x: Tensor, x_hat: Tensor | None = None) -> Tensor:
        """As `SparseTopKSAE.scale_sums`, with the k largest of each vector: before the training,
        there is no threshold."""
        if x_hat is None:
            x_hat = super().reconstruct(x).x_hat
        return super().scale_sums(x, x_hat)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k_max={self.k_max}, threshold={self.threshold:g}"


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
