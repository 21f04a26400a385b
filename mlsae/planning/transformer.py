"""How large a transformer is, and what its forward pass does, as its configuration tells.

Legend: L blocks, T positions, D width of the residual stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..data.blocks import find_blocks
from ..data.config import DataConfig
from ..data.dtypes import dtype_of
from ..data.transformer import empty_transformer, load_config

_QUANTIZED = {"8bit": 1.0, "4bit": 0.5}  # bytes of a weight in a block


class Transformer(NamedTuple):
    """The blocks that are loaded, which end with the last layer to read."""

    parameters: int
    """Of all that is loaded, embeddings included."""
    in_blocks: int
    """Of the blocks."""
    blocks: int
    whole: int
    """Blocks of the whole model."""
    d_in: int
    dtype: torch.dtype
    """What it computes in."""
    bytes: int
    """Of its weights."""

    def flop(self, seq_len: int) -> float:
        """FLOPs of the forward pass per token: 2 of each weight in a block, and in each block the
        2 T D of causal attention."""
        return 2.0 * self.in_blocks + 2.0 * self.blocks * seq_len * self.d_in


def size_of(config: DataConfig, last_layer: int, device_type: str) -> Transformer:
    """The transformer that `config` names, up to its block `last_layer`, as training has it on a
    device of this type. Raises InputError if it cannot be built."""
    text_config = load_config(config)
    model = empty_transformer(config, last_layer + 1)
    blocks = find_blocks(model)
    in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    dtype = dtype_of(config, text_config, device_type, whole=False)
    quantized = _QUANTIZED.get(config.model_quantize or "", dtype.itemsize)
    n_bytes = round(quantized * in_blocks) + dtype.itemsize * (parameters - in_blocks)
    return Transformer(
        parameters, in_blocks, len(blocks), text_config.num_hidden_layers,
        text_config.hidden_size, dtype, n_bytes,
    )  # fmt: skip
