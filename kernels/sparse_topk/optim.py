"""Adam with, on request, rows kept on the unit sphere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import torch_ops


class UnitNormAdam(torch.optim.Optimizer):
    """Adam whose groups with `unit_norm=True` keep every row at norm 1.

        optimizer = UnitNormAdam(sae.parameter_groups(), lr=4e-4)

    For a row w of such a group: g ← g − (g·w) w, then Adam (Kingma and Ba, 2015), then
    w ← w / |w|. The constraint thus holds after every step, the last one too. `eps` defaults to
    6.25e-10, as in the MLSAE paper (arXiv 2409.04185, App. A).

    Raises ValueError where lr, a beta or eps is out of range, or a `unit_norm` parameter is not a
    matrix; RuntimeError on sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
        unit_norm: bool = False,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must each be in [0, 1), got {betas}")
        if eps < 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "unit_norm": unit_norm})
        for group in self.param_groups:
            for p in group["params"]:
                if group["unit_norm"] and p.ndim != 2:
                    raise ValueError(
                        f"a unit_norm parameter must be a matrix, its rows of norm 1, "
                        f"got the shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. The gradients are left as they were."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                torch_ops.adam_unit_norm_(
                    p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"],
                    lr=group["lr"], betas=group["betas"], eps=group["eps"],
                    unit_norm=group["unit_norm"],
                )  # fmt: skip
        return loss
