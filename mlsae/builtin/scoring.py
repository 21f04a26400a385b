"""The loss of the built-in model, and of a bigram as its baseline, on the held-out files.

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
    """All documents as one array, with an EOS before each. V must be at most 2¹⁶."""
    parts = []
    bar = iter(tqdm(documents, desc=desc, unit=" files", disable=None))
    while batch := list(islice(bar, 64)):  # in batches, for the tokenizer's threads
        for encoded in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.array([tokenizer.eos_token_id, *encoded], dtype=np.uint16))
    return np.concatenate(parts)


def bigram_loss(train: Tokens, heldout: Tokens, vocab_size: int) -> float:
    """Cross-entropy, in nats per token, of a bigram model interpolated with the unigram.

        p(b|a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)),   p(b) = (c(b) + 1) / (C + V)

    c counts tokens and pairs in `train`, C is the number of tokens, and t(a) the number of
    different tokens seen after a (Witten and Bell, 1991).
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
    """For each of `documents`, whether near-copies among `others` hold most of its long lines.

    A near-copy is a text of which more than half of the long lines are in `documents`. Libraries
    contain modified copies of each other's modules, and a file with such a copy in the training
    text is not truly held out. Long lines have 30 characters or more.
    """
    documents_lines = [_long_lines(text) for text in documents]
    all_lines = set().union(*documents_lines)
    copied: set[str] = set()
    for text in others:
        lines = _long_lines(text)
        if len(lines & all_lines) > len(lines) / 2:
            copied |= lines & all_lines
    return [len(lines & copied) > len(lines) / 2 for lines in documents_lines]


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}
