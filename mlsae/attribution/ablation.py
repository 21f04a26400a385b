"""Attributions checked: nodes are ablated, one at a time, in passes of the model.

Legend: T tokens, n checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.residuals import ResidualReader
from ..intervention import Edit, Replace, intervene
from ..model import MLSAE
from .targets import Target


class Check(NamedTuple):
    """A node, and what its ablation does."""

    token: int
    """Position."""
    layer: int
    latent: int | None
    """None: the error."""
    attribution: float
    ablation: float
    """By how much the target falls when the node is ablated: what its attribution estimates."""


@torch.no_grad()
def ablate(
    mlsae: MLSAE,
    reader: ResidualReader,
    ids: Tensor,
    target: Target,
    value: float,
    token: int,
    layer: int,
    latent: int | None,
) -> float:
    """By how much the target falls from `value` in a pass of ids (T,) in which a latent is ablated
    at one layer and token, as `python -m mlsae.steer --ablate` does; or in which the residual there
    is replaced by its reconstruction, which ablates the error."""
    change = (
        Replace((layer,), (token,))
        if latent is None
        else Edit(latent, (layer,), "ablate", positions=(token,))
    )
    with intervene(reader.model, mlsae, [change]):
        residuals, logits = reader.with_logits(ids[None].to(mlsae.sae.W_dec.device))
    return value - target.value(mlsae, reader.layers, residuals, logits).item()


def pearson(checks: Sequence[Check]) -> float | None:
    """The correlation of attributions and ablations; None of fewer than 3, or if one is
    constant."""
    return _correlation(*_columns(checks))


def spearman(checks: Sequence[Check]) -> float | None:
    """The same of their ranks; equal numbers have the mean of theirs."""
    return _correlation(*(_ranks(column) for column in _columns(checks)))


def _columns(checks: Sequence[Check]) -> tuple[Tensor, Tensor]:
    both = torch.tensor([(c.attribution, c.ablation) for c in checks], dtype=torch.float64)
    return both.reshape(-1, 2).unbind(1)  # type: ignore[return-value]


def _ranks(x: Tensor) -> Tensor:
    """(n,) the mean rank of each number."""
    return (x[:, None] > x).sum(1) + 0.5 * (x[:, None] == x).sum(1)


def _correlation(x: Tensor, y: Tensor) -> float | None:
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return None
    return torch.corrcoef(torch.stack([x, y]).double())[0, 1].item()
