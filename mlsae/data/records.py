"""Read the records of a file, one at a time, from any of them on, in memory for one record.

Only the wanted column is read, so other columns may be anything.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, first_line
from .heldout_split import IntArray

INPUT_IDS = "input_ids"
"""The column in which tokenized datasets have their token ids, by convention."""

_CHUNK_CHARS = 2**20  # of a text file, read at a time
_BATCH_ROWS = 64  # of a Parquet file, read at a time: a row may be large
_BUFFER_BYTES = 2**20
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
    """One record per line; empty lines are none."""
    row, byte = start
    with _open_bytes(path, byte) as file:
        for line in file:
            if not line.isspace():
                yield Record(Start(row, byte), f"line {row + 1} of {path}", _parse(line, column))
            row, byte = row + 1, byte + len(line)


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


def read_parquet(path: Path, column: str, start: Start) -> Iterator[Record]:
    """One record per row; other columns are not even read from the disk."""
    with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
        schema, row = file.schema_arrow, 0
        present = [column] if column in schema.names else []
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if row + n_rows <= start.row:
                row += n_rows
            elif present:
                for batch in file.iter_batches(_BATCH_ROWS, [group], present):
                    yield from _read_arrow(batch.column(0), schema, path, column, row, start.row)
                    row += len(batch)
            else:
                missing = pa.nulls(n_rows)
                yield from _read_arrow(missing, schema, path, column, row, start.row)
                row += n_rows


def read_arrow(path: Path, column: str, start: Start) -> Iterator[Record]:
    """One record per row of a file in Arrow's format, either for streams or for files."""
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        n_batches = reader.num_record_batches if is_file else None
        batches = map(reader.get_batch, range(n_batches)) if n_batches is not None else reader
        row = 0
        for batch in batches:
            present = column in batch.schema.names
            values = batch.column(column) if present else pa.nulls(len(batch))
            yield from _read_arrow(values, batch.schema, path, column, row, start.row)
            row += len(batch)


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
    return _checked(record[column], column, columns)


def _checked(value: Any, column: str, columns: list[str]) -> str | list[Any] | IntArray | Bad:
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


def _csv_rows(rows: Iterator[list[str]]) -> Iterator[list[str] | Bad]:
    """The rows; Bad for one that breaks the rules of quotes."""
    while True:
        try:
            yield next(rows)
        except csv.Error as error:
            yield Bad(f"it is not CSV: {error}")
        except StopIteration:
            return


def _read_arrow(
    values: pa.Array, schema: pa.Schema, path: Path, column: str, row: int, start: int
) -> Iterator[Record]:
    """The records of consecutive rows, the first of which is number `row`, from `start` on."""
    columns = [
        field.name
        for field in schema
        if _is_text(field.type) or (field.name == INPUT_IDS and _is_list(field.type))
    ]
    for i in range(max(0, start - row), len(values)):
        place = f"row {row + i + 1} of {path}"
        value: Value | None
        if column not in schema.names:
            value = Bad(f"it has no column {column!r}", columns)
        else:
            try:
                value = _ids(values[i])
                if value is None:
                    value = _checked(values[i].as_py(), column, columns)
            except UnicodeDecodeError:
                value = Bad("it holds bytes that are not UTF-8")
        yield Record(Start(row + i), place, value)


def _ids(value: pa.Scalar) -> IntArray | None:
    """The integers of a list, without a Python object for each; None if it is no such list."""
    if not _is_list(value.type) or not pa.types.is_integer(value.type.value_type):
        return None
    if value.values is None or value.values.null_count:
        return None
    return np.asarray(value.values)


def _is_list(arrow_type: pa.DataType) -> bool:
    return any(
        is_kind(arrow_type)
        for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    )


def _is_text(arrow_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return any(
        is_kind(arrow_type)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


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
