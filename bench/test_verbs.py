"""Each verb, ours against the dense reference; forward and backward apart.

Legend: N tokens, D inputs, M latents, K active latents a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import pytest
import torch
from torch import Tensor

from sparse_topk import SparseTopKSAE

from . import costs
from .conftest import Measure
from .shapes import SHAPES, Shape
from .sides import SIDES, Side

KIND = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float32)

each_side = pytest.mark.parametrize("side", SIDES, ids=lambda side: side.name)
each_shape = pytest.mark.parametrize("shape", SHAPES[KIND], ids=lambda shape: shape.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def tokens(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Other random x (N, D) each time, over and over."""
    some = [torch.randn(shape.n, shape.d, device=device, dtype=dtype) for _ in range(4)]
    return cycle(some)


def weight(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random rows of norm 1: (M, D)."""
    rows = torch.randn(shape.m, shape.d, device=device, dtype=dtype)
    return torch.nn.functional.normalize(rows, dim=1)


@each_dtype
@each_shape
@each_side
def test_encode(
    measure: Measure, device: torch.device, side: Side, shape: Shape, dtype: torch.dtype
) -> None:
    """x → codes."""
    x, W = tokens(shape, dtype, device), weight(shape, dtype, device)
    cost = costs.topk_encode(shape, dtype.itemsize)

    def work(x: Tensor) -> None:
        side.encode(x, W, shape.k)

    measure("encode", side.name, shape, dtype, work, lambda: (next(x),), (cost,))


@each_dtype
@each_shape
@each_side
def test_encode_backward(
    measure: Measure, device: torch.device, side: Side, shape: Shape, dtype: torch.dtype
) -> None:
    """The gradient of the codes → that of W_enc."""
    x, W = tokens(shape, dtype, device), weight(shape, dtype, device).requires_grad_()
    cost = costs.encode_backward(shape, dtype.itemsize)

    def prepare() -> tuple[Tensor, Tensor]:
        values = side.activations(side.encode(next(x), W, shape.k))
        return values, torch.randn_like(values)

    def work(values: Tensor, grad: Tensor) -> None:
        torch.autograd.grad(values, W, grad)

    measure("encode backward", side.name, shape, dtype, work, prepare, (cost,))


@each_dtype
@each_shape
@each_side
def test_decode(
    measure: Measure, device: torch.device, side: Side, shape: Shape, dtype: torch.dtype
) -> None:
    """Codes → x̂."""
    x, W = tokens(shape, dtype, device), weight(shape, dtype, device)
    codes = cycle([side.encode(next(x), W, shape.k) for _ in range(2)])
    cost = costs.gather_sum(shape, dtype.itemsize)

    def work(codes: Tensor) -> None:
        side.decode(codes, W)

    measure("decode", side.name, shape, dtype, work, lambda: (next(codes),), (cost,))


@each_dtype
@each_shape
@each_side
def test_decode_backward(
    measure: Measure, device: torch.device, side: Side, shape: Shape, dtype: torch.dtype
) -> None:
    """The gradient of x̂ → those of the codes and of W_dec."""
    x, W = tokens(shape, dtype, device), weight(shape, dtype, device)
    W_dec = W.clone().requires_grad_()
    cost = costs.decode_backward(shape, dtype.itemsize)

    def prepare() -> tuple[Tensor, Tensor, Tensor]:
        codes = side.encode(next(x), W, shape.k)
        values = side.activations(codes).requires_grad_()
        out = side.decode(codes, W_dec)
        return out, values, next(x)

    def work(out: Tensor, values: Tensor, grad: Tensor) -> None:
        torch.autograd.grad(out, (values, W_dec), grad)

    measure("decode backward", side.name, shape, dtype, work, prepare, (cost,))


@each_shape
@each_side
def test_adam(measure: Measure, device: torch.device, side: Side, shape: Shape) -> None:
    """Two float32 weights, one of them on the unit sphere."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, bias=False, device=device)
    step = side.optimizer(sae)
    grads = [torch.randn_like(sae.W_dec) for _ in range(2)]

    def prepare() -> tuple[()]:
        sae.W_enc.grad, sae.W_dec.grad = grads[0].clone(), grads[1].clone()
        sae.b_dec.grad = torch.zeros_like(sae.b_dec)
        return ()

    cost = costs.adam(shape)
    measure("adam", side.name, shape, torch.float32, step, prepare, (cost, cost))
