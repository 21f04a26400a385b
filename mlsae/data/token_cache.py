"""Packed rows of tokens on disk, so that a text is tokenized once.

An entry is a folder, named for what decides its rows (see `cache_key`). It has the rows of one pass
in the order of the text, in chunks:

    00000.tokens    rows (B, T), then the tokens that are in no row yet (R,): uint16 where ids fit,
                    else int32
    00000.json      {rows: B, rest: R, crc: CRC-32 of the above, documents, ended}: where the text
                    is read on, a `Documents.state_dict()`, and whether it is at its end
    entry.json      what decides the rows, for people to read; its time is that of the last use

A chunk counts once its .json is there, which is renamed into place last. So an entry may be of a
part of the text, wherever its writer was killed; the next one goes on after the last chunk. One
process at a time writes, by a lock of the operating system; others read what is there.
"""

from __future__ import annotations

import json
import shutil
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from ..distributed import log_rank0
from ..errors import first_line
from ..files import write_file
from .packing import Block

MOST_BYTES = 2**35
"""Of all entries in a cache, 34 GB. Beyond, those that were not used for longest are removed."""

_LEAST_FREE = 2**31  # bytes of the disk, which are left to others
_CHUNK_TOKENS = 2**20
_LOCK, _ABOUT = ".lock", "entry.json"


class Chunk(NamedTuple):
    """What a chunk's .json says."""

    rows: int
    rest: int
    crc: int
    documents: dict[str, Any]
    ended: bool


class DamagedError(Exception):
    """A chunk is not as it was written."""


class Entry:
    """The rows of T = `seq_len` tokens, ids up to `largest_id`, in the folder `name` of the cache
    `root`. `about` says what they are of."""

    def __init__(
        self, root: Path, name: str, seq_len: int, largest_id: int, about: dict[str, Any]
    ) -> None:
        self.root, self.folder, self.seq_len, self.about = root, root / name, seq_len, about
        self.dtype: Any = np.dtype(np.uint16 if largest_id < 2**16 else np.int32)
        self.chunks: list[Chunk] = []
        self.scan()
        if self.chunks:
            with suppress(OSError):
                (self.folder / _ABOUT).touch()

    def path(self, number: int, kind: str) -> Path:
        """The file of a chunk, of `kind` "tokens" or "json"."""
        return self.folder / f"{number:05}.{kind}"

    def scan(self) -> None:
        """Find the chunks that another process has written meanwhile."""
        with suppress(OSError, ValueError, TypeError):  # there is no such chunk, or it is no use
            while True:
                content = json.loads(self.path(len(self.chunks), "json").read_text())
                self.chunks.append(Chunk(**content))

    def read(self, number: int) -> tuple[Block, dict[str, Any]]:
        """The rows (B, T) of a chunk, and the packer's state after them. Raises DamagedError."""
        chunk, path = self.chunks[number], self.path(number, "tokens")
        try:
            empty = path.stat().st_size == 0  # which cannot be mapped
            tokens = np.empty(0, self.dtype) if empty else np.memmap(path, self.dtype, mode="r")
        except (OSError, ValueError) as error:
            raise DamagedError(first_line(error)) from error
        n_tokens = chunk.rows * self.seq_len
        if len(tokens) != n_tokens + chunk.rest:
            raise DamagedError(f"{path.name} has another size")
        if zlib.crc32(tokens.data) != chunk.crc:
            raise DamagedError(f"the checksum of {path.name} differs")
        rest = torch.from_numpy(tokens[n_tokens:].astype(np.int32))
        rows = np.asarray(tokens[:n_tokens]).reshape(chunk.rows, self.seq_len)
        return rows, {"documents": chunk.documents, "rest": rest}

    def drop(self, number: int, error: DamagedError) -> None:
        """Remove the chunks from `number` on, which is damaged, unless another process writes."""
        log_rank0(f"token cache: {self.folder} is damaged ({error}); made anew from there on")
        last, self.chunks = len(self.chunks), self.chunks[:number]
        lock = _acquired(self.folder)
        if lock is not None:
            with lock, suppress(OSError):
                for later in reversed(range(number, last)):
                    self.path(later, "json").unlink()
                    self.path(later, "tokens").unlink(missing_ok=True)

    def writer(self) -> Writer | None:
        """What writes the chunks that follow. None if another process does, or has meanwhile."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = _acquired(self.folder)
            if lock is None:
                return None
            known = len(self.chunks)
            self.scan()
            if len(self.chunks) == known:
                return Writer(self, lock)
            lock.release()
            return None
        except OSError as error:  # the lock ends with its object
            _say_off(self.root, first_line(error))
            return None


class Writer:
    """Writes chunks to an entry, which it holds by `lock`. No error of the disk is raised: a line
    says it, and no more is written."""

    def __init__(self, entry: Entry, lock: FileLock) -> None:
        self.entry, self._lock = entry, lock
        self._blocks: list[Block] = []  # to be written
        self._others = make_room(entry)
        self._own = _size(entry.folder)
        write_file(entry.folder / _ABOUT, json.dumps(entry.about, indent=1).encode())

    def add(self, rows: Block, state: dict[str, Any]) -> None:
        """Write the rows that follow, in chunks; the packer's `state` is that after them."""
        self._blocks.append(rows.astype(self.entry.dtype))
        if sum(block.size for block in self._blocks) >= _CHUNK_TOKENS:
            self.flush(state)

    def flush(self, state: dict[str, Any], ended: bool = False) -> None:
        """Write the chunk of what was added so far; with `ended`, the last one of the text."""
        if not self._lock.is_locked or not (self._blocks or ended):
            return
        try:
            self._write(state, ended)
        except OSError as error:
            _say_off(self.entry.root, first_line(error))
            self.close()

    def close(self) -> None:
        """Let other processes write."""
        self._blocks = []
        self._lock.release()

    def _write(self, state: dict[str, Any], ended: bool) -> None:
        entry, number = self.entry, len(self.entry.chunks)
        rest = state["rest"].numpy().astype(entry.dtype)
        parts = [*(block.ravel() for block in self._blocks), rest]
        tokens = np.concatenate(parts, dtype=entry.dtype)
        rows = sum(map(len, self._blocks))
        chunk = Chunk(rows, len(rest), zlib.crc32(tokens.data), state["documents"], ended)
        about = json.dumps(chunk._asdict()).encode()
        self._own += tokens.nbytes + len(about)
        if self._others + self._own > MOST_BYTES:
            self._others = make_room(entry, self._own)
        free = shutil.disk_usage(entry.folder).free
        if free - tokens.nbytes < _LEAST_FREE:
            raise OSError(f"its disk has {free / 1e9:.1f} GB free, of which 2.1 are left to others")
        _replace(entry.path(number, "tokens"), tokens.data)
        _replace(entry.path(number, "json"), about)
        _say_where(entry.root)
        entry.chunks.append(chunk)
        self._blocks = []


def make_room(entry: Entry, needed: int = 0) -> int:
    """Remove other entries, those not used for longest first, until they and the `needed` bytes of
    `entry` are within the bound: the bytes of those that stay.

    Raises OSError if there is no room though no other entry is left that could be removed.
    """
    others = [path for path in entry.root.iterdir() if path.is_dir() and path != entry.folder]
    sizes = {path: _size(path) for path in sorted(others, key=_last_use)}
    for path in list(sizes):
        if sum(sizes.values()) + needed <= MOST_BYTES:
            break
        lock = _acquired(path)
        if lock is not None:
            log_rank0(
                f"token cache: {path} is removed, as the one not used for longest, to keep "
                f"{entry.root} within {MOST_BYTES / 1e9:.0f} GB"
            )
            with lock:
                for file in sorted(path.glob("*.json")):  # then no chunk counts that is cut short
                    file.unlink()
                shutil.rmtree(path, ignore_errors=True)
            del sizes[path]
    if sum(sizes.values()) + needed > MOST_BYTES:
        raise OSError(f"it may have {MOST_BYTES / 1e9:.0f} GB, and this text needs more")
    return sum(sizes.values())


def _acquired(folder: Path) -> FileLock | None:
    """The lock of an entry, held; None if another process holds it. Raises OSError."""
    lock = FileLock(folder / _LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all. It is not synced: after a power cut its checksum tells."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _size(folder: Path) -> int:
    with suppress(OSError):  # another process removes it
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _last_use(folder: Path) -> float:
    with suppress(OSError):
        return (folder / _ABOUT).stat().st_mtime
    return 0.0


@cache
def _say_where(root: Path) -> None:
    log_rank0(
        f"token cache: the next run reads the tokens of this text from {root} (at most "
        f"{MOST_BYTES / 1e9:.0f} GB; another place with --token_cache, none with --no_token_cache)"
    )


@cache
def _say_off(root: Path, reason: str) -> None:
    log_rank0(f"token cache: {root} is not written to ({reason}); the run goes on without")
