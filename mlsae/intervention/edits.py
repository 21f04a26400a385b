"""What to change: a latent's activation, or the residual itself; at which layers and positions.

Legend: B rows, T positions, M latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from ..errors import InputError
from ..model import MLSAE
from .activations import Activations
from .literals import Op, Units
from .positions import Positions, Where, check_where, select, shown_where


@dataclass(frozen=True)
class Edit:
    """Change one latent's activation h at some layers and positions.

        op        h becomes      value
        add       h + v          in `units`
        scale     value · h      a factor
        clamp     v              in `units`
        ablate    0              none

    h is the activation that the MLSAE finds in the residual as it comes, 0 where the latent is not
    among the active ones. The residual x becomes x + σ · (change of h) · W_dec[latent], with σ the
    vector's own standard deviation as the MLSAE standardizes it (1 if it does not), so that the
    error x − x̂ is kept.

    Raises InputError if `op`, `units`, `value` or `positions` is none of those below.
    """

    latent: int
    """Id of the latent, in [0, M)."""
    layers: tuple[int, ...] | None = None
    """Layers, of those that the MLSAE was trained on. None: all of them."""
    op: Op = "add"
    """add, scale, clamp or ablate."""
    value: float | None = None
    """How much: see above."""
    positions: Where = "all"
    """all; prompt or generated: before generation, or what it adds; last: the prompt's last token;
    or a slice or a tuple of positions. They count from a row's first token that is not padding;
    negative ones from the end of the prompt."""
    units: Units = "sigma"
    """What v is: for "sigma", value times the vector's own standard deviation over its elements;
    for "max" and "mean", value times the latent's largest or mean activation (`Activations`); for
    "raw", value in the units of the residual stream."""

    def __post_init__(self) -> None:
        if self.op not in get_args(Op):
            raise InputError(f"op must be {_or(get_args(Op))}, got {self.op!r}")
        if self.units not in get_args(Units):
            raise InputError(f"units must be {_or(get_args(Units))}, got {self.units!r}")
        if (self.value is None) != (self.op == "ablate"):
            rule = "must be left out" if self.op == "ablate" else "must be given"
            raise InputError(f"value {rule} with the op {self.op!r}, got {self.value}")
        if self.value is not None and not _is_finite(self.value):
            raise InputError(f"value must be a finite number, got {self.value!r}")
        _check_layers(self.layers)
        check_where(self.positions)

    def __str__(self) -> str:
        amount = "" if self.value is None else f" {self.value:g}"
        unit = f" {self.units}" if self.op in ("add", "clamp") else ""
        what = f"latent {self.latent} at layers {_shown(self.layers)}: {self.op}{amount}{unit}"
        return f"{what}, positions {shown_where(self.positions)}"


@dataclass(frozen=True)
class Replace:
    """Put the reconstruction x̂ in the residual's place. With several layers, each one's is of the
    residual that the changed layers below lead to. Edits of the same layer are added to x̂."""

    layers: tuple[int, ...] | None = None
    """Layers, of those that the MLSAE was trained on. None: all of them."""
    positions: Where = "all"
    """As of an `Edit`."""

    def __post_init__(self) -> None:
        _check_layers(self.layers)
        check_where(self.positions)

    def __str__(self) -> str:
        where = shown_where(self.positions)
        return f"reconstruction at layers {_shown(self.layers)}, positions {where}"


Change = Edit | Replace


def at_layers(
    changes: Sequence[Change], mlsae: MLSAE, n_layers: int, activations: Activations | None
) -> dict[int, list[Change]]:
    """The changes at each layer of a transformer of `n_layers`, in their order.

    Raises InputError if a latent or layer is not the MLSAE's, or an edit's units need `activations`
    of a latent that they do not have.
    """
    known = mlsae.config.layers or tuple(range(n_layers))
    by_layer: dict[int, list[Change]] = {}
    for change in changes:
        if not isinstance(change, Edit | Replace):
            raise InputError(f"edits must be a list of Edit and Replace, got {change!r}")
        if isinstance(change, Edit):
            _check_latent(change, mlsae.config.n_latents, activations)
        for layer in known if change.layers is None else change.layers:
            if layer not in known or layer >= n_layers:
                raise InputError(
                    f"layers must be among those that the MLSAE was trained on ({_shown(known)}), "
                    f"got {layer}"
                )
            by_layer.setdefault(layer, []).append(change)
    return by_layer


def chosen(change: Change, positions: Positions) -> Tensor:
    """Where a change applies: (B, T) bool."""
    return select(change.positions, positions)


def _check_latent(edit: Edit, n_latents: int, activations: Activations | None) -> None:
    if isinstance(edit.latent, bool) or not isinstance(edit.latent, int):
        raise InputError(f"latent must be an integer, got {edit.latent!r}")
    if not 0 <= edit.latent < n_latents:
        raise InputError(f"latent must be in [0, {n_latents - 1}], got {edit.latent}")
    if edit.op in ("add", "clamp") and edit.units in ("max", "mean"):
        if activations is None:
            raise InputError(
                f"units {edit.units!r} need the activations of an analysis, got none; run `python "
                "-m mlsae.analyze RUN`, and give activations=read_activations(RUN)"
            )
        activations.of(edit.latent, edit.units)


def _check_layers(layers: Any) -> None:
    if layers is None:
        return
    ok = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) > 0
    if not ok or any(isinstance(n, bool) or not isinstance(n, int) for n in layers):
        raise InputError(f"layers must be a tuple of integers, such as (2, 3), got {layers!r}")
    if len(set(layers)) < len(layers):
        raise InputError(f"layers must not repeat, got {_shown(layers)}")


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _or(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]


def _shown(layers: Sequence[int] | None) -> str:
    return "all" if layers is None else " ".join(map(str, layers))
