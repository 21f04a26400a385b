"""Read the residual stream of a Hugging Face transformer after every block.

Legend: L layers read, B rows, T positions, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError


class _AllReadError(Exception):
    """Raised by the last hook to end the forward pass: nothing above it is token_mask."""


class ResidualReader:
    """The output of the chosen blocks of `model`, as forward hooks see it.

        reader = ResidualReader(model, layers=[0, 2, 5])
        residuals = reader(input_ids)  # (L, B, T, D), in the model's dtype, on input_ids' device

    Layer ℓ is the residual stream after block ℓ, ℓ = 0 … n_layers − 1; the embeddings are not a
    layer. The last one is taken before the final norm, unlike `hidden_states[-1]` of Hugging
    Face, which is after it. The forward pass ends behind the last token_mask block, so that neither
    the blocks above nor the unembedding are computed.

    Raises InputError if the model has no single list of blocks, or a layer is out of range.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        self.model = model
        self.blocks = find_blocks(model)
        self.others: tuple[None, ...] | None = None
        """What blocks return beside the residual, as Nones; None where they return it alone.
        Known after the first pass."""
        self.devices: dict[int, torch.device] = {}
        """Where each read block leaves the residual. Known after the first pass."""
        self.layers = chosen_layers(layers, len(self.blocks))

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) → residuals (L, B, T, D)."""
        found: dict[int, Tensor] = {}
        with suppress(_AllReadError):
            self._run(input_ids, found, stop=True)
        return torch.stack([found[layer] for layer in self.layers])

    @torch.no_grad()
    def with_logits(self, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """input_ids (B, T) → residuals, L of (B, T, D), and the model's logits (B, T, V): one
        whole forward pass."""
        found: dict[int, Tensor] = {}
        logits = self._run(input_ids, found, stop=False)
        return [found[layer] for layer in self.layers], logits

    def logits(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) → the model's logits (B, T, V)."""
        # Parts of a model on several devices have hooks that move what they are given, its first
        # part among them; a whole one must be given it there.
        place = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        there = input_ids if place.type == "meta" else input_ids.to(place)
        return self.model(input_ids=there, use_cache=False).logits.to(input_ids.device)

    def _run(self, input_ids: Tensor, found: dict[int, Tensor], stop: bool) -> Tensor:
        """The model's logits, and in `found` the residuals by layer. Raises _AllReadError behind
        the last token_mask block, if it is to `stop` there."""

        def hook_for(layer: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                # A block returns its hidden states, alone or first in a tuple.
                alone = isinstance(output, Tensor)
                residual = output if alone else output[0]
                found[layer] = residual.to(input_ids.device)
                self.devices[layer] = residual.device
                self.others = None if alone else (None,) * (len(output) - 1)
                if stop and layer == self.layers[-1]:
                    raise _AllReadError

            return hook

        handles = [self.blocks[i].register_forward_hook(hook_for(i)) for i in self.layers]
        try:
            return self.logits(input_ids)
        finally:
            for handle in handles:
                handle.remove()


def chosen_layers(layers: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """The layers to read of a model of `n_layers`: all of them for None.

    Raises InputError if one is out of range, or they do not ascend.
    """
    chosen = tuple(range(n_layers)) if layers is None else tuple(layers)
    shown = " ".join(map(str, chosen)) or "none"
    if not chosen or not all(0 <= layer < n_layers for layer in chosen):
        raise InputError(
            f"--layers must be in [0, {n_layers - 1}] (the model has {n_layers} layers), "
            f"got {shown}"
        )
    if list(chosen) != sorted(set(chosen)):
        raise InputError(f"--layers must ascend without repeats, got {shown}")
    return chosen


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of a transformer's blocks: the outermost ModuleList of `num_hidden_layers` modules.

    Raises InputError if there is none, or more than one.
    """
    config: Any = model.config
    n_layers = config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not inside:
            found[name] = module
    if len(found) != 1:
        raise InputError(
            f"MODEL must have one list of {n_layers} transformer blocks, and "
            f"{type(model).__name__} has {len(found)} ({', '.join(found) or 'none'}); "
            "it is not a decoder-only language model that can be read here"
        )
    return next(iter(found.values()))
