"""The dense TopK SAE: ten lines of mathematics, differentiated by autograd.

This is the oracle of the tests and the baseline of the benchmarks. It stores every (N, M)
matrix that the rest of the package avoids, and shares no code with it.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> Tensor:
    """f = ReLU(TopK(x W_encᵀ + b_enc)): the k largest scores of each row are kept, ties as in
    `torch.topk`. x (N, D), W_enc (M, D), b_enc (M,) → f (N, M), 0 where not kept."""
    scores = x @ W_enc.T if b_enc is None else x @ W_enc.T + b_enc  # (N, M)
    values, indices = scores.topk(k, dim=1)  # (N, K)
    return torch.zeros_like(scores).scatter(1, indices, values.relu())


def decode(f: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """x̂ = f W_dec + b_dec. f (N, M), W_dec (M, D), b_dec (D,) → (N, D)."""
    return f @ W_dec if b_dec is None else f @ W_dec + b_dec


def topk_sae(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, W_dec: Tensor, b_dec: Tensor, k: int
) -> Tensor:
    """x̂ = decode(encode(x − b_dec)): the whole SAE, (N, D) → (N, D)."""
    return decode(encode(x - b_dec, W_enc, b_enc, k), W_dec, b_dec)
