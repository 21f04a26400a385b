"""Packed rows of one pass over a text, in its order: from the cache as far as it goes, then from
the text, and the cache is given them.

Legend: B rows, T positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .config import DataConfig
from .heldout_split import Split
from .packing import Block, Packer
from .token_cache import DamagedError, Entry, Writer


class TextRows:
    """The rows of `Packer`, one at a time. The rows of `entry` are the same ones, so nothing that
    comes out depends on whether there is an entry.

    A state holds the packer's state before the block that the next row is in, and how many rows of
    it to skip: so no cache is needed to resume from it.

    Raises InputError as `Packer` does, and at the end of a text that makes no row.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Any, seq_len: int, split: Split, entry: Entry | None
    ) -> None:
        self._packer = Packer(config, tokenizer, seq_len, split)
        self._entry = entry
        self._writer: Writer | None = None
        self._packs = entry is None  # whether rows are packed, and not read, from now on
        self._chunks = 0  # read
        self._block: Block = np.empty((0, seq_len), np.int32)
        self._row = 0  # the next one, from the start of the block
        self._taken = 0  # rows, in this pass
        self._before = self._after = self._packer.state_dict()  # of the packer, around the block

    def next_row(self) -> Block | None:
        """The next row (T,), a view that the caller copies; None at the end of the text."""
        while self._row >= len(self._block):
            block = self._next_block()
            if block is None:
                self.close(ended=True)
                if not self._taken:
                    self._packer.raise_short()
                return None
            self._row -= len(self._block)
            self._block = block
        row: Block = self._block[self._row]
        self._row += 1
        self._taken += 1
        return row

    def state_dict(self) -> dict[str, Any]:
        """All that the next row depends on: tensors, and JSON-serializable values."""
        return {**self._before, "skip": self._row, "packed": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of this pass; the next row is the one that would have followed it."""
        self._taken = state["packed"]
        if self._entry is not None and self._seek(self._entry):
            return
        self._packs, self._chunks = True, 0
        self._row = state.get("skip", 0)  # states without a cache behind them had none
        self._packer.load_state_dict(state)
        self._before = self._after = self._packer.state_dict()

    def close(self, ended: bool = False) -> None:
        """Write what is packed so far to the cache, and let others write."""
        if self._writer is not None:
            self._writer.flush(self._after, ended)
            self._writer.close()
            self._writer = None

    def _seek(self, entry: Entry) -> bool:
        """Whether the row that is next is in the cache, or follows on its last; go there if so."""
        number, skip = 0, self._taken
        while number < len(entry.chunks) and skip > entry.chunks[number].rows:
            skip -= entry.chunks[number].rows
            number += 1
        if number == len(entry.chunks) and skip > 0:
            return False
        if number > 0:
            try:
                self._before = self._after = entry.read(number - 1)[1]
            except DamagedError:  # which the next pass tells
                return False
        self._chunks, self._row = number, skip
        return True

    def _next_block(self) -> Block | None:
        """The next rows (B, T); None at the end of the text."""
        if not self._packs and self._entry is not None:
            block = self._read_block(self._entry)
            if block is not None or not self._packs:
                return block
        before, block = self._after, self._packer.next_block()
        self._after = self._packer.state_dict()
        if block is not None:
            self._before = before
            if self._writer is not None:
                self._writer.add(block, self._after)
        return block

    def _read_block(self, entry: Entry) -> Block | None:
        """The rows of the next chunk. None at the end of the text, or where rows are packed from
        now on."""
        if self._chunks == len(entry.chunks):
            entry.scan()
        if self._chunks == len(entry.chunks):
            if entry.chunks and entry.chunks[-1].ended:
                return None
            writer = entry.writer()
            if self._chunks == len(entry.chunks):  # no other process has written since
                self._pack_from_here(writer)
                return None
        try:
            block, after = entry.read(self._chunks)
        except DamagedError as error:
            entry.drop(self._chunks, error)
            self._pack_from_here(entry.writer())
            return None
        self._before, self._after = self._after, after
        self._packer.documents.load_state_dict(after["documents"])
        self._packer.documents.report()
        self._chunks += 1
        return block

    def _pack_from_here(self, writer: Writer | None) -> None:
        self._packs, self._writer = True, writer
        self._packer.load_state_dict(self._after)
