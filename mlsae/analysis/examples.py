"""Examples of where each latent is active at each layer, collected in one pass over the text.

Legend: L layers, N tokens, K active latents per token, M latents, S = M · L slots, n examples per
slot and kind, W window, E entries, C candidates.
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


class ExampleBatch(NamedTuple):
    """The examples of consecutive latents, of one kind; empty places have a score of −inf."""

    first: int
    """The first of the latents."""
    score: Tensor
    """(latents, L, n)."""
    activation: Tensor
    """(latents, L, n) h."""
    place: Tensor
    """(latents, L, n) the token's place in the text: row · T + position."""
    window: Tensor
    """(latents, L, n, W) h of the latent at the layer over the window; 0 outside the segment."""


class TopNBuffer:
    """For each slot (latent and layer), the n entries of the highest score, with their windows.

    An entry costs one comparison unless it beats the n-th score of its slot so far; the share that
    does falls as 1 / (tokens read). Memory: 4 · n · (3 + W / 2) bytes per slot.
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
        """Which of the entries may enter the n best of their slots, and their ranks among these
        entries: (C,) each, sorted by slot. slot and score (E,)."""
        entry = (score > self.score[:, -1][slot]).nonzero()[:, 0]
        entry = entry[score[entry].argsort(descending=True)]
        entry = entry[slot[entry].argsort(stable=True)]
        sorted_slot = slot[entry]
        index = torch.arange(len(entry), device=entry.device)
        is_start = torch.ones_like(entry, dtype=torch.bool)  # of the entries of a slot
        is_start[1:] = sorted_slot[1:] != sorted_slot[:-1]
        rank = index - torch.where(is_start, index, 0).cummax(0).values
        keep = rank < self.n
        return entry[keep], rank[keep]

    def insert(
        self, slot: Tensor, rank: Tensor, score: Tensor, activation: Tensor, place: Tensor,
        window: Tensor,
    ) -> None:  # fmt: skip
        """Merge candidates (C,) with windows (C, W) into their slots."""
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
    from all tokens where it is active there (those of the highest random numbers: a reservoir).

    Sorted by activation, quarters of the uniform draw represent quarters of the activations.
    """

    def __init__(self, n_latents: int, n_layers: int, n: int, seed: int, device: torch.device):
        self.n_latents, self.n_layers = n_latents, n_layers
        self.top, self.drawn = (TopNBuffer(n_latents * n_layers, n, device) for _ in range(2))
        self._random = torch.Generator(device).manual_seed(seed)

    def update(self, codes: TopK, segment: Tensor, place: Tensor) -> None:
        """Update with codes (L, N, K) of N tokens, in the order of the text.

        segment (N,) numbers the segment of a document that a token is in; place (N,) is its place
        in the text. Windows end where their segment ends.
        """
        values, indices = codes
        n_layers, _, k = values.shape
        h = values.flatten().float()
        active = (h > 0).nonzero()[:, 0]
        h = h[active]
        layer_token = active // k
        slot = indices.flatten()[active] * n_layers + layer_token // values.shape[1]
        token = layer_token % values.shape[1]
        random = torch.rand(len(h), generator=self._random, device=h.device)
        for buffer, score in ((self.top, h), (self.drawn, random)):
            entry, rank = buffer.candidates(slot, score)
            window = _windows(codes, segment, slot[entry], token[entry])
            buffer.insert(slot[entry], rank, score[entry], h[entry], place[token[entry]], window)

    def batches(self, latents: int) -> Iterator[tuple[ExampleBatch, ExampleBatch]]:
        """The examples of highest activation, and the drawn ones by ascending activation: of
        `latents` latents at a time, on the CPU."""
        for first in range(0, self.n_latents, latents):
            yield (
                self._batch(self.top, first, latents, self.top.score),
                self._batch(self.drawn, first, latents, -self.drawn.activation),
            )

    def _batch(self, buffer: TopNBuffer, first: int, latents: int, key: Tensor) -> ExampleBatch:
        """The examples in `buffer`, sorted by `key` (S, n), descending."""
        slots = slice(first * self.n_layers, (first + latents) * self.n_layers)
        seen = buffer.score[slots] > _UNSEEN
        order = torch.where(seen, key[slots], _UNSEEN).argsort(1, descending=True)
        row = torch.arange(len(order), device=order.device)[:, None]
        shape = (-1, self.n_layers, buffer.n)
        return ExampleBatch(
            first,
            *(
                x[slots][row, order].cpu().reshape(*shape, *x.shape[2:])
                for x in (buffer.score, buffer.activation, buffer.place, buffer.window)
            ),
        )


def _windows(codes: TopK, segment: Tensor, slot: Tensor, token: Tensor) -> Tensor:
    """h of the candidates' latents, at their layers, over their windows: (C, W) float32."""
    values, indices = codes
    n_layers, n_tokens, k = values.shape
    offsets = torch.arange(-BEFORE, AFTER + 1, device=slot.device)
    windows = []
    for slots, tokens in zip(
        *(x.split(max(1, _LOOKUP_ELEMENTS // (k * len(offsets)))) for x in (slot, token)),
        strict=True,
    ):
        near = tokens[:, None] + offsets  # (C, W)
        inside = (near >= 0) & (near < n_tokens)
        near = near.clamp(0, n_tokens - 1)
        inside &= segment[near] == segment[tokens][:, None]
        layer = (slots % n_layers)[:, None]
        same = indices[layer, near] == (slots // n_layers)[:, None, None]  # (C, W, K)
        windows.append((values[layer, near] * same).sum(-1) * inside)
    return torch.cat(windows) if windows else values.new_zeros(0, len(offsets))
