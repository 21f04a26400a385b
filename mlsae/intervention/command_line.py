"""The settings of `python -m mlsae.steer`, and the edits that they name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ..data.config import check_seed
from ..errors import InputError
from .edits import Change, Edit, Replace
from .literals import Units
from .opening import OpenConfig
from .positions import parse_where

_EDIT = re.compile(
    r"(?P<latent>\d+)@(?P<layers>all|\d+(?:,\d+)*):(?P<op>\w+)(?:=(?P<value>[^:]+))?"
    r"(?::units=(?P<units>\w+))?(?::positions=(?P<positions>.+))?"
)
_FORM = "LATENT@LAYERS:OP=VALUE, such as 876@2,3:add=4 or 12@all:ablate"


@dataclass(frozen=True, kw_only=True)
class SteerConfig(OpenConfig):
    """What to change, and on which text."""

    prompt: str
    """The text to go on from, with the special tokens that the tokenizer adds at its start."""
    latent: int | None = None
    """The latent to change, by --add, --scale, --clamp or --ablate."""
    layers: tuple[int, ...] | None = None
    """Layers to change it at, of those that the MLSAE was trained on. None: all of them."""
    add: float | None = None
    """Add so much to its activation, in --units."""
    scale: float | None = None
    """Multiply its activation."""
    clamp: float | None = None
    """Set its activation, in --units."""
    ablate: bool = False
    """Set its activation to 0."""
    positions: str = "all"
    """Where: all; prompt or generated; last, the prompt's last token; numbers such as 0,3,-1, which
    count from the first token, negative ones from the prompt's end; or a slice such as 1: or
    2:7."""
    units: Units = "sigma"
    """What --add and --clamp count in. sigma: the standard deviation of the residual vector's
    elements; max, mean: the latent's largest or mean activation, as mlsae.analyze has found in RUN;
    raw: the units of the residual stream."""
    edit: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """LATENT@LAYERS:OP=VALUE, such as "876@2,3:add=4", "12@all:ablate" or
    "876@2:clamp=1:units=max:positions=last"; give it again for each edit. They come after the one
    of --latent, in their order, with --units and --positions where they name none."""
    replace: tuple[int, ...] | None = None
    """Put the reconstruction in the residual's place at these layers. (Without values: at all.)"""
    max_new_tokens: int = 40
    """Tokens to generate; 0: none."""
    temperature: float = 0.0
    """Of sampling; 0: the likeliest token each time."""
    seed: int = 0
    """Seed of sampling: the same draws with and without the changes."""
    show: int = 5
    """Rows of the tables: tokens that gain and that lose most, latents that change most."""
    save: Path | None = None
    """Write everything, at every position, to this JSON file."""


def changes_of(config: SteerConfig) -> list[Change]:
    """The changes that a command line names, in their order. Raises InputError if they are none, or
    do not say what to do; or if a setting of the generation is out of range."""
    for name, least in (("max_new_tokens", 0), ("temperature", 0), ("show", 0)):
        if not getattr(config, name) >= least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(config, name)}")
    check_seed(config.seed)
    where = parse_where(config.positions)
    changes: list[Change] = []
    if config.replace is not None:
        changes.append(Replace(config.replace or None, where))
    given = {name: getattr(config, name) for name in ("add", "scale", "clamp")}
    ops = {name: value for name, value in given.items() if value is not None}
    ops |= {"ablate": None} if config.ablate else {}
    if (config.latent is None) != (not ops) or len(ops) > 1:
        raise InputError(
            "--latent must come with one of --add, --scale, --clamp and --ablate, got "
            f"{'no latent' if config.latent is None else f'latent {config.latent}'} and "
            f"{', '.join(ops) or 'none of them'}; name several edits with --edit"
        )
    if config.latent is not None:
        op: Any
        ((op, value),) = ops.items()
        changes.append(Edit(config.latent, config.layers, op, value, where, config.units))
    changes += [parse_edit(text, config) for text in config.edit]
    if not changes:
        raise InputError(f"something must be changed: give --latent, --edit {_FORM}, or --replace")
    return changes


def parse_edit(text: str, config: SteerConfig) -> Edit:
    """The edit that a text in the form of --edit names; its units and positions are those of
    `config` unless it names some. Raises InputError if it is of another form."""
    found = _EDIT.fullmatch(text.strip())
    if found is None:
        raise InputError(f"--edit must be {_FORM}, got {text!r}")
    layers, value = found["layers"], found["value"]
    op: Any = found["op"]
    units: Any = found["units"] or config.units
    try:
        amount = None if value is None else float(value)
    except ValueError as error:
        raise InputError(f"the value of --edit must be a number, got {value!r}") from error
    return Edit(
        int(found["latent"]),
        None if layers == "all" else tuple(int(layer) for layer in layers.split(",")),
        op,
        amount,
        parse_where(found["positions"] or config.positions),
        units,
    )
