"""Run a transformer on from a residual stream that is not its own.

Legend: B rows, T positions, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.residuals import ResidualReader
from ..errors import InputError

_TOLERANCE = 1e-3  # of the largest logit: what the rounding of one pass may move

# How only the blocks above ℓ run: the model's own forward is called, and for its time blocks 0 … ℓ
# return the substituted residual at once. Embeddings, masks (sliding windows too), rotary angles,
# final norm, projections and soft-capping are then the model's own code, in any architecture and
# version; they cost little beside the blocks. The other way, to call the blocks above with the
# arguments that each had in the true pass, must copy what comes after the last block by hand.


@torch.no_grad()
def substituted_logits(
    reader: ResidualReader, input_ids: Tensor, layer: int, residual: Tensor
) -> Tensor:
    """The logits (B, T, V) of input_ids (B, T) when `residual` (B, T, D), in the model's dtype, is
    the output of block `layer`. Only the blocks above it run. `reader` has read the model before,
    so that it knows how the blocks return it."""
    with _blocks_return(reader.blocks, layer, reader.block_output(layer, residual)):
        return reader.logits(input_ids)


@contextmanager
def _blocks_return(blocks: nn.ModuleList, layer: int, output: Any) -> Iterator[None]:
    """For its time, blocks 0 … `layer` compute nothing and return `output`."""
    lower = [blocks[i] for i in range(layer + 1)]
    before = [vars(block).get("forward") for block in lower]  # one that wraps the class's own
    for block in lower:
        block.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(lower, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def check_substitution(reader: ResidualReader, input_ids: Tensor) -> None:
    """Raise InputError if substituting the true residual of input_ids (B, T) changes the
    logits: the blocks of such a model hand on more than the residual stream (keys and values for
    the blocks above, say), or do not return it alone."""
    residuals, true_logits = reader.with_logits(input_ids)
    for layer, residual in zip(reader.layers, residuals, strict=True):
        try:
            logits = substituted_logits(reader, input_ids, layer, residual)
            moved = (logits - true_logits).abs().max().item()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise InputError(_refusal(reader, layer, f"it fails: {error}")) from error
        if not moved <= _TOLERANCE * true_logits.abs().max().item():
            raise InputError(_refusal(reader, layer, f"its logits move by {moved:.2g}"))


def _refusal(reader: ResidualReader, layer: int, what: str) -> str:
    return (
        "MODEL must hand nothing but the residual stream from block to block, and "
        f"{type(reader.model).__name__} does not: run on from its own residual at layer {layer}, "
        f"{what}; ΔCE cannot be measured on it"
    )
