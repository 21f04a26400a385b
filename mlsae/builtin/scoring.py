"""How well the built-in model, and a bigram as its yardstick, model the held-out files.

Legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

Tokens = np.ndarray[Any, np.dtype[np.uint16]]


def tokenize(tokenizer: Any, documents: Iterable[str], desc: str = "tokenizing") -> Tokens:
    """All documents as one array, each behind an EOS. V must be at most 2¹⁶."""
    parts = []
    bar = iter(tqdm(documents, desc=desc, unit=" files", disable=None))
    while some := list(islice(bar, 64)):  # together, so that the tokenizer's threads have work
        for encoded in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.array([tokenizer.eos_token_id, *encoded], dtype=np.uint16))
    return np.concatenate(parts)


def bigram_loss(train: Tokens, heldout: Tokens, vocab_size: int) -> float:
    """Cross-entropy, in nats per token, of a bigram model interpolated with the unigram.

    p(b|a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), t(a) the number of types seen after a
    (Witten and Bell, 1991); p(b) = (c(b) + 1) / (C + V).
    """
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    pairs = train[:-1].astype(np.int64) * vocab_size + train[1:]
    counts = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    total, types = counts.sum(1), (counts > 0).sum(1)
    a, b = heldout[:-1].astype(np.int64), heldout[1:].astype(np.int64)
    interpolated = (counts[a, b] + types[a] * unigram[b]) / np.maximum(total[a] + types[a], 1)
    p = np.where(total[a] > 0, interpolated, unigram[b])
    return float(-np.log(p).mean())


@torch.inference_mode()
def heldout_loss(
    model: torch.nn.Module, tokens: Tokens, seq_len: int = 512, batch_rows: int = 16
) -> float:
    """Mean cross-entropy, in nats per predicted token, over consecutive rows of `tokens`."""
    rows = torch.from_numpy(tokens[: len(tokens) // seq_len * seq_len].astype(np.int64))
    device = next(model.parameters()).device
    total = 0.0
    for batch in rows.view(-1, seq_len).split(batch_rows):
        batch = batch.to(device)  # (B, T)
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / (len(rows) // seq_len)


def near_copies(documents: list[str], others: Iterable[str]) -> list[bool]:
    """Which of `documents` have most of their longer lines in a near-copy among `others`.

    One text is a near-copy when more than half of its lines of 30 characters or more stand in
    `documents`: libraries carry modified copies of each other's modules, and a held-out file is
    not held out where training text has such a copy.
    """
    lines = [_long_lines(text) for text in documents]
    every = set().union(*lines)
    copied: set[str] = set()
    for text in others:
        own = _long_lines(text)
        if len(own & every) > len(own) / 2:
            copied |= own & every
    return [len(own & copied) > len(own) / 2 for own in lines]


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}
