"""A training step, ours against dense autograd: its parts, the whole step, the step with AuxK, and
how the step's time grows with each size.

Weights are float32, as in training; in bfloat16, autocast computes in bfloat16.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_topk import SparseTopKSAE, costs

from .cases import KIND, each_dtype, each_impl, each_shape, tokens
from .conftest import Measure
from .impls import OURS, Impl, loss
from .shapes import ProblemShape, scaled


@each_dtype
@each_shape
@each_impl
def test_forward(
    measure: Measure, device: torch.device, impl: Impl, shape: ProblemShape, dtype: torch.dtype
) -> None:
    """x → x̂ → loss, keeping what the backward pass needs."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, bias=False, device=device)
    x = tokens(shape, torch.float32, device)
    parts = costs.step(shape, dtype.itemsize)[:2]

    def work(x: Tensor) -> None:
        loss(impl, sae, x, dtype)

    measure("forward", impl.name, shape, dtype, work, lambda: (next(x),), parts)


@each_dtype
@each_shape
@each_impl
def test_backward(
    measure: Measure, device: torch.device, impl: Impl, shape: ProblemShape, dtype: torch.dtype
) -> None:
    """Loss → gradients of all weights."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, bias=False, device=device)
    x = tokens(shape, torch.float32, device)
    parts = costs.step(shape, dtype.itemsize)[2:3]

    def prepare() -> tuple[Tensor]:
        sae.zero_grad()
        return (loss(impl, sae, next(x), dtype),)

    def work(loss: Tensor) -> None:
        loss.backward()

    measure("backward", impl.name, shape, dtype, work, prepare, parts)


def _time_step(
    measure: Measure,
    device: torch.device,
    name: str,
    impl: Impl,
    shape: ProblemShape,
    dtype: torch.dtype,
    dead: int = 0,
    axis: str | None = None,
) -> None:
    """Forward, loss, backward and optimizer; with AuxK on the first `dead` latents."""
    torch.manual_seed(0)
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, bias=False, device=device)
    optimizer_step = impl.optimizer(sae)
    x = tokens(shape, torch.float32, device)
    ids = torch.arange(dead, device=device) if dead else None
    k_aux = min(shape.d // 2, dead)

    def work(x: Tensor) -> None:
        loss(impl, sae, x, dtype, ids, k_aux).backward()
        optimizer_step()

    parts = costs.step(shape, dtype.itemsize, dead, k_aux)
    measure(name, impl.name, shape, dtype, work, lambda: (next(x),), parts, axis)


@each_dtype
@each_shape
@each_impl
def test_step(
    measure: Measure, device: torch.device, impl: Impl, shape: ProblemShape, dtype: torch.dtype
) -> None:
    """The whole step, with no latent dead."""
    _time_step(measure, device, "step", impl, shape, dtype)


@each_dtype
@each_shape
@each_impl
def test_step_with_aux(
    measure: Measure, device: torch.device, impl: Impl, shape: ProblemShape, dtype: torch.dtype
) -> None:
    """The whole step, with one latent in 32 dead; AuxK activates D / 2 of them per token."""
    _time_step(measure, device, "step with AuxK", impl, shape, dtype, dead=shape.m // 32)


@pytest.mark.parametrize(
    ("axis", "shape"),
    scaled(KIND),
    ids=[f"{axis}={getattr(shape, axis)}" for axis, shape in scaled(KIND)],
)
@each_impl
def test_scaling(
    measure: Measure, device: torch.device, impl: Impl, axis: str, shape: ProblemShape
) -> None:
    """The whole step, with one size varied and the others fixed; dense along M only."""
    if impl is not OURS and axis != "m":
        pytest.skip("the dense step is plotted against M only")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    _time_step(measure, device, "step", impl, shape, dtype, axis=axis)
