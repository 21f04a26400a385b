"""Find the list of a transformer's blocks, and the residual stream in what one returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InputError


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of a transformer's blocks: in the decoder of its text, the outermost ModuleList of
    `num_hidden_layers` modules. Of several, the one of the blocks whose outputs transformers
    records as hidden states.

    Raises InputError if there is none, or more than one.
    """
    config: Any = model.config
    decoder, n_layers = _decoder(model), config.get_text_config().num_hidden_layers
    # In a few models, the part that is named the decoder is what follows the blocks.
    lists = _lists_of(decoder, n_layers) or _lists_of(model, n_layers)
    if len(lists) > 1:
        recorded = _recorded_types(decoder)
        blocks = {
            name: module
            for name, module in lists.items()
            if all(isinstance(block, recorded) for block in module)
        }
        lists = blocks or lists
    if len(lists) != 1:
        raise InputError(
            f"MODEL must have one list of {n_layers} transformer blocks, and "
            f"{type(model).__name__} has {len(lists)} ({', '.join(lists) or 'none'}); "
            "only decoder-only language models can be read"
        )
    return next(iter(lists.values()))


def residual_of(output: Any) -> Tensor:
    """The residual stream in a block's output: a block returns it alone, or first in a tuple."""
    residual: Tensor = output if isinstance(output, Tensor) else output[0]
    return residual


def with_residual(output: Any, residual: Tensor) -> Any:
    """A block's output with another residual stream in it."""
    return residual if isinstance(output, Tensor) else type(output)([residual, *output[1:]])


def _lists_of(module: nn.Module, length: int) -> dict[str, nn.ModuleList]:
    """The outermost ModuleLists of that length, by name."""
    lists: dict[str, nn.ModuleList] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(outer + ".") for outer in lists)
        if isinstance(part, nn.ModuleList) and len(part) == length and not inside:
            lists[name] = part
    return lists


def _decoder(model: Any) -> nn.Module:
    """The part of a model that reads text: all of it, but for towers that see or hear."""
    if model.config.is_encoder_decoder:
        raise InputError(
            f"MODEL must be a decoder-only language model, and {type(model).__name__} is an "
            "encoder-decoder"
        )
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _recorded_types(decoder: nn.Module) -> tuple[type, ...]:
    """The types of modules whose outputs are a decoder's hidden states, as transformers names them;
    its models that name none have blocks of a type that tells."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes seconds to import

    named = (getattr(decoder, "_can_record_outputs", None) or {}).get("hidden_states", ())
    types = named if isinstance(named, list | tuple) else [named]
    return tuple(t for t in types if isinstance(t, type)) or (GradientCheckpointingLayer,)
