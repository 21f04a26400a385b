"""The changes of one layer, applied to its residual.

Legend: B rows, T positions, N vectors that are changed, D width of the residual stream, J latents
that are edited, K active latents per vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import MLSAE, Reconstruction
from .activations import Activations
from .edits import Change, Edit, Replace, chosen
from .positions import Positions


class _Vectors(NamedTuple):
    """What edits are measured in, each (N, 1) in float32, or float64 if the residual is."""

    sigma: Tensor
    """What an activation of 1 adds: σ, or 1 if the MLSAE does not standardize."""
    spread: Tensor
    """The standard deviation of the vector's elements, in the basis that the MLSAE works in."""


def changed_residual(
    x: Tensor,
    changes: Sequence[Change],
    positions: Positions,
    mlsae: MLSAE,
    activations: Activations | None,
    layer: int,
) -> Tensor | None:
    """x (B, T, D), of `layer`, with the changes of that layer, in its dtype; None if none of them
    applies here.

        x' = x + Σ_j δ_j · W_dec[j],           δ_j = σ · (change of h_j)
        x' = x + A_ℓ⁻¹ Σ_j δ_j · W_dec[j]      with a lens, σ then being that of z

    or x̂ + … where x is replaced. δ and the sum are in float32, or float64 if x is. Vectors in which
    nothing changes keep their bits. All activations are those of x: that the edits of a latent come
    in an order matters, that of latents does not.
    """
    where = [chosen(change, positions) for change in changes]  # of (B, T)
    touched = torch.stack(where).any(0)
    if not touched.any():
        return None
    touched_x = touched.to(x.device)
    v = x[touched_x]  # (N, D)
    masks = [mask[touched].to(x.device)[:, None] for mask in where]  # of (N, 1)
    with torch.autocast(x.device.type, enabled=False):
        replaced, delta = _change(
            v, list(zip(changes, masks, strict=True)), mlsae, activations, layer
        )
    base = v if replaced is None else replaced
    if delta is not None:
        base = torch.where((delta != 0).any(-1, keepdim=True), base + delta.to(v.dtype), base)
    changed = x.clone()
    changed[touched_x] = base
    return changed


def _change(
    v: Tensor,
    changes: list[tuple[Change, Tensor]],
    mlsae: MLSAE,
    activations: Activations | None,
    layer: int,
) -> tuple[Tensor | None, Tensor | None]:
    """What to take in the place of v (N, D), if it is replaced anywhere; and what to add, (N, D) in
    float32 or more, if anything is edited. Changes come with where they apply, (N, 1)."""
    found = None
    if any(isinstance(c, Replace) or c.op != "add" for c, _ in changes):
        found = mlsae.reconstruct(v.to(mlsae.sae.W_dec.device), layer)
    replaced = None
    edits: dict[int, list[tuple[Edit, Tensor]]] = {}
    for change, mask in changes:
        if isinstance(change, Edit):
            edits.setdefault(change.latent, []).append((change, mask))
        elif found is not None:
            replaced = torch.where(
                mask, found.x_hat.to(v.device), v if replaced is None else replaced
            )
    if not edits:
        return replaced, None
    carried = mlsae.carry(v if mlsae.lens is None else v.to(mlsae.sae.W_dec.device), layer)
    z = carried.z.to(v.device)
    spread = z.std(-1, keepdim=True)
    sigma = spread if mlsae.config.standardize else torch.ones_like(spread)
    vectors = _Vectors(sigma, spread)
    deltas = [
        _delta(_coefficient(found, latent, vectors), own, vectors, activations)
        for latent, own in edits.items()
    ]
    rows = mlsae.sae.W_dec[list(edits)].to(z)  # (J, D)
    moved = torch.cat(deltas, 1) @ rows  # of z
    if mlsae.lens is None:
        return replaced, moved
    return replaced, carried.change(moved.to(carried.z.device)).to(v.device)


def _coefficient(found: Reconstruction | None, latent: int, vectors: _Vectors) -> Tensor:
    """σ · h of a latent, (N, 1); 0 if nothing asks for activations."""
    if found is None:
        return torch.zeros_like(vectors.sigma)
    values, indices = found.codes  # (N, K)
    h = (values * (indices == latent)).sum(-1, keepdim=True)
    return vectors.sigma * h.to(vectors.sigma)


def _delta(
    now: Tensor,
    edits: list[tuple[Edit, Tensor]],
    vectors: _Vectors,
    activations: Activations | None,
) -> Tensor:
    """How the coefficient `now` (N, 1) of a latent changes by its edits, one after another: (N,
    1)."""
    delta = torch.zeros_like(now)
    for edit, mask in edits:
        value = 0.0 if edit.value is None else edit.value
        if edit.op == "add":
            after = delta + value * _unit(edit, vectors, activations)
        elif edit.op == "scale":
            after = (now + delta) * value - now
        elif edit.op == "clamp":
            after = value * _unit(edit, vectors, activations) - now
        else:
            after = -now
        delta = torch.where(mask, after, delta)
    return delta


def _unit(edit: Edit, vectors: _Vectors, activations: Activations | None) -> Tensor:
    """1 of an edit's units, in those of the residual: (N, 1)."""
    if edit.units == "sigma":
        return vectors.spread
    if edit.units == "raw" or activations is None:
        return torch.ones_like(vectors.spread)
    return vectors.sigma * activations.of(edit.latent, edit.units)
