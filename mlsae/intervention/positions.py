"""Which positions a change applies to, and at which positions a forward pass is.

Legend: B rows, T positions of a pass, W positions in all, those before the pass included.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError

Named = Literal["all", "prompt", "last", "generated"]
Where = Named | slice | tuple[int, ...]

_MOST = 2**31  # positions: more than any context
_NAMED = ("all", "prompt", "last", "generated")


class Positions(NamedTuple):
    """The positions of a forward pass."""

    at: Tensor
    """(B, T) int64: how many tokens that are not padding precede each one in its row; −1 at
    padding."""
    prompt: Tensor
    """(B, 1) int64: tokens of the row's prompt that are not padding."""


def locate(mask: Tensor, n_new: int, prompt_width: int) -> Positions:
    """The positions of the last `n_new` of the columns of mask (B, W), True where a token is not
    padding; the first `prompt_width` columns are the prompt."""
    at = (mask.long().cumsum(1) - 1).masked_fill(~mask, -1)
    return Positions(at[:, -n_new:], mask[:, :prompt_width].sum(1, keepdim=True))


def select(where: Where, positions: Positions) -> Tensor:
    """The positions that `where` names: (B, T) bool, False at padding."""
    at, prompt = positions
    if where == "all":
        return at >= 0
    if where == "prompt":
        return (at >= 0) & (at < prompt)
    if where == "last":
        return (at >= 0) & (at == prompt - 1)
    if where == "generated":
        return at >= prompt
    if isinstance(where, slice):
        start, step = where.start or 0, where.step or 1
        first = (prompt + start).clamp_min(0) if start < 0 else torch.full_like(prompt, start)
        chosen = (at >= first) & ((at - first) % step == 0)
        if where.stop is not None:
            chosen &= at < (prompt + where.stop if where.stop < 0 else where.stop)
        return chosen
    wanted = torch.tensor(where, device=at.device)  # (n,)
    absolute = torch.where(wanted < 0, prompt + wanted, wanted)  # (B, n)
    return ((at[..., None] == absolute[:, None]) & (absolute[:, None] >= 0)).any(-1)


def check_where(where: Any) -> None:
    """Raise InputError if `where` names no positions."""
    rule = (
        "positions must be all, prompt, last, generated, a slice with a step above 0, or a tuple "
        f"of integers, got {where!r}"
    )
    if isinstance(where, slice):
        parts = (where.start, where.stop, where.step)
        integers = all(part is None or _is_integer(part) for part in parts)
        if not integers or (where.step is not None and where.step < 1):
            raise InputError(rule)
    elif isinstance(where, str):
        if where not in _NAMED:
            raise InputError(rule)
    elif not isinstance(where, tuple | list) or not where or not all(map(_is_integer, where)):
        raise InputError(rule)


def parse_where(text: str) -> Where:
    """Positions as a command line gives them: a name, "3", "-1", "1,4,9", "2:7" or "1:".

    Raises InputError if the text names none.
    """
    if text in _NAMED:
        named: Named = text  # type: ignore[assignment]
        return named
    try:
        if ":" in text:
            where: Where = slice(*(int(part) if part else None for part in text.split(":")))
        else:
            where = tuple(int(part) for part in text.split(","))
    except (ValueError, TypeError) as error:
        raise InputError(
            "positions must be all, prompt, last, generated, numbers such as 1,4,-1, or a slice "
            f"such as 2:7, got {text!r}"
        ) from error
    check_where(where)
    return where


def shown_where(where: Where) -> str:
    """Positions in the form that `parse_where` reads."""
    if isinstance(where, slice):
        parts = (where.start, where.stop, where.step)
        text = ":".join("" if part is None else str(part) for part in parts)
        return text if where.step is not None else text.removesuffix(":")
    return where if isinstance(where, str) else ",".join(map(str, where))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST
