"""Reconstructions at several layers at once.

Legend: L layers, B rows, T positions, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.blocks import residual_of, with_residual
from ..data.residuals import ResidualReader
from ..model import MLSAE
from .patching import substituted_logits

Joint = Literal["from", "all", "off"]
"""Which sets of layers are replaced at once: each layer with all above it, all layers, or none."""

# Replaced by their means, the layers from ℓ on give what the topmost of them gives alone, which
# hides all below it. So the ablation that these figures are compared with is measured already.


@torch.no_grad()
def replaced_from(
    mlsae: MLSAE,
    reader: ResidualReader,
    input_ids: Tensor,
    first: int,
    substituted: Tensor,
    residuals: Sequence[Tensor],
    token_mask: Tensor,
) -> Tensor:
    """The logits (B, T, V) of input_ids (B, T) with reconstructions at the `first`-th of the
    reader's layers, where the residual is `substituted` (B, T, D), and at all of them above it.

    Above, the residual x' is what the changed layers below lead to, and becomes x̂(x') where
    token_mask (B, T) is True, and the true residual elsewhere, of `residuals`, L of (B, T, D).
    Costs the blocks above the first layer, and a reconstruction for each layer above it.
    """

    def hook_for(i: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            x = residual_of(output)
            x_hat = mlsae(x.to(residuals[i].device).float(), reader.layers[i])
            keep = token_mask[..., None]
            return with_residual(output, torch.where(keep, x_hat.to(x.dtype), residuals[i]).to(x))

        return hook

    handles = [
        reader.blocks[reader.layers[i]].register_forward_hook(hook_for(i))
        for i in range(first + 1, len(reader.layers))
    ]
    try:
        return substituted_logits(reader, input_ids, reader.layers[first], substituted)
    finally:
        for handle in handles:
            handle.remove()
