"""`NorMuon`: an optimizer that orthogonalizes the updates of matrices.

Legend: D inputs, M latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import dtensor, ops
from .matmul import product
from .optim import UnitNormAdam
from .shadows import is_plain

# The coefficients of Keller Jordan's Muon: after five iterations, singular values from 0.002 to 1
# of the largest lie between 0.68 and 1.13.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS = 0.2  # of an update, in units of lr: near Adam's, so that both have rates of one size


class NorMuon(UnitNormAdam):
    """Muon with one size of update for every row, for weights whose rows are latents; Adam for
    vectors.

        optimizer = NorMuon(sae.parameter_groups(), lr=4e-4)

    For a matrix W (M, D) with gradient G, tangent to the rows' sphere with `unit_norm`:

        m ← β₁ m + (1 − β₁) G
        u ← orthogonalize(β₁ m + (1 − β₁) G)               see `orthogonalize`
        r ← β₂ r + (1 − β₂) mean of u² over each row
        W ← W − 0.2 lr u / (√(r / (1 − β₂ᵗ)) + ε)
        W ← W / |W| for each row, with `unit_norm`

    (Li et al., arXiv 2510.05491; Jordan et al., Muon, 2024; 0.2 as in arXiv 2502.16982.) It keeps
    one moment of a matrix and a number per row, where Adam keeps two moments. Parameters that are
    no matrices, and groups with `orthogonal=False`, take `UnitNormAdam`'s step with the same lr,
    betas and eps.

    `sum_rows` adds up, in place, a matrix (D, D) over the processes that hold other rows of the
    same weight; give it when rows are sharded by other means than DTensor. `dtype` is what the
    products with W's shape are computed in, with sums in float32; None: the parameter's own.

    Everything else is as in `UnitNormAdam`, and so are the errors; besides, ValueError if an
    orthogonalized parameter is a DTensor whose rows are split among processes.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.5, 0.95),
        eps: float = 6.25e-10,
        *,
        sum_rows: Callable[[Tensor], Tensor] = lambda gram: gram,
        dtype: torch.dtype | None = None,
        **more: Any,
    ) -> None:
        self.sum_rows, self.dtype = sum_rows, dtype
        super().__init__(params, lr, betas, eps, **more)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Raises ValueError as the class does."""
        super().add_param_group({"orthogonal": True, **param_group})
        for p in self.param_groups[-1]["params"]:
            if p.ndim == 2 and self.param_groups[-1]["orthogonal"] and not is_plain(p):
                dtensor.check_whole_rows(p)

    def _update(
        self,
        group: dict[str, Any],
        p: Tensor,
        grad: Tensor,
        grad_scale: Tensor | None,
        shadow: Tensor | None,
    ) -> None:
        if p.ndim != 2 or not group["orthogonal"]:
            super()._update(group, p, grad, grad_scale, shadow)
            return
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["row_sq"] = torch.zeros_like(p[:, :1])
        state["step"] += 1
        w, g, m, r = p, grad, state["exp_avg"], state["row_sq"]
        sum_rows = self.sum_rows
        if not is_plain(p):
            (w, g, m, r), sum_rows = dtensor.own_rows(p, grad, m, r)
        beta1, beta2 = group["betas"]
        direction = ops.tangent_momentum_(
            w, g, m, beta=beta1, unit_norm=group["unit_norm"],
            dtype=self.dtype or p.dtype, grad_scale=grad_scale,
        )  # fmt: skip
        update = orthogonalize(direction, sum_rows)
        ops.apply_rows_(
            w, update, r,
            lr=_RMS * group["lr"], beta=beta2, bias_correction=1 - beta2 ** state["step"],
            eps=group["eps"], unit_norm=group["unit_norm"], shadow=shadow,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        names = ("sum_rows", "dtype")
        return super().__getstate__() | {name: getattr(self, name) for name in names}


def orthogonalize(x: Tensor, sum_rows: Callable[[Tensor], Tensor] = lambda gram: gram) -> Tensor:
    """x (M, D) with its singular values brought near 1: about the orthogonal factor of its polar
    decomposition, x (xᵀx)^(−1/2), by five iterations of Newton–Schulz as Muon has them.

    Every iterate is x times a polynomial of xᵀx. So the iteration is one of (D, D) matrices, and x
    is multiplied twice, at the start and at the end: 4 M D² FLOP in x's dtype, with sums in float32
    at least; what is (D, D) is multiplied in float32 at least. In bfloat16, the result differs by
    less than 1 % of its norm for the gradients of an SAE that trains. If other processes hold other
    rows, `sum_rows` adds up the (D, D) matrices. A matrix of norm below 1e-18 becomes 0.
    """
    gram = sum_rows(product(x.T, x))
    return torch.mm(x, polar_factor(gram).to(x.dtype))


def polar_factor(gram: Tensor) -> Tensor:
    """The polynomial P (D, D) of xᵀx (D, D) for which x P has singular values near 1."""
    a, b, c = _QUINTIC
    tiny = torch.finfo(gram.dtype).tiny
    trace = gram.trace()
    square = gram / trace.clamp_min(tiny)  # of the iterate: its singular values, squared
    factor = None
    for left in reversed(range(_ITERATIONS)):
        step = torch.addmm(square, square, square, beta=b, alpha=c)
        step.diagonal().add_(a)
        factor = step if factor is None else factor @ step
        if left:
            square = step @ square @ step
    assert factor is not None
    return factor * trace.clamp_min(tiny).rsqrt()
