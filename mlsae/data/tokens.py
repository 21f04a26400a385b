"""Text → packed rows of tokens, split into train and held-out, shuffled with a seed, resumable.

Legend: B rows, T positions.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from ..distributed import ALONE, Group
from ..errors import InputError
from .config import DataConfig
from .documents import Documents
from .heldout_split import PIECE_CHARS, Piece, Split
from .packing import TokenQueue

_DOCUMENTS_AT_ONCE = 256  # tokenized together, which keeps the tokenizer's threads busy
_FIRST_CHARS = 2**14  # tokenized together at first, then twice as many: a few rows cost little


class Rows:
    """Iterate over rows of `seq_len` token ids, (T,) int64: one pass over the documents of `split`,
    or, with `endless`, pass after pass, each in its own order.

    Documents are joined by EOS, which token ids may end with already, and cut into rows; the tokens
    left at the end of a pass, fewer than a row, are dropped. If the tokenizer begins every text
    with BOS, every row begins with it, as the model saw it in training. A text of more than 2²⁰
    characters is tokenized in pieces, whose ends are before white space. With a seed, rows are
    shuffled in a buffer of `buffer_rows`; pass i draws from `seed` + i. A `state_dict` taken
    between two rows resumes with the very next one.

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

    @property
    def passes(self) -> int:
        """Which pass over the text the last row was of; 1 at the start."""
        return self._pass + 1

    def state_dict(self) -> dict[str, Any]:
        """All that the next row depends on: tensors, and JSON-serializable values."""
        return {
            "pass": self._pass,
            "documents": self._documents.state_dict(),
            "rest": torch.from_numpy(self._tokens.all()),
            "packed": self._packed,
            "filled": self._filled,
            "buffer": torch.stack(self._buffer).int() if self._buffer else torch.empty(0, 0),
            "random": self._random.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; the next row is the one that would have followed it."""
        self._start_pass(state["pass"])
        self._documents.load_state_dict(state["documents"])
        self._tokens.add(state["rest"].numpy())
        self._packed, self._filled = state["packed"], state["filled"]
        self._buffer[:] = state["buffer"].long()
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))

    def _start_pass(self, number: int) -> None:
        self._pass = number
        self._documents = Documents(self.config, self.split, self._render_chat)
        self._pieces = iter(self._documents)
        self._chars = _FIRST_CHARS  # to tokenize together next time
        self._tokens = TokenQueue()  # of the documents read so far, not in a row yet
        self._packed = 0  # rows packed in this pass
        self._filled = False  # whether the buffer has been filled in this pass
        self._buffer: list[Tensor] = []
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
        """The next row in the order of the text, or None at the end of the pass."""
        length = self.seq_len - len(self._row_start)
        while len(self._tokens) < length:
            if not self._tokenize():
                self._check_not_short()
                return None
        self._packed += 1
        return torch.tensor([*self._row_start, *self._tokens.take(length).tolist()])

    def _tokenize(self) -> bool:
        """Tokenize the next pieces of text. False at the end of the pass."""
        batch: list[Piece] = []
        chars = 0
        while chars < self._chars and len(batch) < _DOCUMENTS_AT_ONCE:
            piece = next(self._pieces, None)
            if piece is None:
                break
            batch.append(piece)
            chars += len(piece.text)
        self._chars = min(2 * self._chars, PIECE_CHARS)
        if not batch:
            return False
        texts = [piece.text for piece in batch if isinstance(piece.text, str)]
        encode = partial(self.tokenizer, add_special_tokens=False, verbose=False)
        encoded = iter(encode(texts)["input_ids"] if texts else [])
        for text, ends in batch:
            if isinstance(text, str):
                ids, has_eos = next(encoded), False  # if a text writes EOS out, that is its own
            else:
                ids, has_eos = self._checked(text), text[-1] == self._eos
            self._tokens.add(ids)
            if ends and not has_eos:
                self._tokens.add([self._eos])
        return True

    def _checked(self, ids: list[int]) -> list[int]:
        """Token ids of the dataset. Raises InputError if the tokenizer has no such token."""
        least, most = min(ids), max(ids)
        if least < 0 or most >= len(self.tokenizer):
            raise InputError(
                f"--column {self.config.column} must hold token ids of MODEL's tokenizer, in "
                f"[0, {len(self.tokenizer) - 1}], got {least if least < 0 else most}; give text, "
                "or the model whose tokenizer made them"
            )
        return ids

    def _render_chat(self, messages: list[Any]) -> str:
        """A chat as text. Raises InputError if the tokenizer has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"--column {self.config.column} holds chats, and MODEL's tokenizer has no chat "
                "template to turn them into text; give a model that has one, or a column of text"
            )
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def _check_not_short(self) -> None:
        """Raise InputError if the pass that ends has no row."""
        if self._packed:
            return
        self._documents.check_side()
        raise InputError(
            f"DATASET {self.config.dataset} is too short: its {self.split} text has fewer than the "
            f"{self.seq_len} tokens of a row; give more text, shorter rows with --seq_len, or "
            "another part with --heldout_share"
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

    def _prepare(self) -> tuple[Tensor, int]:
        """The next batch, and the pass that it reaches."""
        started = time.perf_counter()
        batch = torch.stack(list(islice(self.rows, self.batch_rows)))
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
