"""What the page asks for: JSON, checked, with bounded sizes.

    prompt    {"text"}
    next      {"text", "position", "edits"}
    generate  {"text", "edits", "sides", "max_new_tokens", "temperature", "seed"}
    trace     {"text", "target", "against", "latent", "at_layer", "at_token", "check"}
    labels    {"label", "notes"}

An edit is {"latent", "layers" (null: all), "op", "value", "units", "positions"}, as an
`intervention.Edit`, with positions in words as on the command line.
"""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.requests import Request

from ..errors import InputError

MOST_BYTES = 64_000
"""Of a request."""
MOST_EDITS = 32
MOST_NEW_TOKENS = 256
MOST_CHECKS = 20
SIDES = ("baseline", "steered")
_LARGEST = 2**53  # integers that JavaScript counts to
_WORDS = {str: "text", int: "an integer", float: "a number", list: "a list", dict: "an object"}


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request. Raises InputError if it is something else."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise InputError("a request must have the content type application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise InputError(f"a request must have at most {MOST_BYTES:,} bytes; shorten the text")
    try:
        content = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError("a request must be JSON, without NaN and Infinity") from error
    return dict(_checked(content, dict, "a request"))


def get(body: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """The value of `name`, of type `kind`. Raises InputError if it is of another, or missing
    without a default."""
    value = body.get(name, default)
    if value is None:
        raise InputError(f"{name} must be given")
    value = _checked(value, kind, name)
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name} must be text, and holds half a character") from error
    return value


def read_edits(body: dict[str, Any]) -> list[Any]:
    """The `Edit`s that a request asks for. Raises InputError if one is malformed."""
    from ..intervention import Edit  # with torch
    from ..intervention.positions import parse_where

    edits = get(body, "edits", list, [])
    if len(edits) > MOST_EDITS:
        raise InputError(f"there may be at most {MOST_EDITS} edits, got {len(edits)}")
    result = []
    for entry in edits:
        edit = _checked(entry, dict, "an edit")
        layers, value = edit.get("layers"), edit.get("value")
        result.append(
            Edit(
                get(edit, "latent", int),
                None if layers is None else tuple(_checked(layers, list, "layers")),
                get(edit, "op", str),
                None if value is None else _checked(value, float, "value"),
                parse_where(get(edit, "positions", str, "all").replace(" ", "")),
                get(edit, "units", str, "sigma"),
            )
        )
    return result


def read_sampling(body: dict[str, Any]) -> dict[str, Any]:
    """How to generate: max_new_tokens, temperature and seed. Raises InputError if one is out of
    range."""
    new = get(body, "max_new_tokens", int, 40)
    if not 1 <= new <= MOST_NEW_TOKENS:
        raise InputError(f"max_new_tokens must be in [1, {MOST_NEW_TOKENS}], got {new}")
    temperature = get(body, "temperature", float, 0.0)
    if not 0 <= temperature <= 100:
        raise InputError(f"temperature must be in [0, 100], got {temperature:g}")
    seed = get(body, "seed", int, 0)
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    return {"max_new_tokens": new, "temperature": temperature, "seed": seed}


def read_target(body: dict[str, Any]) -> dict[str, Any]:
    """What to trace, as the arguments of `attribution.trace`; what is null is left out. Raises
    InputError if it is malformed."""
    kinds = {"target": str, "against": str, "latent": int, "at_layer": int, "at_token": int}
    given = {name: get(body, name, kind) for name, kind in kinds.items()
             if body.get(name) is not None}  # fmt: skip
    check = get(body, "check", int, 0)
    if not 0 <= check <= MOST_CHECKS:
        raise InputError(f"check must be in [0, {MOST_CHECKS}], got {check}")
    return given | {"check": check}


def read_sides(body: dict[str, Any]) -> list[str]:
    """What to generate, of `SIDES`. Raises InputError if it is something else."""
    sides = get(body, "sides", list, list(SIDES))
    if not sides or any(side not in SIDES for side in sides) or len(set(sides)) < len(sides):
        raise InputError(f"sides must be {' and '.join(SIDES)}, or one of them, got {sides!r:.80}")
    return list(sides)


def _checked(value: Any, kind: type, name: str) -> Any:
    """`value`, if it is of type `kind`; an integer is a number, too."""
    ok = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if ok and isinstance(value, int | float):
        ok = math.isfinite(value) if isinstance(value, float) else abs(value) < _LARGEST
    if not ok:
        raise InputError(f"{name} must be {_WORDS[kind]}, got {value!r:.80}")
    return float(value) if kind is float else value


def _refuse(constant: str) -> Any:
    raise ValueError(constant)
