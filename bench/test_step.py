"""One training step of a TopK SAE, ours against the dense reference, in one run.

    pytest bench/ --benchmark-only

A step is forward, loss (mean squared error), backward and optimizer, on the same data. The bare
matmul of the encoder is the floor. Legend: N tokens, D inputs, M latents, K active latents a token.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from sparse_topk import SparseTopKSAE, UnitNormAdam, reference

SHAPES = {"pythia-70m x64, 1024 tokens": (1024, 512, 32768, 32)}


def sparse_step(sae: SparseTopKSAE) -> Callable[[Tensor], None]:
    """This package."""
    optimizer = UnitNormAdam(sae.parameter_groups())

    def step(x: Tensor) -> None:
        (sae(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense_step(sae: SparseTopKSAE) -> Callable[[Tensor], None]:
    """The same mathematics through autograd, dense, with torch's fused Adam."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, eps=6.25e-10, fused=True)

    def step(x: Tensor) -> None:
        x_hat = reference.topk_sae(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
        (x_hat - x).square().mean().backward()
        with torch.no_grad():
            grad = sae.W_dec.grad
            assert grad is not None
            grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            optimizer.step()
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        optimizer.zero_grad()

    return step


def matmul_floor(sae: SparseTopKSAE) -> Callable[[Tensor], None]:
    """The encoder's matmul alone: what no exact TopK step can do without."""
    weights = sae.W_enc.detach()
    out = torch.empty(0)

    def step(x: Tensor) -> None:
        torch.mm(x, weights.T, out=out)

    return step


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [sparse_step, dense_step, matmul_floor], ids=lambda f: f.__name__)
def test_training_step(
    benchmark: BenchmarkFixture,
    make: Callable[[SparseTopKSAE], Callable[[Tensor], None]],
    shape: str,
) -> None:
    """Time one step in float32 on the CPU."""
    n, d, m, k = SHAPES[shape]
    torch.manual_seed(0)
    step = make(SparseTopKSAE(d, m, k, bias=False))
    inputs = [torch.randn(n, d) for _ in range(4)]  # another batch each round, as in training
    benchmark.group = f"training step, {shape}, float32"
    benchmark.extra_info["floor_flop"] = 2 * n * d * m
    rounds = iter(range(10**9))
    benchmark.pedantic(
        lambda: step(inputs[next(rounds) % 4]), rounds=7, warmup_rounds=1, iterations=1
    )
