"""The two implementations that the suite compares: this package, and the same mathematics computed
densely through autograd.

Legend: N tokens, D inputs, M latents, K active latents per token, Q dead latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


class Impl(NamedTuple):
    """One implementation of an SAE's ops and of its optimizer step."""

    name: str
    encode: Callable[[Tensor, Tensor, int], TopK | Tensor]
    """x (N, D), W_enc (M, D), k → codes, sparse or dense."""
    activations: Callable[[TopK | Tensor], Tensor]
    """The differentiable part of the codes."""
    decode: Callable[[TopK | Tensor, Tensor], Tensor]
    """codes, W_dec (M, D) → (N, D)."""
    sae: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
    """x (N, D), W_enc, W_dec (M, D), b_dec (D,) or None, k → x̂ (N, D)."""
    optimizer: Callable[[SparseTopKSAE], Callable[[], None]]
    """Build the function that updates all weights, keeps W_dec on the unit sphere, and drops the
    gradients."""


def _our_activations(codes: TopK | Tensor) -> Tensor:
    return codes[0]


def _our_decode(codes: TopK | Tensor, W_dec: Tensor) -> Tensor:
    assert isinstance(codes, TopK)
    return sparse_decode(codes, W_dec, None)


def fused_adam(parameters: Iterable[Tensor]) -> torch.optim.Adam:
    """Torch's fastest Adam, for every implementation that has none of its own."""
    return torch.optim.Adam(parameters, lr=1e-4, eps=6.25e-10, fused=True)


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
    """Fused Adam, with the projection and the norm in plain torch."""
    optimizer = fused_adam(sae.parameters())

    @torch.no_grad()
    def step() -> None:
        grad = sae.W_dec.grad
        assert grad is not None
        grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
        optimizer.step()
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        optimizer.zero_grad()

    return step


OURS = Impl(
    "ours",
    lambda x, W_enc, k: topk_encode(x, W_enc, None, k),
    _our_activations,
    _our_decode,
    lambda x, W_enc, W_dec, b_dec, k: topk_sae(x, W_enc, None, W_dec, b_dec, k).x_hat,
    _our_optimizer,
)
DENSE = Impl(
    "dense",
    lambda x, W_enc, k: reference.encode(x, W_enc, None, k),
    _dense_activations,
    _dense_decode,
    _dense_sae,
    _dense_optimizer,
)
IMPLS = (OURS, DENSE)


def loss(
    impl: Impl,
    sae: SparseTopKSAE,
    x: Tensor,
    dtype: torch.dtype,
    dead: Tensor | None = None,
    k_aux: int = 0,
) -> Tensor:
    """mean (x − x̂)², plus, if `dead` latents (Q,) are given, 1/32 of AuxK's mean (e − ê)², where e
    is the detached error x − x̂. The weights are float32; autocast computes in `dtype`."""
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        x_hat = impl.sae(x, sae.W_enc, sae.W_dec, sae.b_dec, sae.k)
        total = (x - x_hat).square().mean()
        if dead is not None:
            error, centered = (x - x_hat).detach(), (x - sae.b_dec).detach()
            e_hat = impl.sae(centered, sae.W_enc[dead], sae.W_dec[dead], None, k_aux)
            total = total + (error - e_hat).square().mean() / 32
    return total
