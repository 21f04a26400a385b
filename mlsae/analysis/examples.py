"""Examples of where each latent is active at each layer, kept while the text goes by.

Legend: L layers, N tokens, K active latents a token, M latents, S = M · L slots, n examples a slot
and kind, W window, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_topk import TopK

BEFORE, AFTER = 10, 5
"""Tokens of the window before the example and after it."""

_LOOKUP_ELEMENTS = 2**23  # codes compared at a time, in search of a window's activations
_UNSEEN = -torch.inf


class Some(NamedTuple):
    """The examples of some latents, of one kind; empty places have a score of −inf."""

    first: int
    """The first of the latents."""
    score: Tensor
    """(latents, L, n)."""
    activation: Tensor
    """(latents, L, n) h."""
    place: Tensor
    """(latents, L, n) the token's place in the text: row · T + position."""
    window: Tensor
    """(latents, L, n, W) h of the latent at the layer over the window; 0 outside the document."""


class Best:
    """Of each slot (latent and layer) the n entries of the highest score, with their windows.

    An entry must beat the slot's n-th score so far to be looked at, so that the work falls as
    1 / text: by far the most entries cost one comparison. 4 · n · (3 + W / 2) bytes a slot.
    """

    def __init__(self, n_slots: int, n: int, device: torch.device) -> None:
        self.n = n
        self.score = torch.full((n_slots, n), _UNSEEN, device=device)  # descending
        self.activation = torch.zeros(n_slots, n, device=device)
        self.place = torch.zeros(n_slots, n, dtype=torch.int64, device=device)
        self.window = torch.zeros(
            n_slots, n, BEFORE + 1 + AFTER, dtype=torch.float16, device=device
        )

    def candidates(self, slot: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the entries come among the n best of their slots (C,), sorted by slot, and
        their ranks in these entries (C,). slot and score (E,)."""
        entry = (score > self.score[:, -1][slot]).nonzero()[:, 0]
        entry = entry[score[entry].argsort(descending=True)]
        entry = entry[slot[entry].argsort(stable=True)]
        of = slot[entry]
        index = torch.arange(len(of), device=of.device)
        start = torch.ones_like(of, dtype=torch.bool)
        start[1:] = of[1:] != of[:-1]
        rank = index - torch.where(start, index, 0).cummax(0).values
        keep = rank < self.n
        return entry[keep], rank[keep]

    def take(
        self, slot: Tensor, rank: Tensor, score: Tensor, activation: Tensor, place: Tensor,
        window: Tensor,
    ) -> None:  # fmt: skip
        """Merge candidates (C,), their windows (C, W), with what the slots have."""
        touched, row = slot.unique_consecutive(return_inverse=True)
        scores = self.score.new_full((len(touched), self.n), _UNSEEN)
        scores[row, rank] = score
        best, chosen = torch.cat([self.score[touched], scores], 1).topk(self.n)
        self.score[touched] = best
        for kept, new in (
            (self.activation, activation), (self.place, place), (self.window, window),
        ):  # fmt: skip
            fresh = kept.new_zeros(len(touched), self.n, *kept.shape[2:])
            fresh[row, rank] = new.to(kept.dtype)
            both = torch.cat([kept[touched], fresh], 1)  # (slots, 2 n, …)
            kept[touched] = both[torch.arange(len(touched), device=row.device)[:, None], chosen]


class Examples:
    """Examples of every latent at every layer: the n of highest activation, and n drawn uniformly
    from all tokens where it is active there (those of the highest of random numbers: a reservoir).

    In order of activation, quarters of the uniform draw stand for quarters of the activations.
    """

    def __init__(self, n_latents: int, n_layers: int, n: int, seed: int, device: torch.device):
        self.n_latents, self.n_layers = n_latents, n_layers
        self.top, self.drawn = (Best(n_latents * n_layers, n, device) for _ in range(2))
        self._random = torch.Generator(device).manual_seed(seed)

    def update(self, codes: TopK, piece: Tensor, place: Tensor) -> None:
        """Take in codes (L, N, K) of N tokens in the order of the text. piece (N,): which piece of
        a document a token is in; place (N,): its place in the text. A window ends where its piece
        does."""
        values, indices = codes
        n_layers, _, k = values.shape
        h = values.flatten().float()
        active = (h > 0).nonzero()[:, 0]
        h = h[active]
        layer_token = active // k
        slot = indices.flatten()[active] * n_layers + layer_token // values.shape[1]
        token = layer_token % values.shape[1]
        random = torch.rand(len(h), generator=self._random, device=h.device)
        for best, score in ((self.top, h), (self.drawn, random)):
            entry, rank = best.candidates(slot, score)
            some, at = slot[entry], token[entry]
            window = _windows(codes, piece, some, at)
            best.take(some, rank, score[entry], h[entry], place[at], window)

    def parts(self, latents: int) -> Iterator[tuple[Some, Some]]:
        """The examples of highest activation and the drawn ones, of `latents` latents at a time,
        on the CPU; the drawn ones by ascending activation."""
        for first in range(0, self.n_latents, latents):
            yield (
                self._part(self.top, first, latents, self.top.score),
                self._part(self.drawn, first, latents, -self.drawn.activation),
            )

    def _part(self, best: Best, first: int, latents: int, order: Tensor) -> Some:
        some = slice(first * self.n_layers, (first + latents) * self.n_layers)
        seen = best.score[some] > _UNSEEN
        by = torch.where(seen, order[some], _UNSEEN).argsort(1, descending=True)
        row = torch.arange(len(by), device=by.device)[:, None]
        shape = (-1, self.n_layers, best.n)
        return Some(
            first,
            *(
                x[some][row, by].cpu().reshape(*shape, *x.shape[2:])
                for x in (best.score, best.activation, best.place, best.window)
            ),
        )


def _windows(codes: TopK, piece: Tensor, slot: Tensor, token: Tensor) -> Tensor:
    """h of the candidates' latents at their layers over their windows: (C, W) float32."""
    values, indices = codes
    n_layers, n_tokens, k = values.shape
    offsets = torch.arange(-BEFORE, AFTER + 1, device=slot.device)
    found = []
    for some, at in zip(
        *(x.split(max(1, _LOOKUP_ELEMENTS // (k * len(offsets)))) for x in (slot, token)),
        strict=True,
    ):
        near = at[:, None] + offsets  # (C, W)
        inside = (near >= 0) & (near < n_tokens)
        near = near.clamp(0, n_tokens - 1)
        inside &= piece[near] == piece[at][:, None]
        layer = (some % n_layers)[:, None]
        same = indices[layer, near] == (some // n_layers)[:, None, None]  # (C, W, K)
        found.append((values[layer, near] * same).sum(-1) * inside)
    return torch.cat(found) if found else values.new_zeros(0, len(offsets))
