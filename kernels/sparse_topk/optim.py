"""`UnitNormAdam`: Adam that can keep the rows of a weight on the unit sphere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import ops


class UnitNormAdam(torch.optim.Optimizer):
    """Adam whose groups with `unit_norm=True` keep every row at norm 1.

        optimizer = UnitNormAdam(sae.parameter_groups(), lr=4e-4)

    For a row w of such a group: g ← g − (g·w) w, then Adam (Kingma and Ba, 2015), then
    w ← w / |w|. The constraint thus holds after every step, including the last. `eps` defaults to
    6.25e-10, as in arXiv 2409.04185, App. A.

    With `max_grad_norm`, the gradients of all groups together are first scaled to at most this
    norm, as `torch.nn.utils.clip_grad_norm_` would, but without waiting for the device. It is not
    part of the state dict; pass it again when resuming. `total_norm` computes the norm of the list
    of gradients, which is in the order of the groups; override it when gradients are sharded.

    Raises ValueError if lr, a beta, eps or max_grad_norm is out of range, or a `unit_norm`
    parameter is not a matrix; RuntimeError on sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
        unit_norm: bool = False,
        max_grad_norm: float | None = None,
        total_norm: Callable[[list[Tensor]], Tensor] = torch.nn.utils.get_total_norm,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must each be in [0, 1), got {betas}")
        if eps < 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
        self.max_grad_norm, self.total_norm = max_grad_norm, total_norm
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
        """Update every parameter that has a gradient. The gradients themselves are not written to,
        even when the step is clipped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = self._grad_scale()
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
                ops.adam_unit_norm_(
                    p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"],
                    lr=group["lr"], betas=group["betas"], eps=group["eps"],
                    unit_norm=group["unit_norm"],
                    grad_scale=None if grad_scale is None else grad_scale.to(p.device),
                )  # fmt: skip
        return loss

    def _grad_scale(self) -> Tensor | None:
        """min(1, max_grad_norm / |all gradients|), on the device; None if not clipping."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if self.max_grad_norm is None or not grads:
            return None
        return (self.max_grad_norm / (self.total_norm(grads) + 1e-6)).clamp(max=1.0)

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_grad_norm": self.max_grad_norm, "total_norm": self.total_norm}
        return super().__getstate__() | own
