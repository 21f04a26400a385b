"""Rows of tokens to train on: split into train and held-out, shuffled with a seed, resumable.

Legend: B rows, T positions.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..distributed import ALONE, Group
from .cache_key import open_entry, pinned
from .config import DataConfig
from .heldout_split import Split
from .packing import Block
from .text_rows import TextRows


class Rows:
    """Iterate over rows of `seq_len` token ids, (T,) int64: one pass over the documents of `split`,
    or, with `endless`, pass after pass, each in its own order.

    Documents are joined by EOS, which token ids may end with already, and cut into rows; the tokens
    left at the end of a pass, fewer than a row, are dropped. If the tokenizer begins every text
    with BOS, every row begins with it, as the model saw it in training. A text of more than 2²⁰
    characters is tokenized in pieces, whose ends are before white space. With a seed, rows are
    shuffled in a buffer of `buffer_rows`; pass i draws from `seed` + i. A `state_dict` taken
    between two rows resumes with the very next one, with the cache of tokens or without.

    Raises InputError if the tokenizer has no EOS, or if the whole split is shorter than one row.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        seq_len: int,
        split: Split,
        *,
        seed: int | None = None,
        buffer_rows: int = 4096,
        endless: bool = False,
    ) -> None:
        self.config, self.tokenizer, self.seq_len, self.split = config, tokenizer, seq_len, split
        self.seed, self.buffer_rows, self.endless = seed, buffer_rows, endless
        self._pinned = pinned(config)
        self._buffer: Block
        self._entry = open_entry(self._pinned, tokenizer, seq_len, split)
        self._start_pass(0)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        rows = self.take(1)
        if not len(rows):
            raise StopIteration
        return rows[0]

    def take(self, n: int) -> Tensor:
        """The next rows (n, T) int64; fewer at the end."""
        rows = np.empty((n, self.seq_len), np.int64)
        for i in range(n):
            if not self._next_into(rows[i]):
                return torch.from_numpy(rows[:i])
        return torch.from_numpy(rows)

    @property
    def passes(self) -> int:
        """Which pass over the text the last row was of; 1 at the start."""
        return self._pass + 1

    def state_dict(self) -> dict[str, Any]:
        """All that the next row depends on: tensors, and JSON-serializable values."""
        return {
            "pass": self._pass,
            **self._text.state_dict(),
            "filled": self._filled,
            "buffer": torch.from_numpy(self._buffer.astype(np.int32)),
            "random": self._random.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; the next row is the one that would have followed it."""
        self._start_pass(state["pass"])
        self._text.load_state_dict(state)
        self._filled = state["filled"]
        self._buffer = state["buffer"].numpy().astype(np.int32)
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))

    def close(self) -> None:
        """Write the tokens that are packed so far to the cache."""
        self._text.close()

    def _start_pass(self, number: int) -> None:
        self._pass = number
        self._text = TextRows(self._pinned, self.tokenizer, self.seq_len, self.split, self._entry)
        self._filled = False  # whether the buffer has been filled in this pass
        self._buffer = np.empty((0, self.seq_len), np.int32)
        self._random = random.Random((self.seed or 0) + number)

    def _next_into(self, target: Block) -> bool:
        """Copy the next row, of the next pass if `endless`, to `target`; False at the end."""
        if self._next_in_pass(target):
            return True
        if not self.endless:
            return False
        self._start_pass(self._pass + 1)
        return self._next_in_pass(target)

    def _next_in_pass(self, target: Block) -> bool:
        """As `_next_into`, in this pass. With a seed, the row leaves a random slot of the buffer,
        which the next row of the text fills."""
        if self.seed is not None and not self._filled:
            self._fill()
        incoming = self._text.next_row()
        if self.seed is None:
            if incoming is not None:
                target[:] = incoming
            return incoming is not None
        if not len(self._buffer):
            return False
        if incoming is None:
            target[:] = self._buffer[-1]
            self._buffer = self._buffer[:-1]
            return True
        slot = self._random.randrange(len(self._buffer))
        target[:] = self._buffer[slot]
        self._buffer[slot] = incoming
        return True

    def _fill(self) -> None:
        """Fill the buffer with the first rows of the pass, and shuffle them."""
        rows: list[Block] = []
        while len(rows) < self.buffer_rows and (row := self._text.next_row()) is not None:
            rows.append(row.astype(np.int32))
        order = list(range(len(rows)))
        self._random.shuffle(order)
        self._buffer = np.stack([rows[i] for i in order]) if rows else self._buffer
        self._filled = True


class Batches:
    """Iterate without end over batches (B, T) of `batch_rows` rows. A thread prepares the next
    batch during training on the current one, so nobody else may use `rows`, which must be endless.
    With a `state`, resume from it. Rank 0 of `group` has this class and sends each batch to the
    other ranks, which receive it with `BroadcastBatches`."""

    def __init__(
        self,
        rows: Rows,
        batch_rows: int,
        state: dict[str, Any] | None = None,
        group: Group = ALONE.world,
    ) -> None:
        self.rows, self.batch_rows, self.group = rows, batch_rows, group
        self.seconds = 0.0  # spent reading and tokenizing
        self.passes = 1
        """Which pass over the text the last batch reached; 1 at the start."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        if state is None:
            self._pending = self._thread.submit(self._prepare)
        else:
            rows.load_state_dict(state["rows"])
            self.passes = state["passes"]
            pending = state["pending"].long(), state["pending_passes"]
            self._pending = self._thread.submit(lambda: pending)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        batch, self.passes = self._pending.result()
        self._pending = self._thread.submit(self._prepare)
        return self.group.broadcast_(batch)

    def state_dict(self) -> dict[str, Any]:
        """The state of the rows, and the batch that is prepared but not yet yielded."""
        pending, passes = self._pending.result()
        return {
            "pending": pending.int(),
            "pending_passes": passes,
            "passes": self.passes,
            "rows": self.rows.state_dict(),
        }

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
        self.rows.close()

    def _prepare(self) -> tuple[Tensor, int]:
        """The next batch, and the pass that it reaches."""
        started = time.perf_counter()
        batch = self.rows.take(self.batch_rows)
        self.seconds += time.perf_counter() - started
        return batch, self.rows.passes


class BroadcastBatches:
    """Iterate over the batches of `shape` (B, T) that rank 0 of `group` sends.

    So text is read and tokenized once, and its order does not depend on the number of processes.
    Batches are sent whole to every rank, since 8 B per token is negligible.
    """

    seconds = 0.0  # spent reading: rank 0 does it
    passes = 1  # over the text: rank 0 counts them

    def __init__(self, shape: tuple[int, int], group: Group) -> None:
        self.shape, self.group = shape, group

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return self.group.broadcast_(torch.empty(self.shape, dtype=torch.int64))

    def state_dict(self) -> dict[str, Any]:
        """Empty: rank 0 has the state."""
        return {}

    def close(self) -> None:
        """Do nothing: there is no thread."""


def not_special(input_ids: Tensor, tokenizer: Any) -> Tensor:
    """The token mask of `input_ids` (B, T): (B, T) bool, False at special tokens (EOS, BOS, …).

    Residuals at special tokens are dropped, not zeroed, because zeros would count in every mean.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), device=input_ids.device)
    return ~torch.isin(input_ids, special)
