"""`UnitNormAdam`: Adam that can keep the rows of a weight on the unit sphere.

Legend: D inputs, M latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import dtensor, ops
from .shadows import Shadows, is_plain

NORM_TOLERANCE = 1e-2
"""How far from 1 the norm of a row may be when training begins: as far as rounding to bfloat16
moves it, and ten times as far as other libraries leave it. The first step makes it 1."""


class UnitNormAdam(torch.optim.Optimizer):
    """Adam whose groups with `unit_norm=True` keep every row at norm 1.

        optimizer = UnitNormAdam(sae.parameter_groups(), lr=4e-4)

    For a row w of such a group: g ← g − (g·w) w, then Adam (Kingma and Ba, 2015), then
    w ← w / |w|. The constraint thus holds after every step, including the last. `eps` defaults to
    6.25e-10, as in arXiv 2409.04185, App. A. A row of zeros (a pruned latent) stays zero until it
    has a gradient, and then gets norm 1.

    The rows must have norm 1 within 0.01, or be zero, when the optimizer is made and at the first
    step: normalizing others would change what the SAE computes. `SparseTopKSAE.fold_norms_` gives
    them norm 1; `UnitNormAdam(sae.parameters())` trains them as they are.

    With `max_grad_norm`, the gradients of all groups together are first scaled to at most this
    norm, as `torch.nn.utils.clip_grad_norm_` would, but without waiting for the device. It is not
    part of the state dict; pass it again when resuming. `total_norm` computes the norm of the list
    of gradients, which is in the order of the groups; override it when gradients are sharded by
    other means than DTensor.

    With `shadows`, a step also writes the copies of the parameters that have been asked for (see
    `shadows.Shadows`).

    Parameters may be DTensors, as `fully_shard` (FSDP2) makes them; make the optimizer after it. A
    `unit_norm` one may be replicated or sharded by rows on any mesh, or by columns on a mesh of one
    dimension. The state is sharded like the parameters, so that torch's distributed checkpoint
    saves it. Making the optimizer and its steps are then collective.

    Raises ValueError if lr, a beta, eps or max_grad_norm is out of range, a `unit_norm` parameter
    is not a matrix or has other rows, or a parameter is placed otherwise or of a tensor class whose
    memory cannot be updated here; RuntimeError on sparse gradients.
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
        shadows: Shadows | None = None,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must each be in [0, 1), got {betas}")
        if eps < 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
        self.max_grad_norm, self.total_norm, self.shadows = max_grad_norm, total_norm, shadows
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "unit_norm": unit_norm})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Raises ValueError as the class does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for i, p in enumerate(group["params"]):
            name = group.get("param_names", {i: f"{i} of group {len(self.param_groups) - 1}"})[i]
            _check_parameter(p, f"parameter {name}, {tuple(p.shape)},", group["unit_norm"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. The gradients themselves are not written to,
        even when the step is clipped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = self._grad_scale()
        moving = [
            (group, p, p.grad)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        for group, p, _ in moving:  # before any is updated
            if group["unit_norm"] and not self.state[p]:
                _check_rows(p)
        for group, p, grad in moving:
            shadow = None if self.shadows is None else self.shadows.to_write(p)
            scale = None if grad_scale is None else grad_scale.to(p.device)
            self._update(group, p, grad, scale, shadow)
            if self.shadows is not None and shadow is not None:
                self.shadows.written(p)
        return loss

    def _update(
        self,
        group: dict[str, Any],
        p: Tensor,
        grad: Tensor,
        grad_scale: Tensor | None,
        shadow: Tensor | None,
    ) -> None:
        """Update a parameter, and the shadow with it."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        update = ops.adam_unit_norm_ if is_plain(p) else dtensor.adam_unit_norm_
        update(
            p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"],
            lr=group["lr"], betas=group["betas"], eps=group["eps"],
            unit_norm=group["unit_norm"], grad_scale=grad_scale, shadow=shadow,
        )  # fmt: skip

    def _grad_scale(self) -> Tensor | None:
        """min(1, max_grad_norm / |all gradients|), on the device; None if not clipping."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if self.max_grad_norm is None or not grads:
            return None
        norm = self.total_norm(grads)
        norm = norm if is_plain(norm) else dtensor.whole(norm)
        return (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_grad_norm", "total_norm", "shadows")
        return super().__getstate__() | {name: getattr(self, name) for name in names}


def _check_parameter(p: Tensor, name: str, unit_norm: bool) -> None:
    if unit_norm and p.ndim != 2:
        raise ValueError(
            f"a unit_norm parameter must be a matrix, its rows of norm 1, "
            f"got the shape {tuple(p.shape)}"
        )
    if not is_plain(p):
        dtensor.check_placements(p, name, unit_norm)
    if unit_norm:
        _check_rows(p)


@torch.no_grad()
def _check_rows(p: Tensor) -> None:
    """Raise ValueError unless every row of p (M, D) has norm 1 within the tolerance, or is 0."""
    if p.is_meta or isinstance(p, FakeTensor) or not p.numel():
        return
    wide = torch.promote_types(p.dtype, torch.float32)
    norms = torch.linalg.vector_norm(p, dim=1, dtype=wide)
    largest = torch.linalg.vector_norm(p, torch.inf, dim=1)
    if not is_plain(p):
        norms, largest = dtensor.whole(norms), dtensor.whole(largest)
    off = ~((norms - 1).abs() <= NORM_TOLERANCE) & (largest != 0)
    if off.any():
        worst = int(off.nonzero()[0])
        raise ValueError(
            f"the rows of a unit_norm parameter must have norm 1 within {NORM_TOLERANCE}, or be "
            f"zero, got {int(off.sum())} of {len(off)} others, the first row {worst} of norm "
            f"{norms[worst].item():.4g}; the first step would change what the SAE computes. Call "
            "sae.fold_norms_() first, or train the rows as they are with "
            "UnitNormAdam(sae.parameters())"
        )
