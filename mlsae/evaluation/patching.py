"""Run a transformer with the residual stream at one layer replaced.

Legend: B rows, T positions, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.residuals import ResidualReader
from ..errors import InputError, first_line

_TOLERANCE = 1e-3  # of the largest logit: what rounding may change

# How only the blocks above ℓ run: during a call of the model's own forward, blocks 0 … ℓ return the
# substituted residual at once. So embeddings, masks (sliding windows too), rotary angles, final
# norm, projections and soft-capping stay the model's own code, in any architecture and version;
# they cost little compared with the blocks. The alternative, calling the blocks above with the
# arguments they had in the true pass, would have to copy by hand what follows the last block.


def substituted_logits(
    reader: ResidualReader, input_ids: Tensor, layer: int, residual: Tensor
) -> Tensor:
    """The logits (B, T, V) of input_ids (B, T) if `residual` (B, T, D), in the model's dtype, is
    the output of block `layer`.

    Only the blocks above it run, and the logits are differentiable in `residual`. `reader` must
    have read the model before: it then knows in which form the blocks return their residual.
    """
    with _blocks_return(reader.blocks, layer, reader.block_output(layer, residual)):
        return reader.logits(input_ids)


@contextmanager
def _blocks_return(blocks: nn.ModuleList, layer: int, output: Any) -> Iterator[None]:
    """Within the context, blocks 0 … `layer` compute nothing and return `output`."""
    lower = [blocks[i] for i in range(layer + 1)]
    # An instance may have a forward of its own that wraps its class's: put it back afterwards.
    wrappers = [vars(block).get("forward") for block in lower]
    for block in lower:
        block.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        for block, wrapper in zip(lower, wrappers, strict=True):
            del block.forward
            if wrapper is not None:
                block.forward = wrapper


@torch.no_grad()
def check_substitution(reader: ResidualReader, input_ids: Tensor) -> None:
    """Raise InputError if substituting the true residual of input_ids (B, T) changes the logits.

    The blocks of such a model pass on more than the residual stream, such as keys and values for
    the blocks above.
    """
    residuals, true_logits = reader.with_logits(input_ids)
    for layer, residual in zip(reader.layers, residuals, strict=True):
        try:
            logits = substituted_logits(reader, input_ids, layer, residual)
            change = (logits - true_logits).abs().max().item()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any code of any architecture
            raise InputError(_refusal(reader, layer, f"it fails: {first_line(error)}")) from error
        if not change <= _TOLERANCE * true_logits.abs().max().item():
            raise InputError(_refusal(reader, layer, f"its logits change by {change:.2g}"))


def _refusal(reader: ResidualReader, layer: int, symptom: str) -> str:
    return (
        "MODEL must pass only the residual stream from block to block, and "
        f"{type(reader.model).__name__} does not: continued from its own residual at layer "
        f"{layer}, {symptom}; ΔCE cannot be measured on it"
    )
