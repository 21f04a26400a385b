"""Read the records of Parquet and Arrow files, one at a time, from any of them on.

No integer of a list becomes a Python object, and no long text a string as a whole. Of a cell of
a Parquet file, Arrow holds the page, decompressed, and the value, copied from it (and a copy of the
dictionary, if the page is one).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .heldout_split import IntArray
from .records import INPUT_IDS, Bad, Record, Start, Value, checked

_BATCH_ROWS = 64  # of a Parquet file, read at a time
_BATCH_BYTES = 2**24  # fewer rows, if they take more
_BUFFER_BYTES = 2**20
_PART_BYTES = 2**20  # of a text: a longer one is decoded in parts


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
                rows_at_once = _rows_at_once(file.metadata.row_group(group), column)
                for batch in file.iter_batches(rows_at_once, [group], present):
                    yield from _read_arrow(batch.column(0), schema, path, column, row, start.row)
                    row += len(batch)
                    del batch  # before the next one is read: it may hold a gigabyte
            else:
                missing = pa.nulls(n_rows)
                yield from _read_arrow(missing, schema, path, column, row, start.row)
                row += n_rows


def _rows_at_once(group: pq.RowGroupMetaData, column: str) -> int:
    """Rows of about _BATCH_BYTES of the column, _BATCH_ROWS at most."""
    chunks = map(group.column, range(group.num_columns))
    n_bytes = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.split(".")[0] == column
    )
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, n_bytes)))


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
                value = _long_text(values, i)
                if value is None:
                    value = _ids(values[i])
                if value is None:
                    value = checked(values[i].as_py(), column, columns)
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


def _long_text(values: pa.Array, i: int) -> Iterator[str] | None:
    """The text of row i in parts, if it is a long one, decoded from Arrow's memory as they are
    wanted; a scalar would copy it. None if it is none. Raises UnicodeDecodeError if it is not
    UTF-8, to its end."""
    if values.type not in (pa.string(), pa.large_string()) or not values[i : i + 1].is_valid()[0]:
        return None
    _, offsets, content = values.buffers()
    dtype: Any = np.dtype(np.int32 if values.type == pa.string() else np.int64)
    start, end = map(int, np.frombuffer(offsets, dtype, 2, (values.offset + i) * dtype.itemsize))
    if end - start <= _PART_BYTES:
        return None
    text = content.slice(start, end - start)
    for _ in _decoded(text):
        pass
    return _decoded(text)


def _decoded(text: pa.Buffer) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, text.size, _PART_BYTES):
        part = text.slice(start, min(_PART_BYTES, text.size - start))
        yield decoder.decode(memoryview(part), start + part.size == text.size)


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
