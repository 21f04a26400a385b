"""Read the records of a file, one at a time, from any of them on, in memory for one record, or for
a part of it where it is a long text. Those of Parquet and Arrow are in `columnar`.

Only the wanted column is read, so other columns may be anything.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import InputError, first_line
from .heldout_split import IntArray
from .long_lines import NotTextError, last_text, parts_of_text

INPUT_IDS = "input_ids"
"""The column in which tokenized datasets have their token ids, by convention."""

_CHUNK_CHARS = 2**20  # of a text file, read at a time
_BUFFER_BYTES = 2**20
_LONG_LINE = 2**24  # bytes of JSON: a longer one is not held whole
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Start(NamedTuple):
    """Where a record begins in its file."""

    row: int
    """Its number, from 0: of a line in JSONL."""
    byte: int = 0
    """Bytes before it, uncompressed, where known: in JSONL."""


class Bad(NamedTuple):
    """What stands for the value of a record that has none."""

    reason: str
    columns: list[str] | None = None
    """Columns of the record that hold text, and `input_ids`, if the wanted one is missing or holds
    something else. None: the record cannot be read at all."""


Value = str | list[Any] | IntArray | Iterator[str] | Bad
"""What a record has in the wanted column: a text, or an iterator over its parts if it is long; a
list, or an array if it is of integers only; else Bad."""


class Record(NamedTuple):
    """A value of the wanted column, and where it is."""

    start: Start
    place: str
    value: Value


Reader = Callable[[Path, str, Start], Iterator[Record]]
"""(file, column, start) → its records from `start` on. Raises OSError or ValueError if the file is
damaged."""


def read_text(path: Path, _column: str, start: Start) -> Iterator[Record]:
    """A text file is one record. Bytes that are not UTF-8 become lone surrogates."""
    if start.row == 0:
        with _open_text(path, newline=None) as file:
            yield Record(start, str(path), _read_parts(file, path))


def read_jsonl(path: Path, column: str, start: Start) -> Iterator[Record]:
    """One record per line; empty lines are none. The text of a long line comes in parts."""
    row, byte = start
    with _open_bytes(path, byte) as file:
        while line := file.readline(_LONG_LINE):
            place, size = f"line {row + 1} of {path}", len(line)
            if size == _LONG_LINE and not line.endswith(b"\n"):
                size, value = _read_long(file, line, path, byte, column)
                if value is not None:
                    yield Record(Start(row, byte), place, value)
            elif not line.isspace():
                yield Record(Start(row, byte), place, _parse(line, column))
            row, byte = row + 1, byte + size


def read_json(path: Path, column: str, start: Start) -> Iterator[Record]:
    """One array of objects (or of texts), which is held in memory; or else as JSONL."""
    with _open_bytes(path) as file:
        is_array = file.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        records = json.loads(file.read()) if is_array else []
    if not is_array:
        yield from read_jsonl(path, column, start)
    for row in range(start.row, len(records)):
        record = records[row]
        value = record if isinstance(record, str) else wanted(record, column)
        yield Record(Start(row), f"record {row + 1} of {path}", value)


def read_csv(path: Path, column: str, start: Start) -> Iterator[Record]:
    """One record per row; the first row names the columns."""
    csv.field_size_limit(2**31 - 1)  # its default of 2¹⁷ is less than a long text
    with _open_text(path, newline="") as file:
        rows = csv.reader(file, strict=True)
        names = [name.removeprefix("\ufeff") for name in next(rows, [])]
        skipped = sum(1 for _ in islice(_csv_rows(rows), start.row))
        for row, cells in enumerate(_csv_rows(rows), skipped):
            place = f"record {row + 1} of {path}, which ends in line {rows.line_num}"
            if isinstance(cells, Bad):
                yield Record(Start(row), place, cells)
            elif cells:
                yield Record(
                    Start(row), place, wanted(dict(zip(names, cells, strict=False)), column)
                )


def wanted(record: Any, column: str) -> str | list[Any] | IntArray | Bad:
    """What `record` holds in `column`, if it is a text or a list."""
    if not isinstance(record, Mapping):
        return Bad(f"it is {_kind(record)}, not an object with columns")
    columns = [
        name
        for name, value in record.items()
        if isinstance(value, str) or (name == INPUT_IDS and isinstance(value, list | np.ndarray))
    ]
    if column not in record:
        return Bad(f"it has no column {column!r}", columns)
    return checked(record[column], column, columns)


def checked(value: Any, column: str, columns: list[str]) -> str | list[Any] | IntArray | Bad:
    if isinstance(value, list) and value and all(type(x) is int for x in value):
        return _as_array(value)
    if isinstance(value, str | list):
        return value
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer):
        return value
    return Bad(f"its {column!r} is {_kind(value)}, not text", columns)


def _as_array(ids: list[int]) -> IntArray:
    try:
        return np.asarray(ids, np.int64)
    except OverflowError:  # no tokenizer has such an id: the reader of ids says so
        return np.asarray(ids, object)


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _read_parts(file: io.TextIOWrapper, path: Path) -> Iterator[str]:
    with raise_unreadable(path):
        yield from iter(lambda: file.read(_CHUNK_CHARS), "")


@contextmanager
def raise_unreadable(path: Path) -> Iterator[None]:
    """Raise InputError if the file `path` is damaged."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"DATASET {path} cannot be read: {first_line(error)}; repair or remove the file"
        ) from error


def _parse(line: bytes, column: str) -> str | list[Any] | IntArray | Bad:
    try:
        return wanted(json.loads(line), column)
    except UnicodeDecodeError:
        return Bad("it holds bytes that are not UTF-8")
    except (ValueError, RecursionError) as error:
        return Bad(f"it is not JSON: {error}")


def _read_long(
    file: io.BufferedReader, begun: bytes, path: Path, byte: int, column: str
) -> tuple[int, Value | None]:
    """How many bytes the line at `byte` of `path` has, and its value, None if it is empty. `file`
    has read what the line has `begun` with, and reads it to its end. A text is read once more, as
    its parts are wanted; a line of anything else is held."""
    size = 0

    def chunks() -> Iterator[bytes]:
        nonlocal size
        for chunk in chain([begun], _chunks_of_line(file)):
            size += len(chunk)
            yield chunk

    line = chunks()
    try:
        which = last_text(line, column)
    except NotTextError:
        which = None
    for _ in line:
        pass
    if which is not None:
        return size, _parts_of_text(path, byte, column, which)
    with _open_bytes(path, byte) as again:
        whole = again.readline()
        return size, None if whole.isspace() else _parse(whole, column)


def _parts_of_text(path: Path, byte: int, column: str, which: int) -> Iterator[str]:
    with raise_unreadable(path), _open_bytes(path, byte) as file:
        yield from parts_of_text(_chunks_of_line(file), column, which)


def _chunks_of_line(file: io.BufferedReader) -> Iterator[bytes]:
    chunk = b""
    while not chunk.endswith(b"\n") and (chunk := file.readline(_BUFFER_BYTES)):
        yield chunk


def _csv_rows(rows: Iterator[list[str]]) -> Iterator[list[str] | Bad]:
    """The rows; Bad for one that breaks the rules of quotes."""
    while True:
        try:
            yield next(rows)
        except csv.Error as error:
            yield Bad(f"it is not CSV: {error}")
        except StopIteration:
            return


def _open_bytes(path: Path, byte: int = 0) -> io.BufferedReader:
    """The file's uncompressed bytes from `byte` on. A truncated file raises OSError at its end."""
    compression = _COMPRESSIONS.get(path.suffix.lower())
    file = io.BufferedReader(
        pa.input_stream(str(path), compression=compression),
        _BUFFER_BYTES,
    )
    if compression is None:
        file.seek(byte)
        return file
    while byte > 0:
        skipped = len(file.read(min(byte, _BUFFER_BYTES)))
        if not skipped:
            break
        byte -= skipped
    return file


def _open_text(path: Path, newline: str | None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open_bytes(path), "utf-8", "surrogateescape", newline)
