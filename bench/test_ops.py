"""Each op, ours against the dense reference, with forward and backward timed separately.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

from sparse_topk import SparseTopKSAE, costs

from .cases import each_dtype, each_impl, each_shape, tokens, weight
from .conftest import Measure
from .impls import Impl
from .shapes import ProblemShape


@each_dtype
@each_shape
@each_impl
def test_encode(
    measure: Measure, device: torch.device, impl: Impl, shape: ProblemShape, dtype: torch.dtype
) -> None:
    """x → codes."""
    x, W = tokens(shape, dtype, device), weight(shape, dtype, device)
    cost = costs.topk_encode(shape, dtype.itemsize)

    def work(x: Tensor) -> None:
        impl.encode(x, W, shape.k)

    measure("encode", impl.name, shape, dtype, work, lambda: (next(x),), (cost,))


@each_dtype
@each_shape
@each_impl
def test_encode_backward(
    measure: Measure, device: torch.device, impl: Impl, shape: ProblemShape, dtype: torch.dtype
) -> None:
    """Gradient of the codes → gradient of W_enc."""
    x, W = tokens(shape, dtype, device), weight(shape, dtype, device).requires_grad_()
    cost = costs.encode_backward(shape, dtype.itemsize)

    def prepare() -> tuple[Tensor, Tensor]:
        values = impl.activations(impl.encode(next(x), W, shape.k))
        return values, torch.randn_like(values)

    def work(values: Tensor, grad: Tensor) -> None:
        torch.autograd.grad(values, W, grad)

    measure("encode backward", impl.name, shape, dtype, work, prepare, (cost,))


@each_dtype
@each_shape
@each_impl
def test_decode(
    measure: Measure, device: torch.device, impl: Impl, shape: ProblemShape, dtype: torch.dtype
) -> None:
    """Codes → x̂."""
    x, W = tokens(shape, dtype, device), weight(shape, dtype, device)
    codes = cycle([impl.encode(next(x), W, shape.k) for _ in range(2)])
    cost = costs.gather_sum(shape, dtype.itemsize)

    def work(codes: Tensor) -> None:
        impl.decode(codes, W)

    measure("decode", impl.name, shape, dtype, work, lambda: (next(codes),), (cost,))


@each_dtype
@each_shape
@each_impl
def test_decode_backward(
    measure: Measure, device: torch.device, impl: Impl, shape: ProblemShape, dtype: torch.dtype
) -> None:
    """Gradient of x̂ → gradients of the codes and of W_dec."""
    x, W = tokens(shape, dtype, device), weight(shape, dtype, device)
    W_dec = W.clone().requires_grad_()
    cost = costs.decode_backward(shape, dtype.itemsize)

    def prepare() -> tuple[Tensor, Tensor, Tensor]:
        codes = impl.encode(next(x), W, shape.k)
        values = impl.activations(codes).requires_grad_()
        out = impl.decode(codes, W_dec)
        return out, values, next(x)

    def work(out: Tensor, values: Tensor, grad: Tensor) -> None:
        torch.autograd.grad(out, (values, W_dec), grad)

    measure("decode backward", impl.name, shape, dtype, work, prepare, (cost,))


@each_shape
@each_impl
def test_adam(measure: Measure, device: torch.device, impl: Impl, shape: ProblemShape) -> None:
    """Update two float32 weights, one of them on the unit sphere."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, bias=False, device=device)
    step = impl.optimizer(sae)
    grads = [torch.randn_like(sae.W_dec) for _ in range(2)]

    def prepare() -> tuple[()]:
        sae.W_enc.grad, sae.W_dec.grad = grads[0].clone(), grads[1].clone()
        sae.b_dec.grad = torch.zeros_like(sae.b_dec)
        return ()

    cost = costs.adam(shape)
    measure("adam", impl.name, shape, torch.float32, step, prepare, (cost, cost))
