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

_HELDOUT_EVERY = 20  # of a user's dataset, every 20th row is held out
_DOCUMENTS_AT_ONCE = 256  # tokenized together, so that the tokenizer's threads have work


class Rows:
    """Rows of `seq_len` token ids, (T,) int64: one pass over the split's documents, or, with
    `endless`, pass after pass, each in an order of its own.

    Documents are joined by EOS and cut into rows; what is left at the end of a pass is shorter
    than a row and dropped. A tokenizer that begins every text with BOS has it at the start of
    every row, as the model saw it in training. With a seed, rows leave a buffer of `buffer_rows`
    in random order: pass i draws from `seed` + i. A `state_dict` taken between two rows goes on
    with the very next one.

    Raises InputError if the whole split is shorter than one row.
    """

    _rest: list[int]  # tokens of the texts read, used up to `_at`
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
                "none; set tokenizer.eos_token and save it with the model"
            )
        bos = tokenizer.bos_token_id
        starts = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        self._begin: list[int] = [bos] if starts else []
        self._start_pass(0)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        row = self._next_of_pass()
        if row is None and self.endless:
            self._start_pass(self._pass + 1)
            row = self._next_of_pass()
        if row is None:
            raise StopIteration
        return row

    def state_dict(self) -> dict[str, Any]:
        """All that the next row depends on: tensors, and values as JSON has them."""
        return {
            "pass": self._pass,
            "documents": self._documents.state_dict(),
            "rest": torch.tensor(self._rest[self._at :], dtype=torch.int32),
            "packed": self._packed,
            "filled": self._filled,
            "buffer": torch.stack(self._buffer).int() if self._buffer else torch.empty(0, 0),
            "random": self._random.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._start_pass(state["pass"])
        self._documents.load_state_dict(state["documents"])
        self._rest = state["rest"].tolist()
        self._packed, self._filled = state["packed"], state["filled"]
        self._buffer = list(state["buffer"].long())
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))

    def _start_pass(self, number: int) -> None:
        self._pass = number
        self._documents = Documents(self.dataset, self.split, self.column)
        self._texts = iter(self._documents)
        self._rest, self._at = [], 0
        self._packed = 0  # rows packed in this pass, of both splits
        self._filled = False
        self._buffer = []
        self._random = random.Random((self.seed or 0) + number)

    def _next_of_pass(self) -> Tensor | None:
        """The next row; from a random place of the buffer, which the next packed one takes."""
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
        place = self._random.randrange(len(self._buffer))
        row, self._buffer[place] = self._buffer[place], incoming
        return row

    def _pack(self) -> Tensor | None:
        """The next row of the split in the order of the text; None at the end of the pass."""
        length = self.seq_len - len(self._begin)
        while True:
            while self._at + length <= len(self._rest):
                ids = self._rest[self._at : self._at + length]
                self._at += length
                self._packed += 1
                if self._is_wanted(self._packed - 1):
                    return torch.tensor(self._begin + ids)
            some = list(islice(self._texts, _DOCUMENTS_AT_ONCE))
            if not some:
                self._check_not_short()
                return None
            encoded = self.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            new = chain.from_iterable([*ids, self._eos] for ids in encoded)
            self._rest = [*self._rest[self._at :], *new]
            self._at = 0

    def _is_wanted(self, packed: int) -> bool:
        """Whether the split has this one of the packed rows."""
        if self.dataset == builtin.NAME:
            return True  # its files are split
        return (packed % _HELDOUT_EVERY == 0) == (self.split == "heldout")

    def _check_not_short(self) -> None:
        need = 1 if self.dataset == builtin.NAME or self.split == "heldout" else 2
        if self._packed < need:
            raise InputError(
                f"DATASET {self.dataset} is shorter than the {need * self.seq_len} tokens that "
                f"its {self.split} rows need; give more text, or shorter rows with --seq_len "
                f"(now {self.seq_len})"
            )


class Batches:
    """Batches (B, T) of `batch_rows` rows without end, the next one prepared in a thread while
    the one before is trained on. `rows` must be endless, and is no one else's from then on. With
    a `state`, they go on from there. Each is sent to the other processes of `group`, if any, who
    have it from `BroadcastBatches`."""

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
        """The rows' state, and the batch that has been prepared but not handed out."""
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
    """The batches, of a known `shape` (B, T), that the first process of `group` sends.

    Text is thus read and tokenized once, whatever the number of processes, and its order does not
    depend on it. A batch is sent whole, as 8 B a token are next to nothing.
    """

    seconds = 0.0

    def __init__(self, shape: tuple[int, int], group: Group) -> None:
        self.shape, self.group = shape, group

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return self.group.broadcast_(torch.empty(self.shape, dtype=torch.int64))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the first process has it."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


def not_special(input_ids: Tensor, tokenizer: Any) -> Tensor:
    """Where `input_ids` (B, T) is not a special token (EOS, BOS, padding, …): (B, T) bool.

    The residuals at special tokens are dropped, not zeroed: as zeros they would stay in every
    mean.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), device=input_ids.device)
    return ~torch.isin(input_ids, special)
