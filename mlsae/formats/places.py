"""Where in a transformer an SAE of another library was trained, by that library's name for it."""

from __future__ import annotations

import re

from ..errors import InputError

# Names of the residual stream after block N: the block itself, or its output.
_AFTER = re.compile(
    r"(?:(?:model|transformer|gpt_neox|language_model|decoder|encoder)\.)*"
    r"(?:layers|layer|h|blocks)[._](\d+)(?:\.hook_resid_post)?"
    r"|resid_post_layer_(\d+)"
)
_BEFORE = re.compile(r"blocks\.(\d+)\.hook_resid_pre|resid_pre_layer_(\d+)")


def layer_of(name: object) -> int | None:
    """The layer N whose residual stream, after block N, is called `name`; None if it is another
    place, or none is named: what a damaged file holds instead of a name is no name.

        blocks.5.hook_resid_post, layers.5, h.5, transformer.h.5, gpt_neox.layers.5      5
        blocks.5.hook_resid_pre: before block 5                                          4
        blocks.0.hook_resid_pre (the embeddings), blocks.5.hook_mlp_out, layers.5.mlp    None
    """
    name = name if isinstance(name, str) else ""
    if match := _AFTER.fullmatch(name):
        return int(match[1] or match[2])
    if match := _BEFORE.fullmatch(name):
        before = int(match[1] or match[2])
        return before - 1 if before else None
    return None


def place(name: object) -> dict[str, str]:
    """What `SavedSAE.about` says of an SAE whose place, `name`, is not the residual stream after a
    block: {"place": name}; nothing otherwise."""
    named = isinstance(name, str) and name
    return {"place": str(name)} if named and layer_of(name) is None else {}


def check_residual(about: dict[str, object], argument: str) -> None:
    """Raise InputError if the SAE that `argument` names was trained at another place than the
    residual stream after a block."""
    if "place" in about:
        raise InputError(
            f"{argument} must be an SAE of the residual stream after a block, and it was trained "
            f"at {about['place']}; use it there, by load_sae"
        )
