"""Cut a transformer to its first blocks, so that the blocks above the last one that is read are not
loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..distributed import log_rank0
from ..errors import first_line
from .blocks import find_blocks

_PLAIN = (bool, int, float, str, list, tuple, type(None))


def shortened_config(whole_config: Any, n_layers: int, build: Callable[[Any], nn.Module]) -> Any:
    """The configuration `whole_config`, cut to its first `n_layers` blocks, or itself if the cut
    fails or would change those blocks; rank 0 then says why.

    In some architectures a block depends on how many there are: the last blocks of Gemma 3n share
    the keys of earlier ones, counted from the end. In others the configuration allows certain
    numbers of blocks only. So both models are built without weights, by `build`, and their blocks
    compared.
    """
    if whole_config.get_text_config().num_hidden_layers == n_layers:
        return whole_config
    try:
        short_config = _cut(whole_config, n_layers)
        with torch.device("meta"):
            whole, short = build(whole_config), build(short_config)
        reason = _difference(whole, short, n_layers)
    except Exception as error:  # any code of any architecture, or of the model's own repository
        reason = f"a shorter one cannot be built: {first_line(error)}"
    if reason is None:
        return short_config
    log_rank0(f"loading all blocks of the model, not only the {n_layers} to read: {reason}")
    return whole_config


def _cut(whole_config: Any, n_layers: int) -> Any:
    """A copy of a configuration with `n_layers` blocks, and shorter lists of their types."""
    config = copy.deepcopy(whole_config)
    text_config = config.get_text_config()
    n_whole = text_config.num_hidden_layers
    text_config.num_hidden_layers = n_layers
    for name, value in list(vars(text_config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == n_whole:
            setattr(text_config, name, value[:n_layers])
    return config


def _difference(whole: nn.Module, short: nn.Module, n_layers: int) -> str | None:
    """How the first `n_layers` blocks of `whole` differ from those of `short`, or what else does;
    None if nothing does."""
    short_blocks = find_blocks(short)
    if len(short_blocks) != n_layers:
        return f"a shorter one has {len(short_blocks)} blocks"
    pairs = zip(find_blocks(whole), short_blocks, strict=False)
    for i, pair in enumerate(pairs):
        if not _same_structure(*pair):
            return f"block {i} depends on how many there are"
    whole_shapes = _parameter_shapes(whole)
    for name, shape in _parameter_shapes(short).items():
        if whole_shapes.get(name) != shape:
            return f"the shape of {name} depends on how many there are"
    return None


def _same_structure(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules consist of modules of the same types with the same settings."""
    a_parts, b_parts = list(a.modules()), list(b.modules())
    return len(a_parts) == len(b_parts) and all(
        type(a_part) is type(b_part) and _settings(a_part) == _settings(b_part)
        for a_part, b_part in zip(a_parts, b_parts, strict=True)
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain values, not tensors or modules."""
    attributes = vars(module).items()
    return {name: value for name, value in attributes if isinstance(value, _PLAIN)}


def _parameter_shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}
