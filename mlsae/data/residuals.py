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
    """Raised by the last hook, to end the forward pass above the last block that is read."""


class ResidualReader:
    """The output of the chosen blocks of `model`, as forward hooks see it.

        reader = ResidualReader(model, layers=[0, 2, 5])
        residuals = reader(input_ids)  # (L, B, T, D), in the model's dtype, on input_ids' device

    Layer ℓ is the residual stream after block ℓ, ℓ = 0 … n_layers − 1; the embeddings are not a
    layer. The last layer is read before the final norm, whereas Hugging Face's `hidden_states[-1]`
    comes after it. The forward pass ends after the last block that is read, so neither the blocks
    above it nor the unembedding are computed.

    Raises InputError if the model has no single list of blocks, or a layer is out of range.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        self.model = model
        self.blocks = find_blocks(model)
        self.layers = chosen_layers(layers, len(self.blocks))
        self._block_devices: dict[int, torch.device] = {}  # of each residual, by layer
        self._n_extra_outputs: int | None = None  # in a block's tuple; None: the residual is alone

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) → residuals (L, B, T, D)."""
        residuals: dict[int, Tensor] = {}
        with suppress(_AllReadError):
            self._run(input_ids, residuals, stop=True)
        return torch.stack([residuals[layer] for layer in self.layers])

    @torch.no_grad()
    def with_logits(self, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """input_ids (B, T) → L residuals of (B, T, D), and the model's logits (B, T, V), in one
        whole forward pass."""
        residuals: dict[int, Tensor] = {}
        logits = self._run(input_ids, residuals, stop=False)
        return [residuals[layer] for layer in self.layers], logits

    def logits(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) → the model's logits (B, T, V)."""
        # A model on several devices has hooks that move its inputs, the first part's included; its
        # weights may be on "meta" then. A model on one device needs its inputs on that device.
        weights_device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        on_meta = weights_device.type == "meta"
        moved = input_ids if on_meta else input_ids.to(weights_device)
        return self.model(input_ids=moved, use_cache=False).logits.to(input_ids.device)

    def block_output(self, layer: int, residual: Tensor) -> Any:
        """What block `layer` would return for `residual` (B, T, D): on the block's device, alone or
        first in a tuple of Nones. The reader learns both in a forward pass, so run one before."""
        residual = residual.to(self._block_devices[layer])
        if self._n_extra_outputs is None:
            return residual
        return (residual, *[None] * self._n_extra_outputs)

    def _run(self, input_ids: Tensor, residuals: dict[int, Tensor], stop: bool) -> Tensor:
        """Run the model, fill `residuals` by layer, and return the logits. With `stop`, raise
        _AllReadError after the last block that is read."""

        def hook_for(layer: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                # A block returns its hidden states, alone or first in a tuple.
                alone = isinstance(output, Tensor)
                residual = output if alone else output[0]
                residuals[layer] = residual.to(input_ids.device)
                self._block_devices[layer] = residual.device
                self._n_extra_outputs = None if alone else len(output) - 1
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
    """The layers to read of a model of `n_layers`; None chooses all of them.

    Raises InputError if a layer is out of range, or if they do not ascend.
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
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not inside:
            lists[name] = module
    if len(lists) != 1:
        raise InputError(
            f"MODEL must have one list of {n_layers} transformer blocks, and "
            f"{type(model).__name__} has {len(lists)} ({', '.join(lists) or 'none'}); "
            "only decoder-only language models can be read"
        )
    return next(iter(lists.values()))
