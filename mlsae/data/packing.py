"""Text → packed rows of tokens, in the order of the text.

Legend: B rows, T positions.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError
from .config import DataConfig
from .documents import Documents
from .encoding import Ids, encoder
from .heldout_split import PIECE_CHARS, Piece, Split

_DOCUMENTS_AT_ONCE = 1024  # tokenized together, which keeps the tokenizer's threads busy
_FIRST_CHARS = 2**14  # tokenized together at first, then twice as many: a few rows cost little

Block = npt.NDArray[Any]
"""Rows of token ids, (B, T) int32 or uint16."""


class Packer:
    """The rows of `seq_len` tokens that the documents of `split` make, joined by EOS: one pass,
    block by block, each of the text that is tokenized together.

    Raises InputError if the tokenizer has no EOS, and what `Documents` raises.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, seq_len: int, split: Split) -> None:
        self.config, self.tokenizer, self.seq_len, self.split = config, tokenizer, seq_len, split
        self._eos = tokenizer.eos_token_id
        if self._eos is None:
            raise InputError(
                "MODEL's tokenizer must have an EOS token, which joins documents, and it has "
                "none; name one of its tokens with --eos_token"
            )
        self.row_start = row_start(tokenizer)
        self._encode = encoder(tokenizer)
        self.documents = Documents(config, split, self._render_chat)
        self._pieces = iter(self.documents)
        self._chars = _FIRST_CHARS  # to tokenize together next time
        self._rest: Ids = np.empty(0, np.int32)  # of the documents read so far, not in a row yet

    def next_block(self) -> Block | None:
        """The next rows (B, T) int32, B ≥ 1; None at the end of the text."""
        length = self.seq_len - len(self.row_start)
        parts, size = [self._rest], len(self._rest)
        while size < length:
            arrays = self._tokenize()
            if arrays is None:
                self._rest = np.concatenate(parts)
                return None
            parts += arrays
            size += sum(map(len, arrays))
        n_rows = size // length
        tokens = np.concatenate(parts, dtype=np.int32, casting="same_kind")
        self._rest = tokens[n_rows * length :].copy()  # so that it does not hold the block
        rows = tokens[: n_rows * length].reshape(n_rows, length)
        if not self.row_start:
            return rows
        start = np.asarray(self.row_start, np.int32)
        return np.concatenate([np.tile(start, (n_rows, 1)), rows], axis=1)

    def state_dict(self) -> dict[str, Any]:
        """All that the next block depends on: where the text is read, and tokens in no row yet."""
        return {"documents": self.documents.state_dict(), "rest": torch.from_numpy(self._rest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; the next row is the one that would have followed it."""
        self.documents.load_state_dict(state["documents"])
        self._pieces = iter(self.documents)
        self._rest, self._chars = state["rest"].numpy(), _FIRST_CHARS

    def raise_short(self) -> None:
        """Raise InputError because the whole text makes no row."""
        self.documents.check_side()
        raise InputError(
            f"DATASET {self.config.dataset} is too short: its {self.split} text has fewer than the "
            f"{self.seq_len} tokens of a row; give more text, shorter rows with --seq_len, or "
            "another part with --heldout_share"
        )

    def _tokenize(self) -> list[Ids] | None:
        """The ids of the next pieces of text, with EOS between documents. None at the end."""
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
            return None
        texts = [piece.text for piece in batch if isinstance(piece.text, str)]
        encoded = iter(self._encode(texts) if texts else [])
        eos, arrays = np.asarray([self._eos], np.int32), []
        for text, ends in batch:
            if isinstance(text, str):
                ids, has_eos = next(encoded), False  # if a text writes EOS out, that is its own
            else:
                ids, has_eos = self._checked(text), text[-1] == self._eos
            arrays.append(ids)
            if ends and not has_eos:
                arrays.append(eos)
        return arrays

    @cached_property
    def _n_ids(self) -> int:
        return len(self.tokenizer)

    def _checked(self, ids: Ids) -> Ids:
        """Token ids of the dataset. Raises InputError if the tokenizer has no such token."""
        least, most = ids.min(), ids.max()
        if least < 0 or most >= self._n_ids:
            raise InputError(
                f"--column {self.config.column} must hold token ids of MODEL's tokenizer, in "
                f"[0, {self._n_ids - 1}], got {least if least < 0 else most}; give text, "
                "or the model whose tokenizer made them"
            )
        return ids.astype(np.int32)

    def _render_chat(self, messages: list[Any]) -> str:
        """A chat as text. Raises InputError if the tokenizer has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"--column {self.config.column} holds chats, and MODEL's tokenizer has no chat "
                "template to turn them into text; give a model that has one, or a column of text"
            )
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))


def row_start(tokenizer: Any) -> list[int]:
    """What every row begins with: BOS, if the tokenizer begins every text with it."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return [bos] if adds_bos else []
