"""The ops of the optimizers in plain torch.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.adam import adam

_BLOCK_BYTES = 2**21  # of weights updated at a time: they stay in the cache


@torch.no_grad()
def adam_unit_norm_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    unit_norm: bool,
    grad_scale: Tensor | None = None,
    shadow: Tensor | None = None,
) -> None:
    """One Adam step in place; with `unit_norm`, on the unit sphere of each row.

    For each row w of `weight` with gradient g:
        g ← grad_scale · g       for clipping: a factor on the device, or 1 if None
        g ← g − (g·w) w          the part that would only change the norm is removed
        w ← Adam(w, g)           bias-corrected (Kingma and Ba, 2015), `step` counted from 1
        w ← w / |w|              also stored in `shadow`, in its dtype, if given

    A row that is 0 after Adam stays 0; any other finite row gets norm 1, also where its squares
    overflow or underflow. So a pruned row stays 0 until it has a gradient, and then gets norm 1.

    weight, grad, exp_avg, exp_avg_sq, shadow (…) of one shape; (M, D) with `unit_norm`.
    grad_scale () on the weight's device. `grad` is not written to. If there is more to do than
    Adam, it is done a block of rows at a time, so that memory is read and written once.
    """
    if not weight.numel():
        return
    steps = torch.tensor(float(step - 1))
    flat = [
        t.view(len(t), -1) if t.ndim else t.view(1, 1)
        for t in (weight, grad, exp_avg, exp_avg_sq, weight if shadow is None else shadow)
    ]
    rows = max(1, _BLOCK_BYTES // max(1, flat[0].shape[1] * weight.element_size()))
    if not unit_norm and grad_scale is None and shadow is None:
        rows = len(flat[0])  # Adam alone is one pass already
    for w, g, m, v, copy in zip(*(t.split(rows) for t in flat), strict=True):
        g = _tangent(w, g, grad_scale, unit_norm)
        adam(
            [w], [g], [m], [v], [], [steps.clone()],
            fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1],
            lr=lr, weight_decay=0.0, eps=eps, maximize=False,
        )  # fmt: skip
        if unit_norm:
            _normalize_rows_(w)
        if shadow is not None:
            copy.copy_(w)
    for written in (weight, exp_avg, exp_avg_sq):  # torch's fused Adam does not count its writes
        torch.autograd.graph.increment_version(written)


def _tangent(w: Tensor, g: Tensor, grad_scale: Tensor | None, unit_norm: bool) -> Tensor:
    """The gradient (M, D), scaled if there is a scale, and with `unit_norm` without its part along
    the rows of w."""
    if grad_scale is not None:
        g = g * grad_scale
    return g.addcmul((g * w).sum(1, keepdim=True), w, value=-1) if unit_norm else g


def _normalize_rows_(w: Tensor) -> None:
    """w ← w / |w| for each row of w (M, D), in place; a row of zeros stays."""
    norms = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    low = math.sqrt(torch.finfo(w.dtype).tiny / torch.finfo(w.dtype).eps)  # squares below lose bits
    ordinary = (norms > low) & (norms < 1 / low)
    if not ordinary.all():
        largest = w.abs().amax(1, keepdim=True)
        w /= largest.where(~ordinary & (largest > 0), 1)  # dividing by 1 leaves the others' bits
        norms = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        norms = norms.where(norms != 0, 1)
    w /= norms


@torch.no_grad()
def tangent_momentum_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    beta: float,
    unit_norm: bool,
    dtype: torch.dtype,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """NorMuon's momentum, in place, and the direction that is then orthogonalized, in `dtype`.

    For each row w of `weight` with gradient g:
        g ← grad_scale · g       for clipping: a factor on the device, or 1 if None
        g ← g − (g·w) w          with `unit_norm`, as in `adam_unit_norm_`
        m ← m + (1 − β) (g − m)
        n = g + β (m − g)        Nesterov's momentum: what is returned

    weight, grad, exp_avg (M, D) → (M, D). `grad` is not written to.
    """
    direction = torch.empty_like(grad, dtype=dtype)
    for w, g, m, n in _blocks(weight, grad, exp_avg, direction):
        g = _tangent(w, g, grad_scale, unit_norm)
        m.lerp_(g, 1 - beta)
        n.copy_(torch.lerp(g, m, beta))
    return direction


@torch.no_grad()
def apply_rows_(
    weight: Tensor,
    update: Tensor,
    row_sq: Tensor,
    *,
    lr: float,
    beta: float,
    bias_correction: float,
    eps: float,
    unit_norm: bool,
    shadow: Tensor | None = None,
) -> None:
    """NorMuon's step, in place, with each row of the update brought to one size.

    For each row w of `weight` with update u:
        r ← r + (1 − β) (mean of u² − r)
        w ← w − lr · u / (√(r / bias_correction) + ε)
        w ← w / |w|              with `unit_norm`, as in `adam_unit_norm_`

    and w is also stored in `shadow`, in its dtype, if given. weight, update, shadow (M, D), row_sq
    (M, 1).
    """
    for w, u, r, copy in _blocks(weight, update, row_sq, weight if shadow is None else shadow):
        u = u.to(w.dtype)
        r.lerp_(u.square().mean(1, keepdim=True), 1 - beta)
        w.addcmul_(u, 1 / ((r / bias_correction).sqrt_() + eps), value=-lr)
        if unit_norm:
            _normalize_rows_(w)
        if shadow is not None:
            copy.copy_(w)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors (M, …), so many rows at a time that those of the first stay in the cache."""
    first = tensors[0]
    row_bytes = first.element_size() * max(1, first.shape[1])
    return zip(*(t.split(max(1, _BLOCK_BYTES // row_bytes)) for t in tensors), strict=True)
