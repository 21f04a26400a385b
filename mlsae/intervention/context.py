"""`intervene`: a model that runs with changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..data.blocks import find_blocks, residual_of, with_residual
from ..data.residuals import ResidualReader
from ..errors import InputError
from ..model import MLSAE
from .activations import Activations
from .apply import changed_residual
from .edits import Change, at_layers
from .tracker import PositionTracker


@contextmanager
def intervene(
    model: nn.Module,
    mlsae: MLSAE,
    edits: Sequence[Change],
    *,
    activations: Activations | None = None,
) -> Iterator[None]:
    """Within the context, the transformer `model` runs with `edits`, in forward passes and in
    `generate`:

        with intervene(model, mlsae, [Edit(latent=876, layers=(2, 3), value=4.0)]):
            model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=20)

    The residual of a layer is the output of its block. Where edits apply, it becomes what
    `Edit` and `Replace` say; all other vectors stay the same bits, and without edits so does the
    model. With a KV cache, padding at the left, or in half precision, the result is that of whole
    rows, one at a time. Contexts may be nested: the inner one sees what the outer one has changed.
    At the end, and on any exception, the model is as it was.

    `activations` are those of `read_activations(RUN)`, for edits with units "max" or "mean".

    Raises InputError if an edit does not fit the MLSAE, or the MLSAE does not fit the model; if the
    model's residual stream cannot be read; and, in a pass, if blocks run without the model.
    """
    if not edits:
        yield
        return
    blocks = find_blocks(model)
    by_layer = at_layers(edits, mlsae, len(blocks), activations)
    _check_model(model, mlsae, sorted(by_layer))
    tracker = PositionTracker(model)

    def hook_for(layer: int, changes: Sequence[Change]) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if tracker.positions is None:
                raise InputError(
                    "an intervention must see the whole model run: call `model` itself or "
                    "model.generate, not a part of it"
                )
            x, positions = residual_of(output), tracker.positions
            if x.shape[:2] != positions.at.shape:
                raise InputError(
                    f"blocks must return a vector for each of the {tuple(positions.at.shape)} "
                    f"tokens, and return {tuple(x.shape)}"
                )
            changed = changed_residual(x, changes, positions, mlsae, activations, layer)
            return None if changed is None else with_residual(output, changed)

        return hook

    handles: list[Any] = []
    with tracker.following():
        try:
            for layer, changes in by_layer.items():
                handles.append(blocks[layer].register_forward_hook(hook_for(layer, changes)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_model(model: nn.Module, mlsae: MLSAE, layers: list[int]) -> None:
    """Raise InputError if the residuals of `layers` cannot be read, or are of another width than
    the MLSAE's. Within another intervention, which has checked the model, no pass is run."""
    width = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    if width != mlsae.config.d_in:
        raise InputError(
            f"model must have a residual stream of width {mlsae.config.d_in}, as the MLSAE, and "
            f"has {width}; give the model that the MLSAE was trained on"
        )
    hooks = model._forward_pre_hooks.values()
    if not any(isinstance(getattr(hook, "__self__", None), PositionTracker) for hook in hooks):
        ResidualReader(model, layers)
