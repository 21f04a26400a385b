"""The two that are compared: this package, and the same mathematics dense, through autograd.

Legend: N tokens, D inputs, M latents, K active latents a token, Q dead latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_topk import (
    SparseTopKSAE,
    TopK,
    UnitNormAdam,
    reference,
    sparse_decode,
    topk_encode,
    topk_sae,
)


class Side(NamedTuple):
    """One way to do the work."""

    name: str
    encode: Callable[[Tensor, Tensor, int], TopK | Tensor]
    """x (N, D), W_enc (M, D), k → codes, sparse or dense."""
    activations: Callable[[TopK | Tensor], Tensor]
    """What of the codes is differentiable."""
    decode: Callable[[TopK | Tensor, Tensor], Tensor]
    """codes, W_dec (M, D) → (N, D)."""
    sae: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
    """x (N, D), W_enc, W_dec (M, D), b_dec (D,) or None, k → x̂ (N, D)."""
    optimizer: Callable[[SparseTopKSAE], Callable[[], None]]
    """An optimizer step on all weights, W_dec kept on the unit sphere; it drops the gradients."""


def _our_activations(codes: TopK | Tensor) -> Tensor:
    return codes[0]


def _our_decode(codes: TopK | Tensor, W_dec: Tensor) -> Tensor:
    assert isinstance(codes, TopK)
    return sparse_decode(codes, W_dec, None)


def _our_optimizer(sae: SparseTopKSAE) -> Callable[[], None]:
    optimizer = UnitNormAdam(sae.parameter_groups())

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def _dense_activations(codes: TopK | Tensor) -> Tensor:
    assert isinstance(codes, Tensor)
    return codes


def _dense_decode(codes: TopK | Tensor, W_dec: Tensor) -> Tensor:
    return reference.decode(_dense_activations(codes), W_dec, None)


def _dense_sae(x: Tensor, W_enc: Tensor, W_dec: Tensor, b_dec: Tensor | None, k: int) -> Tensor:
    centered = x if b_dec is None else x - b_dec
    return reference.decode(reference.encode(centered, W_enc, None, k), W_dec, b_dec)


def _dense_optimizer(sae: SparseTopKSAE) -> Callable[[], None]:
    """Torch's fused Adam, with the projection and the norm as one would write them."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, eps=6.25e-10, fused=True)

    @torch.no_grad()
    def step() -> None:
        grad = sae.W_dec.grad
        assert grad is not None
        grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
        optimizer.step()
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        optimizer.zero_grad()

    return step


OURS = Side(
    "ours",
    lambda x, W_enc, k: topk_encode(x, W_enc, None, k),
    _our_activations,
    _our_decode,
    lambda x, W_enc, W_dec, b_dec, k: topk_sae(x, W_enc, None, W_dec, b_dec, k).x_hat,
    _our_optimizer,
)
DENSE = Side(
    "dense",
    lambda x, W_enc, k: reference.encode(x, W_enc, None, k),
    _dense_activations,
    _dense_decode,
    _dense_sae,
    _dense_optimizer,
)
SIDES = (OURS, DENSE)


def loss(
    side: Side,
    sae: SparseTopKSAE,
    x: Tensor,
    dtype: torch.dtype,
    dead: Tensor | None = None,
    k_aux: int = 0,
) -> Tensor:
    """mean (x − x̂)², and with `dead` latents (Q,) 1/32 of AuxK, mean (e − ê)² of the detached
    error e: float32 weights, computed in `dtype` through autocast."""
    half = dtype != torch.float32
    with torch.autocast(x.device.type, dtype, enabled=half):
        x_hat = side.sae(x, sae.W_enc, sae.W_dec, sae.b_dec, sae.k)
        total = (x - x_hat).square().mean()
        if dead is not None:
            error, centered = (x - x_hat).detach(), (x - sae.b_dec).detach()
            e_hat = side.sae(centered, sae.W_enc[dead], sae.W_dec[dead], None, k_aux)
            total = total + (error - e_hat).square().mean() / 32
    return total
