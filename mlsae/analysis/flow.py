"""How latents follow one another from layer to layer, at one token.

A latent that is active at a layer and at the next one continues. One that is not active at the
layer before begins, and one that is not active at the next layer ends. Where i ends after a layer
and j begins at the next, at the same token, j follows i.

    continued[j, ℓ] = |{t : j is active at t, at ℓ and at ℓ + 1}|
    follows[i, j] = Σ_ℓ |{t : at t, i ends after ℓ and j begins at ℓ + 1}|
    by chance, if all ends and beginnings of a layer were independent:
        Σ_ℓ ended[i, ℓ] · began[j, ℓ + 1] / tokens
    strength = (follows − by chance) / √(Σ_ℓ ended[i, ℓ] · Σ_ℓ began[j, ℓ + 1])        at most 1

A layer is one that was read, the next one the next that was.

Legend: L layers, N tokens, K active latents per token, M latents, E entries, P pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_topk import TopK

_PAIR_TOKENS = 16_384  # at which pairs are counted: each has up to K² at every layer
_MOST_PAIRS = 2**22  # counted at a time
_LEAST = 10  # ends of i, and beginnings of j: fewer have strong pairs by accident
_LISTED = 50


class Pairs(NamedTuple):
    """Pairs of latents of which one follows the other, the strongest first."""

    ended: Tensor
    """(P,) the latent that ends."""
    began: Tensor
    """(P,) the latent that begins."""
    tokens: Tensor
    """(P,) tokens and layers at which it does."""
    share: Tensor
    """(P,) of the ends of the first, float64."""
    chance: Tensor
    """(P,) the share by chance."""
    strength: Tensor
    """(P,), above 0."""


class Flow(NamedTuple):
    """How latents follow one another, on the CPU."""

    active: Tensor
    """(M, L) tokens at which a latent is active."""
    continued: Tensor
    """(M, L − 1) of them, at which it also is at the next layer."""
    tokens: int
    pairs: Pairs
    pair_tokens: int
    """Tokens at which pairs were counted."""
    missed: int
    """The most by which the count of a pair can be too low: the rarest were given up."""

    def as_dict(self) -> dict[str, Any]:
        """What analysis.json holds: means over tokens of how many latents are active, begin and
        end at each layer, and the strongest pairs."""
        active, continued = self.active.sum(0).double(), self.continued.sum(0).double()
        began, ended = active.clone(), active.clone()
        began[1:] -= continued
        ended[:-1] -= continued
        per_token = {"active": active, "began": began, "ended": ended}
        pairs = zip(*(column[:_LISTED].tolist() for column in self.pairs), strict=True)
        return {
            **{name: (sums / max(1, self.tokens)).tolist() for name, sums in per_token.items()},
            "pair_tokens": self.pair_tokens,
            "missed": self.missed,
            "pairs": [dict(zip(Pairs._fields, pair, strict=True)) for pair in pairs],
        }

    def columns(self) -> dict[str, Tensor]:
        """Columns of the table of latents, (M,) each: the share of a latent's tokens at which it
        continues, NaN if it is never active below the last layer; and what follows it most
        strongly, −1 if nothing is known to."""
        continues = self.continued.sum(1).double() / self.active[:, :-1].sum(1)
        follower = torch.full((len(self.active),), -1)
        share, chance = (torch.full((len(self.active),), torch.nan).double() for _ in range(2))
        weakest_first = [column.flip(0) for column in self.pairs]  # so that the strongest stays
        ended = weakest_first[0]
        follower[ended] = weakest_first[1]
        share[ended], chance[ended] = weakest_first[3], weakest_first[4]
        return {
            "continues": continues,
            "follower": follower,
            "follower_share": share,
            "follower_chance": chance,
        }


class FlowCounts:
    """The counts, updated with a few tokens at a time; pairs are counted at every n-th token of
    `n_tokens`, of which there are to be at most 16,384.

    Pairs are counted by a table of bounded size: when it is full, the rarer half is given up
    (Manku and Motwani, VLDB 2002), and `Flow.missed` tells how much that can have cost.
    """

    def __init__(self, n_latents: int, n_layers: int, n_tokens: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.n_latents, self.n_layers = n_latents, n_layers
        self.every = max(1, -(-n_tokens // _PAIR_TOKENS))
        self.continued = zeros(n_latents, n_layers - 1)
        self._ended, self._began = zeros(n_latents, n_layers - 1), zeros(n_latents, n_layers - 1)
        self._tokens = self._pair_tokens = self._missed = 0
        self._pairs, self._counts = zeros(0), zeros(0)  # i · M + j, ascending; how often
        self._waiting: list[Tensor] = []  # pairs to be counted together, since that sorts the table

    def update(self, codes: TopK) -> None:
        """Update with codes (L, N, K)."""
        n_tokens = codes.values.shape[1]
        token = torch.arange(n_tokens, device=codes.values.device)
        counted = (token + self._tokens) % self.every == 0
        before = self._entries(codes, 0, token)
        for layer in range(self.n_layers - 1):
            after = self._entries(codes, layer + 1, token)
            continues, continued = _among(before, after), _among(after, before)
            _count(self.continued, layer, before[continues] % self.n_latents)
            ends, begins = before[~continues], after[~continued]
            ends = ends[counted[ends // self.n_latents]]
            begins = begins[counted[begins // self.n_latents]]
            _count(self._ended, layer, ends % self.n_latents)
            _count(self._began, layer, begins % self.n_latents)
            self._add_pairs(ends, begins, n_tokens)
            before = after
        self._tokens += n_tokens
        self._pair_tokens += int(counted.sum())

    def _entries(self, codes: TopK, layer: int, token: Tensor) -> Tensor:
        """(E,) token · M + latent of what is active at a layer, ascending, since indices are."""
        entries = token[:, None] * self.n_latents + codes.indices[layer]
        return entries[codes.values[layer] > 0]

    def _add_pairs(self, ends: Tensor, begins: Tensor, n_tokens: int) -> None:
        """Count all pairs of what ends and what begins at the same token."""
        per_token = torch.bincount(begins // self.n_latents, minlength=n_tokens)
        first = per_token.cumsum(0) - per_token  # of each token, in `begins`
        token = ends // self.n_latents
        n_pairs = per_token[token]
        upto = n_pairs.cumsum(0)
        part_of = (upto - 1).clamp_min(0) // _MOST_PAIRS  # a few tokens at a time
        for part in range(int(part_of[-1]) + 1 if len(part_of) else 0):
            own = part_of == part
            n_own = n_pairs[own]
            i = (ends[own] % self.n_latents).repeat_interleave(n_own)
            start = (first[token[own]] - (n_own.cumsum(0) - n_own)).repeat_interleave(n_own)
            j = begins[start + torch.arange(len(i), device=i.device)] % self.n_latents
            self._waiting.append(i * self.n_latents + j)
            if sum(map(len, self._waiting)) > _MOST_PAIRS:
                self._merge()

    def _merge(self) -> None:
        """Count the waiting pairs; the rarer half of the table is given up if it is full."""
        new, counts = torch.unique(torch.cat([self._pairs[:0], *self._waiting]), return_counts=True)
        self._waiting.clear()
        self._pairs, place = torch.unique(torch.cat([self._pairs, new]), return_inverse=True)
        both = torch.cat([self._counts, counts])
        self._counts = both.new_zeros(len(self._pairs)).index_add_(0, place, both)
        if len(self._pairs) > _MOST_PAIRS:
            least = int(self._counts.median())
            self._missed += least
            kept = self._counts > least
            self._pairs, self._counts = self._pairs[kept], self._counts[kept]

    def finish(self, active: Tensor) -> Flow:
        """The result; active (M, L) is how many tokens each latent is active at."""
        self._merge()
        i, j = self._pairs // self.n_latents, self._pairs % self.n_latents
        ended, began = self._ended.double(), self._began.double()
        all_ended, all_began = ended.sum(1)[i], began.sum(1)[j]
        known = (all_ended >= _LEAST) & (all_began >= _LEAST)
        i, j, n = i[known], j[known], self._counts[known]
        all_ended, all_began = all_ended[known], all_began[known]
        chance = (ended[i] * began[j]).sum(1) / max(1, self._pair_tokens)
        strength = (n - chance) / (all_ended * all_began).sqrt()
        above = strength > 0
        order = strength[above].argsort(descending=True, stable=True)
        columns = (i, j, n, n / all_ended, chance / all_ended, strength)
        pairs = Pairs(*(column[above][order].cpu() for column in columns))
        return Flow(
            active.cpu(), self.continued.cpu(), self._tokens, pairs, self._pair_tokens, self._missed
        )


def _among(entries: Tensor, others: Tensor) -> Tensor:
    """Which of the entries (E,) are among `others`; both ascend."""
    if not len(others):
        return torch.zeros_like(entries, dtype=torch.bool)
    place = torch.searchsorted(others, entries).clamp_(max=len(others) - 1)
    return others[place] == entries


def _count(counts: Tensor, layer: int, latents: Tensor) -> None:
    """Add 1 to counts (M, L − 1) at `layer` for each of `latents`."""
    counts[:, layer] += torch.bincount(latents, minlength=len(counts))
