"""Read documents from the built-in corpus, local files, or a dataset on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import builtin
from ..distributed import log_rank0
from ..errors import InputError, first_line
from .config import DataConfig
from .heldout_split import HeldoutSplit, Piece, Split, id_segments, pieces, segments
from .local_files import LocalFiles, expand_user, has_splits
from .records import INPUT_IDS, Bad, Record, Start, Value, wanted

_ENOUGH_RECORDS = 1000  # after so many, the share of bad ones is known well enough


class _Chat(NamedTuple):
    """A document that is a chat."""

    messages: list[dict[str, Any]]
    text: str
    """What the tokenizer's template makes of them."""


class Documents:
    """The text of one side of a dataset, in pieces: `config.dataset` is "builtin", a local file or
    folder, or the name of a dataset on the hub. Iterating again resumes where the last iteration
    stopped, or where a loaded `state_dict` was taken.

    A local .txt file is one document. Other files, and datasets on the hub (streamed), have one
    document per record, in `config.column`. The built-in corpus holds out whole files; of other
    text, `HeldoutSplit` chooses. A document is one piece unless it has text of both sides, or more
    than 2²⁰ characters or token ids of one: so many characters are in memory at a time, if the
    format allows, as .txt does.

    Bad records are skipped and counted: null, of another type, undecodable. (Of a document in
    several pieces, those before the first undecodable byte remain.)

    Raises InputError if the dataset does not exist or is empty, and, while iterating, if a file is
    damaged, if no record has such a column, if more than the share `config.max_bad_records` are
    bad (at the end, and from 1,000 records on), or if all of the text is on the other side.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        render_chat: Callable[[list[Any]], str] | None = None,
    ) -> None:
        self.config, self.dataset, self._render_chat = config, config.dataset, render_chat
        self._split = HeldoutSplit(split, config.heldout_share)
        self._source = _open_source(config, split)
        self._position: Any = None  # of the record that is read; None: the first
        self._pieces = 0  # of that record that have been yielded
        self._read, self._bad = 0, 0  # records
        self._first_bad = ""
        self._columns: list[str] | None = None  # of text, in the first bad record
        self._any_text, self._ended = False, False

    def __iter__(self) -> Iterator[Piece]:
        skipped = self._pieces  # of the first record: those already yielded
        for position, record in self._source.read(self._position) if not self._ended else ():
            self._position, self._pieces = position, skipped
            try:
                value = self._rendered(record.value)
                for piece in islice(self._pieces_of(value), skipped, None):
                    self._pieces += 1
                    yield piece
                bad = value if isinstance(value, Bad) else None
            except UnicodeEncodeError:
                bad = Bad("it holds bytes that are not UTF-8")
            skipped = 0
            self._count(record.place, bad)
            self._check_bad(_ENOUGH_RECORDS)
        self._ended = True
        self._check_bad(1)
        if not self._any_text:
            raise InputError(
                f"DATASET {self.dataset} holds no text; give one with at least one document"
            )

    def state_dict(self) -> dict[str, Any]:
        """The position of the iteration, JSON-serializable."""
        return {name: getattr(self, f"_{name}") for name in _STATE} | {
            "lowest": self._split.lowest,
            "highest": self._split.highest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position; the next iteration starts there. Raises InputError for a state of
        version 0.2.0 or earlier, whose held-out text was chosen in another way."""
        if "position" not in state:
            raise InputError(
                "--resume needs a checkpoint of this version: an earlier one held out other text, "
                "and cannot be resumed; start over with --overwrite, or in another --out"
            )
        for name in _STATE:
            setattr(self, f"_{name}", state[name])
        self._split.lowest, self._split.highest = state["lowest"], state["highest"]

    def report(self) -> None:
        """Say what was said of the bad records up to the position, which a state may hold."""
        if self._bad:
            self._report_first()
        if self._ended:
            self._check_bad(1)

    def check_side(self) -> None:
        """Raise InputError if all of the text, which has been read, is on the other side."""
        if self.dataset != builtin.NAME:
            self._split.check_side(self.dataset)

    def _rendered(self, value: Value) -> Value | _Chat:
        """A chat with its text; token ids and text as they are; Bad for any other list. Raises
        UnicodeEncodeError if a chat's text has lone surrogates."""
        if not isinstance(value, list) or not value:
            return value
        if self._render_chat and all(isinstance(x, dict) and "role" in x for x in value):
            try:
                text = self._render_chat(value)
            except InputError:
                raise
            except Exception as error:  # of the template, which is a program of its own
                return Bad(f"the chat template refuses it: {first_line(error)}")
            text.encode()
            return _Chat(value, text)
        return Bad("it is a list neither of token ids nor of messages with a role")

    def _pieces_of(self, value: Value | _Chat) -> Iterator[Piece]:
        if isinstance(value, Bad):
            return iter(())
        if isinstance(value, _Chat):
            is_own = bool(value.text) and self._split.has_chat(value.messages)
            self._any_text |= bool(value.text)
            return pieces(segments([value.text]), lambda _: is_own)
        if isinstance(value, list):  # an empty one
            return iter(())
        if isinstance(value, np.ndarray):
            self._any_text |= len(value) > 0
            return pieces(id_segments(value), self._split.has_ids)
        return pieces(segments([value] if isinstance(value, str) else value), self._chooses)

    def _chooses(self, segment: str) -> bool:
        self._any_text = True
        return self.dataset == builtin.NAME or self._split.has_text(segment)

    def _count(self, place: str, bad: Bad | None) -> None:
        """Count a record, and report the first bad one."""
        self._read += 1
        if bad is None:
            return
        self._bad += 1
        if self._bad == 1:
            self._first_bad, self._columns = f"{place}: {bad.reason}", bad.columns
            self._report_first()

    def _report_first(self) -> None:
        _log_once(f"bad records are skipped and counted; the first is {self._first_bad}")

    def _check_bad(self, enough: int) -> None:
        """Raise InputError if, of at least `enough` records, too many are bad."""
        if not self._bad or self._read < enough:
            return
        if self._bad == self._read and self._columns is not None:
            ids = INPUT_IDS in self._columns and self.config.column != INPUT_IDS
            way_out = f"; to read its token ids, give --column {INPUT_IDS}" if ids else ""
            texts = ", ".join(name for name in self._columns if not ids or name != INPUT_IDS)
            raise InputError(
                f"--column must name a column of text in {self.dataset}, got "
                f"{self.config.column!r}; its columns of text are: "
                f"{texts or 'none'} (the first record is {self._first_bad}){way_out}"
            )
        if self._bad > self.config.max_bad_records * self._read:
            raise InputError(
                f"DATASET {self.dataset} has {self._bad:,} bad records among the first "
                f"{self._read:,}, the first being {self._first_bad}; repair or remove them, or "
                f"allow a larger share with --max_bad_records (now {self.config.max_bad_records:g})"
            )
        if self._ended:
            _log_once(f"skipped {self._bad:,} bad of {self._read:,} records of {self.dataset}")


_STATE = ("position", "pieces", "read", "bad", "first_bad", "columns", "any_text", "ended")


class _Source(Protocol):
    """Records, from any position on; positions are JSON-serializable."""

    def read(self, position: Any = None) -> Iterator[tuple[Any, Record]]: ...


class _BuiltinFiles:
    """The built-in corpus: a record per file."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def read(self, position: Any = None) -> Iterator[tuple[Any, Record]]:
        first = position or 0
        for i, text in enumerate(islice(builtin.corpus(self.split), first, None), first):
            yield i, Record(Start(i), builtin.NAME, text)


class _HubRecords:
    """The records of a dataset on the hub, streamed."""

    def __init__(self, config: DataConfig) -> None:
        from datasets import load_dataset  # takes a second to import, and most runs need it not

        self.name, self.column = config.dataset, config.column
        try:
            self._stream = load_dataset(
                self.name,
                config.dataset_config,
                split=config.dataset_split,
                revision=config.dataset_revision,
                streaming=True,
            )
        except Exception as error:  # the hub raises many kinds: not found, gated, offline, no split
            raise InputError(
                f"DATASET must be {builtin.NAME!r}, a local file or folder, or a dataset on the "
                f"hub with the split {config.dataset_split!r} (see --dataset_split and "
                f"--dataset_config), and {self.name!r} cannot be loaded: {first_line(error)}"
            ) from error

    def read(self, position: Any = None) -> Iterator[tuple[Any, Record]]:
        if position is not None:
            self._stream.load_state_dict(position)
        records = iter(self._stream)
        while True:
            position = self._stream.state_dict()
            try:
                record = next(records, None)
            except Exception as error:  # of the network, of any format
                raise InputError(
                    f"DATASET {self.name} cannot be read on: {first_line(error)}"
                ) from error
            if record is None:
                return
            yield position, Record(Start(0), self.name, wanted(record, self.column))


def is_local(config: DataConfig) -> bool:
    """Whether the text is on this machine. Raises InputError if its "~" is nobody's."""
    return config.dataset == builtin.NAME or expand_user(config.dataset).exists()


def _open_source(config: DataConfig, split: Split) -> _Source:
    path = expand_user(config.dataset)
    if config.dataset == builtin.NAME:
        _check_not_on_hub(config, "built in", "leave it out")
        return _BuiltinFiles(split)
    if not path.exists():
        return _HubRecords(config)
    way_out = "leave it out, or name the file or folder to read"
    _check_not_on_hub(config, "local", way_out, has_splits(path))
    return LocalFiles(path, config.column, config.dataset_split)


def _check_not_on_hub(config: DataConfig, place: str, way_out: str, splits: bool = False) -> None:
    """Raise InputError if `config` names a part of its dataset, which is in another `place` than
    the hub; it may name a split if it has `splits`."""
    for name in ("dataset_config", "dataset_revision", "dataset_split"):
        value = getattr(config, name)
        if not (splits and name == "dataset_split") and value != getattr(DataConfig, name):
            also = (
                " and what save_to_disk left of several splits" if name == "dataset_split" else ""
            )
            raise InputError(
                f"--{name} is for datasets on the hub{also}, and {config.dataset} is {place}, got "
                f"{value}; {way_out}"
            )


@cache  # so that the text of both sides, and every pass, report the same record once
def _log_once(message: str) -> None:
    log_rank0(message)
