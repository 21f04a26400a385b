"""Read the residual stream of a Hugging Face transformer after every block.

Legend: L layers read, B rows, T positions, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, first_line
from .blocks import find_blocks, residual_of, with_residual


class _AllReadError(Exception):
    """Raised by the last hook, to end the forward pass above the last block that is read."""


_TOKENS_AT_ONCE = 16_384  # enough for a GPU; more only take memory
_PROBE_IDS = [[0, 1, 2, 3]]  # of the pass that shows what blocks return


class ResidualReader:
    """The output of the chosen blocks of `model`, as forward hooks see it.

        reader = ResidualReader(model, layers=[0, 2, 5])
        residuals = reader(input_ids)  # (L, B, T, D), in the model's dtype, on input_ids' device

    Layer ℓ is the residual stream after block ℓ, ℓ = 0 … n_layers − 1; the embeddings are not a
    layer. The last layer is read before the final norm, whereas Hugging Face's `hidden_states[-1]`
    comes after it. The forward pass ends after the last block that is read, so neither the blocks
    above it nor the unembedding are computed.

    A short first pass shows whether that is so. Raises InputError if the model has no single list
    of blocks, if a layer is out of range, if blocks do not run once each and in their order, or if
    they return something other than one residual stream.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        self.model = model
        self.blocks = find_blocks(model)
        self.layers = chosen_layers(layers, len(self.blocks))
        self._block_devices: dict[int, torch.device] = {}  # of each residual, by layer
        self._n_extra_outputs: int | None = None  # in a block's tuple; None: the residual is alone
        self._check()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) → residuals (L, B, T, D). The model has at most 16,384 tokens at a time,
        whose residuals are copied as soon as their block has run, so that it frees its own."""
        buffer: Tensor | None = None
        at_once = max(1, _TOKENS_AT_ONCE // input_ids.shape[1])
        for start in range(0, len(input_ids), at_once):
            rows = slice(start, start + at_once)

            def keep(layer: int, residual: Tensor, rows: slice = rows) -> None:
                nonlocal buffer
                if buffer is None:
                    shape = len(self.layers), len(input_ids), *residual.shape[1:]
                    buffer = residual.new_empty(shape)
                buffer[self.layers.index(layer), rows] = residual

            with suppress(_AllReadError):
                self._run(input_ids[rows], keep, stop=True)
        assert buffer is not None, "there are rows, and the hooks have run"
        return buffer

    @torch.no_grad()
    def with_logits(self, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """input_ids (B, T) → L residuals of (B, T, D), and the model's logits (B, T, V), in one
        whole forward pass."""
        residuals: dict[int, Tensor] = {}
        logits = self._run(input_ids, residuals.__setitem__, stop=False)
        return [residuals[layer] for layer in self.layers], logits

    @torch.enable_grad()
    def with_graph(self, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """As `with_logits`, but later residuals and the logits can be differentiated with respect
        to each residual, through all that the model computes from it:

            torch.autograd.grad(logits[0, -1, token], residuals)

        The graph begins at the first layer that is read: what comes before it stores nothing.
        """
        residuals: dict[int, Tensor] = {}

        def keep(layer: int, residual: Tensor) -> Tensor:
            residuals[layer] = residual if residuals else residual.detach().requires_grad_()
            return residuals[layer].clone()  # a block may change in place what it is given

        logits = self._run(input_ids, keep, stop=False)
        return [residuals[layer] for layer in self.layers], logits

    def logits(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) → the model's logits (B, T, V)."""
        # A model on several devices has hooks that move its inputs, the first part's included. A
        # model on one device needs its inputs on that device.
        device = _weights_device(self.model)
        moved = input_ids if device.type == "meta" else input_ids.to(device)
        return self.model(input_ids=moved, use_cache=False).logits.to(input_ids.device)

    def block_output(self, layer: int, residual: Tensor) -> Any:
        """What block `layer` would return for `residual` (B, T, D): on the block's device, alone or
        first in a tuple of Nones, as the reader has seen in its last pass."""
        residual = residual.to(self._block_devices[layer])
        if self._n_extra_outputs is None:
            return residual
        return (residual, *[None] * self._n_extra_outputs)

    @torch.no_grad()
    def _check(self) -> None:
        """Run the whole model on a few tokens. Raises InputError if its blocks do not run once each
        and in their order, or return anything but a residual stream (B, T, D)."""
        ran: list[int] = []
        outputs: dict[int, Any] = {}

        def hook_for(layer: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                ran.append(layer)
                outputs[layer] = output

            return hook

        handles = [block.register_forward_hook(hook_for(i)) for i, block in enumerate(self.blocks)]
        input_ids = torch.tensor(_PROBE_IDS)
        try:
            self.logits(input_ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any code of any architecture
            raise InputError(
                f"MODEL must run on text alone, and {type(self.model).__name__} fails: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if ran != sorted(set(ran)):
            raise InputError(self._refusal(f"its blocks run in the order {_shown(ran)}"))
        idle = [layer for layer in self.layers if layer not in ran]
        if idle:
            raise InputError(
                "--layers must be blocks that run on text alone, and in "
                f"{type(self.model).__name__} {_shown(idle)} do not; those that do are "
                f"{_shown(ran)}"
            )
        width = self.model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        for layer in self.layers:
            self._check_output(layer, outputs[layer], (*input_ids.shape, width))

    def _check_output(self, layer: int, output: Any, wanted: tuple[int, ...]) -> None:
        """Raise InputError if the output of block `layer` is not, and does not begin with, a tensor
        of the shape `wanted`."""
        # Not a named tuple: that of a reversible block holds two streams.
        first = output[0] if type(output) in (tuple, list) and output else output
        if not isinstance(first, Tensor):
            found = f"a {type(first).__name__}"
        elif tuple(first.shape) != wanted:
            found = f"a tensor {tuple(first.shape)}"
        else:
            return
        raise InputError(
            self._refusal(f"block {layer} returns {found} where a residual stream is {wanted}")
        )

    def _refusal(self, symptom: str) -> str:
        return (
            "MODEL must have one residual stream, to which its blocks add one after another; "
            f"{type(self.model).__name__} cannot be read: {symptom}"
        )

    def _run(
        self, input_ids: Tensor, keep: Callable[[int, Tensor], Tensor | None], stop: bool
    ) -> Tensor:
        """Run the model, give each layer and its residual (B, T, D) to `keep`, and return the
        logits. What `keep` returns goes on in the residual's place. With `stop`, raise
        _AllReadError after the last block that is read."""

        def hook_for(layer: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                residual = residual_of(output)
                other = keep(layer, residual.to(input_ids.device))
                self._block_devices[layer] = residual.device
                self._n_extra_outputs = None if output is residual else len(output) - 1
                if stop and layer == self.layers[-1]:
                    raise _AllReadError
                return None if other is None else with_residual(output, other.to(residual.device))

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
    shown = _shown(chosen)
    if not chosen or not all(0 <= layer < n_layers for layer in chosen):
        raise InputError(
            f"--layers must be in [0, {n_layers - 1}] (the model has {n_layers} layers), "
            f"got {shown}"
        )
    if list(chosen) != sorted(set(chosen)):
        raise InputError(f"--layers must ascend without repeats, got {shown}")
    return chosen


def _weights_device(model: Any) -> torch.device:
    """The device of the embedding's weights. "meta" for a model on several devices: it has hooks
    that move its inputs."""
    return model.get_input_embeddings().weight.device


def _shown(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers)) or "none"
