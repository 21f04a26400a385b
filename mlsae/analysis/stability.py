"""Which latents another training finds again: each latent's best match in other SAEs of the model.

Two SAEs with decoder rows d_i (M) and d'_j (M'), encoder rows e_i and e'_j:

    j(i)          = argmax_j cos(d_i, d'_j)          the match of latent i
    decoder_i     = cos(d_i, d'_j(i))
    encoder_i     = cos(e_i, e'_j(i))                of the same pair
    mutual_i      = [i = argmax_i' cos(d_i', d'_j(i))]     each is the other's best
    chance        = max_j cos(u, d'_j)               of random directions u

Only latents that were active take part, on either side. One that never was still points where it
began, at random, or where AuxK left it: it has no match, and is none. u is uniform on the sphere,
as d_i is after a random rotation: what two SAEs of these sizes share if nothing ties them.

A match costs 2 · M · M' · D floating-point operations and holds 64 MB of the (M, M') cosines at a
time; chance costs 2 · 4096 · M' · D. For two SAEs of 131,072 latents with D = 1024, these
are 35 and 1.1 TFLOP.

Legend: M latents, M' latents of the other, A and B those of each that were active, D inputs,
O other SAEs, C = 4096 random directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = (0.7, 0.9)
"""Cosines above which the share of latents with a mutual match is told."""

_COSINES_ELEMENTS = 2**24  # computed at a time: 64 MB
_CHANCE_DIRECTIONS = 4096
_CHANCE_QUANTILE = 0.99
_BINS = 100  # of the histogram of cosines, over [−1, 1]


class LatentRows(NamedTuple):
    """The weights of an SAE, and which of its latents take part."""

    decoder: Tensor
    """(M, D)."""
    encoder: Tensor
    """(M, D)."""
    active: Tensor
    """(M,) bool."""

    def taking_part(self) -> Tensor:
        """The active latents (A,) that have a direction: a pruned one's row is 0."""
        return (self.active & (self.decoder != 0).any(1)).nonzero()[:, 0]


class Match(NamedTuple):
    """The match of each latent in another SAE."""

    latent: Tensor
    """(M,) int64 the other's latent; −1 if this one has no match."""
    decoder: Tensor
    """(M,) the cosine of the decoder rows; NaN without a match, as the next."""
    encoder: Tensor
    """(M,) the cosine of the encoder rows."""
    mutual: Tensor
    """(M,) bool whether this latent is also the match of its match."""
    chance: Tensor
    """(C,) the largest cosine of each random direction; empty if no latent was active."""


@torch.no_grad()
def match(one: LatentRows, other: LatentRows, seed: int) -> Match:
    """The `Match` of `one` in `other`, both on one device; `seed` draws the random directions. Of
    latents with equal cosines, the first is the match.

    Raises ValueError if their widths differ.
    """
    (n, d_in), width = one.decoder.shape, other.decoder.shape[1]
    if d_in != width:
        raise ValueError(f"other must have rows of width {d_in}, got {width}")
    mine, theirs = one.taking_part(), other.taking_part()
    device = one.decoder.device
    nan = torch.full((n,), torch.nan, device=device)
    found = Match(
        torch.full((n,), -1, device=device), nan, nan.clone(),
        torch.zeros(n, dtype=torch.bool, device=device), nan[:0],
    )  # fmt: skip
    if not len(mine) or not len(theirs):
        return found
    ours, candidates = (_unit(sae.decoder[at]) for sae, at in ((one, mine), (other, theirs)))
    cosine, best, best_back = _nearest_both_ways(ours, candidates)
    encoders = F.cosine_similarity(one.encoder[mine], other.encoder[theirs[best]], dim=1)
    found.latent[mine] = theirs[best]
    found.decoder[mine] = cosine
    found.encoder[mine] = encoders.float()
    found.mutual[mine] = best_back[best] == torch.arange(len(mine), device=device)
    return found._replace(chance=chance_cosines(candidates, seed))


def chance_cosines(rows: Tensor, seed: int) -> Tensor:
    """The largest cosine to `rows` (B, D), of norm 1, of each of 4096 random directions: (C,)."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(_CHANCE_DIRECTIONS, rows.shape[1], generator=generator)
    return _nearest_both_ways(_unit(directions.to(rows.device)), rows)[0]


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=1, eps=1e-30)


def _nearest_both_ways(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For rows of norm 1 (A, D) and (B, D): each first row's largest cosine to the others (A,) and
    where it is (A,), and where each other row has its largest (B,)."""
    chunk = max(1, _COSINES_ELEMENTS // len(other))
    cosine, best = one.new_empty(len(one)), one.new_empty(len(one), dtype=torch.int64)
    cosine_back = one.new_full((len(other),), -torch.inf)
    best_back = torch.zeros_like(cosine_back, dtype=torch.int64)
    for start in range(0, len(one), chunk):
        part = slice(start, start + chunk)
        cosines = one[part] @ other.T
        cosine[part], best[part] = cosines.max(1)
        larger, at = cosines.max(0)
        better = larger > cosine_back
        cosine_back[better] = larger[better]
        best_back[better] = at[better] + start
    return cosine.clamp_(-1, 1), best, best_back  # rounding goes past the ends


@dataclass(frozen=True)
class Stability:
    """Each latent's matches in O other SAEs."""

    others: Sequence[str]
    """Their folders, or names."""
    matches: Sequence[Match]
    """One of each."""

    def columns(self) -> dict[str, Tensor | list[list[int]]]:
        """Means over the others, and the matches, by latent: columns of the table of latents. NaN
        if the latent was never active; the others without active latents do not count."""
        decoder, encoder = (
            torch.stack([getattr(each, name) for each in self.matches]).nanmean(0)
            for name in ("decoder", "encoder")
        )
        matched = torch.stack([each.latent >= 0 for each in self.matches])
        mutual = torch.stack([each.mutual for each in self.matches])
        latents = torch.stack([each.latent for each in self.matches], 1)
        return {
            "match_decoder": decoder.cpu(),
            "match_encoder": encoder.cpu(),
            "match_mutual": (mutual.sum(0) / matched.sum(0)).float().cpu(),  # 0 / 0 is NaN
            "match_latents": latents.tolist(),
        }

    def as_dict(self) -> dict[str, Any]:
        """What analysis.json holds of it, JSON-serializable. `median` is of all pairs of a latent
        and another SAE, as the shares: of pairs that are mutual with a cosine above a threshold."""
        decoder = torch.cat([each.decoder for each in self.matches])
        matched = ~decoder.isnan()
        mutual = torch.cat([each.mutual for each in self.matches])[matched]
        decoder, chance = decoder[matched], torch.cat([each.chance for each in self.matches])
        edges = torch.linspace(-1, 1, _BINS + 1, dtype=torch.float64)
        return {
            "others": list(self.others),
            "pairs": len(decoder),
            "median": _quantile(decoder, 0.5),
            "mutual": _mean(mutual),
            "mutual_above": {str(least): _mean(mutual & (decoder > least)) for least in THRESHOLDS},
            "chance": {
                "median": _quantile(chance, 0.5),
                "upper": _quantile(chance, _CHANCE_QUANTILE),
            },
            "histogram": {
                "edges": edges.tolist(),
                "match": torch.histc(decoder.cpu(), _BINS, -1, 1).tolist(),
                "chance": torch.histc(chance.cpu(), _BINS, -1, 1).tolist(),
            },
        }


def stability(one: LatentRows, others: Iterable[tuple[str, LatentRows]], seed: int) -> Stability:
    """The `Stability` of `one` beside the named others, which are asked for one at a time."""
    names, matches = [], []
    for i, (name, other) in enumerate(others):
        names.append(name)
        matches.append(Match(*(t.cpu() for t in match(one, other, (seed + i) % 2**63))))
    return Stability(names, matches)


def _quantile(values: Tensor, share: float) -> float | None:
    return float(np.quantile(values.numpy(), share)) if len(values) else None


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if len(values) else None
