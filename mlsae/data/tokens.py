"""Text → packed rows of tokens, split into train and held-out, shuffled with a seed, resumable.

Legend: B rows, T positions.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, Self

import torch
from torch import Tensor

from .. import builtin
from ..distributed import ALONE, Group
from ..errors import InputError
from .documents import Documents, Split

_HELDOUT_EVERY = 20  # of a dataset other than the built-in one, every 20th row is held out
_DOCUMENTS_AT_ONCE = 256  # tokenized together, which keeps the tokenizer's threads busy


class Rows:
    """Iterate over rows of `seq_len` token ids, (T,) int64: one pass over the documents of `split`,
    or, with `endless`, pass after pass, each in its own order.

    Documents are joined by EOS and cut into rows; the tokens left at the end of a pass, fewer than
    a row, are dropped. If the tokenizer begins every text with BOS, every row begins with it, as
    the model saw it in training. With a seed, rows are shuffled in a buffer of `buffer_rows`; pass
    i draws from `seed` + i. A `state_dict` taken between two rows resumes with the very next one.

    Raises InputError if the tokenizer has no EOS, or if the whole split is shorter than one row.
    """

    _tokens: list[int]  # of the documents read so far, used up to `_used`
    _buffer: list[Tensor]

    def __init__(
        self,
        dataset: str,
        tokenizer: Any,
        seq_len: int,
        split: Split,
        *,
        column: str = "text",
        seed: int | None = None,
        buffer_rows: int = 4096,
        endless: bool = False,
    ) -> None:
        self.dataset, self.tokenizer, self.seq_len, self.split = dataset, tokenizer, seq_len, split
        self.column, self.seed, self.buffer_rows = column, seed, buffer_rows
        self.endless = endless
        self._eos = tokenizer.eos_token_id
        if self._eos is None:
            raise InputError(
                "MODEL's tokenizer must have an EOS token, which joins documents, and it has "
                "none; name one of its tokens with --eos_token"
            )
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        self._row_start: list[int] = [bos] if adds_bos else []
        self._start_pass(0)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        row = self._next_in_pass()
        if row is None and self.endless:
            self._start_pass(self._pass + 1)
            row = self._next_in_pass()
        if row is None:
            raise StopIteration
        return row

    def state_dict(self) -> dict[str, Any]:
        """All that the next row depends on: tensors, and JSON-serializable values."""
        return {
            "pass": self._pass,
            "documents": self._documents.state_dict(),
            "rest": torch.tensor(self._tokens[self._used :], dtype=torch.int32),
            "packed": self._packed,
            "filled": self._filled,
            "buffer": torch.stack(self._buffer).int() if self._buffer else torch.empty(0, 0),
            "random": self._random.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; the next row is the one that would have followed it."""
        self._start_pass(state["pass"])
        self._documents.load_state_dict(state["documents"])
        self._tokens = state["rest"].tolist()
        self._packed, self._filled = state["packed"], state["filled"]
        self._buffer = list(state["buffer"].long())
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))

    def _start_pass(self, number: int) -> None:
        self._pass = number
        self._documents = Documents(self.dataset, self.split, self.column)
        self._texts = iter(self._documents)
        self._tokens, self._used = [], 0
        self._packed = 0  # rows packed in this pass, of both splits
        self._filled = False  # whether the buffer has been filled in this pass
        self._buffer = []
        self._random = random.Random((self.seed or 0) + number)

    def _next_in_pass(self) -> Tensor | None:
        """The next row, or None at the end of the pass. With a seed, it leaves a random slot of the
        buffer, which the next packed row fills."""
        if self.seed is None:
            return self._pack()
        if not self._filled:
            self._buffer = list(islice(iter(self._pack, None), self.buffer_rows))
            self._random.shuffle(self._buffer)
            self._filled = True
        if not self._buffer:
            return None
        incoming = self._pack()
        if incoming is None:
            return self._buffer.pop()
        slot = self._random.randrange(len(self._buffer))
        row, self._buffer[slot] = self._buffer[slot], incoming
        return row

    def _pack(self) -> Tensor | None:
        """The next row of the split in the order of the text, or None at the end of the pass."""
        length = self.seq_len - len(self._row_start)
        while True:
            while self._used + length <= len(self._tokens):
                ids = self._tokens[self._used : self._used + length]
                self._used += length
                self._packed += 1
                if self._in_split(self._packed - 1):
                    return torch.tensor(self._row_start + ids)
            texts = list(islice(self._texts, _DOCUMENTS_AT_ONCE))
            if not texts:
                self._check_not_short()
                return None
            encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            joined = chain.from_iterable([*ids, self._eos] for ids in encoded)
            self._tokens = [*self._tokens[self._used :], *joined]
            self._used = 0

    def _in_split(self, number: int) -> bool:
        """Whether the packed row of this number belongs to the split."""
        if self.dataset == builtin.NAME:
            return True  # the built-in corpus is split by files
        return (number % _HELDOUT_EVERY == 0) == (self.split == "heldout")

    def _check_not_short(self) -> None:
        """Raise InputError if the pass that ends has no row of the split."""
        need = 1 if self.dataset == builtin.NAME or self.split == "heldout" else 2
        if self._packed < need:
            raise InputError(
                f"DATASET {self.dataset} is shorter than the {need * self.seq_len} tokens that "
                f"its {self.split} rows need; give more text, or shorter rows with --seq_len "
                f"(now {self.seq_len})"
            )


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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        if state is None:
            self._pending = self._thread.submit(self._prepare)
        else:
            rows.load_state_dict(state["rows"])
            self._pending = self._thread.submit(state["pending"].long)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        batch = self._pending.result()
        self._pending = self._thread.submit(self._prepare)
        return self.group.broadcast_(batch)

    def state_dict(self) -> dict[str, Any]:
        """The state of the rows, and the batch that is prepared but not yet yielded."""
        pending = self._pending.result()
        return {"pending": pending.int(), "rows": self.rows.state_dict()}

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _prepare(self) -> Tensor:
        started = time.perf_counter()
        batch = torch.stack(list(islice(self.rows, self.batch_rows)))
        self.seconds += time.perf_counter() - started
        return batch


class BroadcastBatches:
    """Iterate over the batches of `shape` (B, T) that rank 0 of `group` sends.

    So text is read and tokenized once, and its order does not depend on the number of processes.
    Batches are sent whole to every rank, since 8 B per token is negligible.
    """

    seconds = 0.0  # spent reading: rank 0 does it

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
