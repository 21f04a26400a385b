"""The files that a local DATASET names, and the records in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, first_line
from .columnar import read_arrow, read_parquet
from .records import (
    Reader,
    Record,
    Start,
    raise_unreadable,
    read_csv,
    read_json,
    read_jsonl,
    read_text,
)

_KINDS: dict[str, tuple[str, Reader]] = {
    ".txt": ("text", read_text),
    ".jsonl": ("json", read_jsonl),
    ".json": ("json", read_json),
    ".csv": ("csv", read_csv),
    ".parquet": ("parquet", read_parquet),
    ".arrow": ("arrow", read_arrow),
}
"""The kind and the reader of a file by the end of its name."""

_COMPRESSED = tuple(
    kind + compression
    for kind in (".txt", ".jsonl", ".json", ".csv")
    for compression in (".gz", ".zst")
)
_ABOUT_DATASETS = {  # files about a dataset, beside it
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
}


class LocalFiles:
    """The records of a file, or of a folder's files in the order of their names.

    A folder may have folders in it. Hidden files are not read (names with . ~ or # first), nor
    hidden folders (with . or _ first), where programs keep what is temporary. Of a folder that
    `datasets.save_to_disk` left, the files that it lists are read, of several splits those of
    `split`.

    Raises InputError if files are of no known kind or of several, if all are empty, and, while
    reading, if one is damaged.
    """

    def __init__(self, path: Path, column: str, split: str = "train") -> None:
        self.path, self.column = path, column
        self._files = _saved_files(path, split) or _readable_files(path)
        kinds = sorted({_kind(file)[0] for file in self._files})
        if len(kinds) != 1:
            raise InputError(
                f"DATASET must be a file or a folder of one kind of {', '.join(_KINDS)} "
                "(.txt, .jsonl, .json and .csv also with .gz or .zst), "
                f"got {path}, which has {' and '.join(kinds) or 'none of them'}; "
                "convert it, or give the name of a dataset on the hub"
            )
        if not any(file.stat().st_size for file in self._files):
            raise InputError(f"DATASET {path} is empty; give one with at least one document")

    def read(self, position: Any = None) -> Iterator[tuple[Any, Record]]:
        """The records from `position` on, each with its position, which is JSON-serializable."""
        first, row, byte = position or (0, 0, 0)
        for number in range(first, len(self._files)):
            path = self._files[number]
            start = Start(row, byte) if number == first else Start(0)
            with raise_unreadable(path):
                for record in _kind(path)[1](path, self.column, start):
                    yield [number, *record.start], record

    def stats(self) -> list[tuple[str, int, int]]:
        """The names of the files, relative to a folder, their sizes and times of change."""
        stats = [(file, file.stat()) for file in self._files]
        return [
            (file.relative_to(self.path).as_posix(), stat.st_size, stat.st_mtime_ns)
            for file, stat in stats
        ]


def has_splits(path: Path) -> bool:
    """Whether `path` is what `datasets.save_to_disk` left of several splits."""
    return (path / "dataset_dict.json").is_file()


def _kind(path: Path) -> tuple[str, Reader]:
    """The kind and the reader of a file of this name. Raises KeyError if it is of no kind."""
    name = path.name.lower()
    suffix = Path(name).suffix
    return _KINDS[Path(name.removesuffix(suffix)).suffix if name.endswith(_COMPRESSED) else suffix]


def _is_known(path: Path) -> bool:
    suffix = path.suffix.lower()
    return path.name.lower().endswith(_COMPRESSED) or suffix in _KINDS


def _readable_files(path: Path) -> list[Path]:
    """The files of known kinds, of a file itself or of a folder."""
    if path.is_file():
        return [path] if _is_known(path) else []
    return [
        file
        for file in sorted(path.rglob("*"))
        if _is_known(file)
        and file.name not in _ABOUT_DATASETS
        and not file.name.startswith((".", "~", "#"))
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts[:-1])
        and file.is_file()
    ]


def _saved_files(path: Path, split: str) -> list[Path]:
    """The files of a folder that `datasets.save_to_disk` left; none if it is not such a folder."""
    if has_splits(path):
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise InputError(
                f"--dataset_split must be a split of {path} ({', '.join(splits)}), got {split!r}"
            )
        path = path / split
    if not (path / "state.json").is_file() or not (path / "dataset_info.json").is_file():
        return []
    state = json.loads((path / "state.json").read_text())
    return [path / file["filename"] for file in state["_data_files"]]


def expand_user(dataset: str) -> Path:
    """The path with a home directory in place of "~". Raises InputError if there is none."""
    try:
        return Path(dataset).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"DATASET must be a path or a name, got {dataset!r}: {first_line(error)}"
        ) from error
