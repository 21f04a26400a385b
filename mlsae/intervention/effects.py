"""What changes do to a model: to its predictions at each position, and to the latents above.

Legend: L layers, T positions, V vocabulary, M latents, K active latents per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.residuals import ResidualReader
from ..model import MLSAE
from .activations import Activations
from .context import intervene
from .edits import Change, Edit


class LatentChange(NamedTuple):
    """A latent that is not edited, at a layer above the first that is."""

    latent: int
    layer: int
    before: float
    """Σ h over the positions."""
    after: float
    change: float
    """Σ |h after − h before| over the positions."""


class Effects(NamedTuple):
    """Two passes over one text, without changes and with them."""

    log_p: Tensor
    """(2, T, V) float64: ln p of the next token."""
    logits: Tensor
    """(2, V) at the last position."""
    latents: list[LatentChange]
    """Those that change most, in order."""

    def kl(self) -> Tensor:
        """KL(without ‖ with changes) of the next token at each position, (T,), in nats."""
        before, after = self.log_p
        return (before.exp() * (before - after)).sum(-1)

    def next_tokens(self, n: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The n next tokens whose probability after the last position rises most, and falls most:
        token ids, p and logits, before and after."""
        p = self.log_p[:, -1].exp()
        moved = p[1] - p[0]
        up, down = (
            [i for i in (sign * moved).topk(min(n, len(moved))).indices if sign * moved[i] > 0]
            for sign in (1, -1)
        )
        return tuple(  # type: ignore[return-value]
            [
                {"id": int(i), "p": p[:, i].tolist(), "logit": self.logits[:, i].tolist()}
                for i in ids
            ]
            for ids in (up, down)
        )


@torch.inference_mode()
def measure_effects(
    mlsae: MLSAE,
    reader: ResidualReader,
    ids: Tensor,
    changes: Sequence[Change],
    activations: Activations | None,
    n_latents: int,
) -> Effects:
    """The effects of `changes` on token ids (T,), and the `n_latents` latents that change most at
    the layers of `reader` above the first that is changed."""
    device = mlsae.sae.W_dec.device
    inputs = ids[None].to(device)
    residuals, logits = reader.with_logits(inputs)
    with intervene(reader.model, mlsae, changes, activations=activations):
        changed, changed_logits = reader.with_logits(inputs)
    both = torch.cat([logits, changed_logits])
    lists = [reader.layers if c.layers is None else c.layers for c in changes]
    first = min(min(layers) for layers in lists)
    edited = {change.latent for change in changes if isinstance(change, Edit)}
    found: list[LatentChange] = []
    for layer, x, y in zip(reader.layers, residuals, changed, strict=True):
        if layer > first:
            found += _latent_changes(mlsae, layer, x[0], y[0], edited, n_latents)
    found.sort(key=lambda entry: -entry.change)
    return Effects(both.double().log_softmax(-1).cpu(), both[:, -1].cpu(), found[:n_latents])


def _latent_changes(
    mlsae: MLSAE, layer: int, x: Tensor, y: Tensor, edited: set[int], n: int
) -> list[LatentChange]:
    """The n latents that differ most between residuals x and y (T, D) of a layer."""
    n_latents = mlsae.config.n_latents
    before, after = (mlsae.encode(part.float(), layer) for part in (x, y))  # (T, K)
    token = torch.arange(len(x), device=x.device)[:, None] * n_latents
    place = torch.cat([(token + codes.indices).flatten() for codes in (before, after)])
    values = torch.cat([-before.values.flatten(), after.values.flatten()]).double()
    pairs, inverse = place.unique(return_inverse=True)  # of a token and a latent
    moved = values.new_zeros(len(pairs)).index_add(0, inverse, values).abs()
    zeros = values.new_zeros(n_latents)
    change = zeros.index_add(0, pairs % n_latents, moved)
    change[list(edited)] = 0
    totals = [zeros.index_add(0, c.indices.flatten(), c.values.flatten().double())
              for c in (before, after)]  # fmt: skip
    top = change.topk(min(n, n_latents)).indices
    return [
        LatentChange(int(j), layer, totals[0][j].item(), totals[1][j].item(), change[j].item())
        for j in top
        if change[j] > 0
    ]
