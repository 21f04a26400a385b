"""A training step, ours against dense autograd: its parts, the whole, with AuxK, and how the whole
grows with each size.

Weights are float32; bfloat16 is what autocast computes in, as in training.

Legend: N tokens, D inputs, M latents, K active latents a token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_topk import SparseTopKSAE

from . import costs
from .conftest import Measure
from .shapes import Shape, scaled
from .sides import OURS, Side, loss
from .test_verbs import KIND, each_dtype, each_shape, each_side, tokens


@each_dtype
@each_shape
@each_side
def test_forward(
    measure: Measure, device: torch.device, side: Side, shape: Shape, dtype: torch.dtype
) -> None:
    """x → x̂ → loss, with all that the backward needs kept."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, bias=False, device=device)
    x = tokens(shape, torch.float32, device)
    parts = costs.step(shape, dtype.itemsize)[:2]

    def work(x: Tensor) -> None:
        loss(side, sae, x, dtype)

    measure("forward", side.name, shape, dtype, work, lambda: (next(x),), parts)


@each_dtype
@each_shape
@each_side
def test_backward(
    measure: Measure, device: torch.device, side: Side, shape: Shape, dtype: torch.dtype
) -> None:
    """The loss → the gradients of all weights."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, bias=False, device=device)
    x = tokens(shape, torch.float32, device)
    parts = costs.step(shape, dtype.itemsize)[2:3]

    def prepare() -> tuple[Tensor]:
        sae.zero_grad()
        return (loss(side, sae, next(x), dtype),)

    def work(loss: Tensor) -> None:
        loss.backward()

    measure("backward", side.name, shape, dtype, work, prepare, parts)


def _time_step(
    measure: Measure,
    device: torch.device,
    name: str,
    side: Side,
    shape: Shape,
    dtype: torch.dtype,
    dead: int = 0,
    axis: str | None = None,
) -> None:
    """Forward, loss, backward and optimizer; AuxK among the first `dead` latents."""
    torch.manual_seed(0)
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, bias=False, device=device)
    optimizer_step = side.optimizer(sae)
    x = tokens(shape, torch.float32, device)
    ids = torch.arange(dead, device=device) if dead else None
    k_aux = min(shape.d // 2, dead)

    def work(x: Tensor) -> None:
        loss(side, sae, x, dtype, ids, k_aux).backward()
        optimizer_step()

    parts = costs.step(shape, dtype.itemsize, dead, k_aux)
    measure(name, side.name, shape, dtype, work, lambda: (next(x),), parts, axis)


@each_dtype
@each_shape
@each_side
def test_step(
    measure: Measure, device: torch.device, side: Side, shape: Shape, dtype: torch.dtype
) -> None:
    """The whole step, no latent dead."""
    _time_step(measure, device, "step", side, shape, dtype)


@each_dtype
@each_shape
@each_side
def test_step_with_aux(
    measure: Measure, device: torch.device, side: Side, shape: Shape, dtype: torch.dtype
) -> None:
    """The whole step, one latent of 32 dead, of which AuxK activates D / 2 a token."""
    _time_step(measure, device, "step with AuxK", side, shape, dtype, dead=shape.m // 32)


@pytest.mark.parametrize(
    ("axis", "shape"),
    scaled(KIND),
    ids=[f"{axis}={getattr(shape, axis)}" for axis, shape in scaled(KIND)],
)
@each_side
def test_scaling(
    measure: Measure, device: torch.device, side: Side, axis: str, shape: Shape
) -> None:
    """The whole step, one size varied and the others kept; dense along M only."""
    if side is not OURS and axis != "m":
        pytest.skip("the dense step is drawn against M only")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    _time_step(measure, device, "step", side, shape, dtype, axis=axis)
