"""Which text is held out: a rule on the text alone, the same whatever reads it.

A document is cut into segments of at most 8,192 characters (one of token ids, of 2,048 ids), so
that a long one has several. A segment is held out if the BLAKE2b hash of its content, as a number
in [0, 1), is below the share. So the same text is on the same side in every dataset, for every
model and row length, and what a smaller share holds out, a larger one does too. Neighboring
segments of a side stay together.

A chat is whole on one side, by the hash of its messages: its text depends on the model's template.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError
from .config import check_share

Split = Literal["train", "heldout"]

SEGMENT_CHARS = 8192  # about a row of 2048 tokens
SEGMENT_IDS = 2048
PIECE_CHARS = 2**20  # tokenized at a time: what a tokenizer holds is some 400 times as large

_UP_TO_A_SPACE = re.compile(r".*\S(?=\s)", re.DOTALL)


IntArray = npt.NDArray[Any]
"""Token ids, (n,), of any integer type; of type object if one needs more than 64 bits."""

Content = TypeVar("Content", str, IntArray)
"""Text, or token ids."""


class Piece(NamedTuple):
    """Text of one document and of one side, to be tokenized at a time; or its token ids."""

    text: str | IntArray
    ends: bool
    """Whether the next piece is of another document, or does not follow on this one in it."""


def segments(parts: Iterable[str]) -> Iterator[str]:
    """The segments of a text that comes in `parts`, however it is parted. A segment ends before
    white space, where tokenizers part words; or, if its second half has none, anywhere."""
    rest = ""
    for part in parts:
        text, start = rest + part, 0
        while len(text) - start > SEGMENT_CHARS:
            middle, end = start + SEGMENT_CHARS // 2, start + SEGMENT_CHARS
            match = _UP_TO_A_SPACE.match(text, middle, end + 1)
            end = match.end() if match else end
            yield text[start:end]
            start = end
        rest = text[start:]
    if rest:
        yield rest


def id_segments(ids: IntArray) -> Iterator[IntArray]:
    """The segments of a document of token ids."""
    for start in range(0, len(ids), SEGMENT_IDS):
        yield ids[start : start + SEGMENT_IDS]


def pieces(segments: Iterable[Content], chosen: Callable[[Content], bool]) -> Iterator[Piece]:
    """Join neighbors among the `chosen` segments of a document, up to PIECE_CHARS characters or as
    many token ids."""
    joined: list[Content] = []
    size = 0
    for segment in segments:
        if not chosen(segment):
            if joined:
                yield Piece(_join(joined), True)
            joined, size = [], 0
            continue
        if size + len(segment) > PIECE_CHARS:
            yield Piece(_join(joined), False)
            joined, size = [], 0
        joined.append(segment)
        size += len(segment)
    if joined:
        yield Piece(_join(joined), True)


def _join(contents: list[Any]) -> str | IntArray:
    return "".join(contents) if isinstance(contents[0], str) else np.concatenate(contents)


def _decimals(ids: IntArray) -> bytes:
    """Numbers as text: " ".join(map(str, ids)), which takes three times as long."""
    if ids.dtype == object:
        return " ".join(map(str, ids)).encode()
    decimals = pa.array(ids).cast(pa.string())
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(ids)], decimals), " ")
    return bytes(joined[0].as_buffer())


class HeldoutSplit:
    """Whether content belongs to the side `split`, of which "heldout" has `share`.

    Raises InputError as `check_share`.
    """

    def __init__(self, split: Split, share: float) -> None:
        check_share(split, share)
        self.split, self.share = split, share
        self.lowest, self.highest = 1.0, 0.0  # numbers of all content seen so far

    def has(self, content: bytes) -> bool:
        """Whether `content` is on this side."""
        number = int.from_bytes(hashlib.blake2b(content, digest_size=6).digest()) / 2**48
        self.lowest, self.highest = min(self.lowest, number), max(self.highest, number)
        return (number < self.share) == (self.split == "heldout")

    def has_text(self, text: str) -> bool:
        """Whether `text` is on this side. Raises UnicodeEncodeError if it has lone surrogates."""
        return self.has(text.encode())

    def has_ids(self, ids: IntArray) -> bool:
        """Whether token ids are on this side, by their decimals with spaces between."""
        return self.has(_decimals(ids))

    def has_chat(self, messages: list[dict[str, Any]]) -> bool:
        """Whether a chat is on this side: of the messages, {role, content}, nothing else counts."""
        canonical = [[message["role"], message.get("content")] for message in messages]
        return self.has(json.dumps(canonical, sort_keys=True, default=str).encode())

    def check_side(self, dataset: str) -> None:
        """Raise InputError if none of the content of `dataset`, all of it seen, is on this side."""
        if (self.lowest < self.share) if self.split == "heldout" else (self.highest >= self.share):
            return
        side = "held out" if self.split == "heldout" else "left to train on"
        if self.lowest == self.highest:
            way_out = "it is too short to be split; give more text"
        else:
            shares = math.floor(self.lowest * 1e4 + 1) / 1e4, math.floor(self.highest * 1e4) / 1e4
            way_out = f"give more text, or a share of {shares[0]:g} to {shares[1]:g}"
        if self.split == "heldout":
            way_out += "; of a text that was not trained on, give --heldout_share 1 to evaluate"
        raise InputError(
            f"--heldout_share: of the text in {dataset}, in segments of at most "
            f"{SEGMENT_CHARS:,} characters or {SEGMENT_IDS:,} token ids, none is {side} by a share "
            f"of {self.share:g}; {way_out}"
        )
