"""Read documents from the built-in corpus, local files, or a dataset on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from datasets import IterableDataset, load_dataset

from .. import builtin
from ..errors import InputError, first_line

Split = Literal["train", "heldout"]

_LOADERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.zst": "json",
    ".parquet": "parquet",
}
"""The loader of `datasets` by the end of a file's name."""


class Documents:
    """The documents of `dataset`, in order. `dataset` is "builtin", a local file or folder, or the
    name of a dataset on the hub. Iterating again resumes where the last iteration stopped, or
    where a loaded `state_dict` was taken.

    A local .txt file is one document. Files in .jsonl, .jsonl.zst and .parquet, and datasets on the
    hub (streamed, their "train" split), have one document per record, in `column`. `split` matters
    to the built-in corpus only, which holds out whole files; of other datasets, `tokens.Rows` holds
    out rows.

    Raises InputError if the dataset does not exist or is empty, if a file is of an unknown kind,
    and, while iterating, if a record has no such column.
    """

    def __init__(self, dataset: str, split: Split, column: str = "text") -> None:
        self.dataset, self.column = dataset, column
        self._empty = True
        path = _expand_user(dataset)
        if dataset == builtin.NAME:
            self.column = "text"
            self._records = IterableDataset.from_generator(
                _builtin_records, gen_kwargs={"split": split}
            )
        elif path.exists():
            loader, files = _local_files(path)
            options = {"sample_by": "document"} if loader == "text" else {}
            self.column = "text" if loader == "text" else column
            self._records = load_dataset(
                loader, data_files=files, split="train", streaming=True, **options
            )
        else:
            self._records = _hub_records(dataset)

    def __iter__(self) -> Iterator[str]:
        for record in self._read_records():
            text = record.get(self.column)
            if not isinstance(text, str):
                columns = [name for name, value in record.items() if isinstance(value, str)]
                raise InputError(
                    f"--column must name a column of text in {self.dataset}, got {self.column!r}; "
                    f"its columns of text are: {', '.join(columns) or 'none'}"
                )
            if text:
                self._empty = False
                yield text
        if self._empty:
            raise InputError(
                f"DATASET {self.dataset} holds no text; give one with at least one document"
            )

    def state_dict(self) -> dict[str, Any]:
        """The position of the iteration, JSON-serializable."""
        return {"records": self._records.state_dict(), "empty": self._empty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position; the next iteration starts there."""
        self._records.load_state_dict(state["records"])
        self._empty = state["empty"]

    def _read_records(self) -> Iterator[dict[str, Any]]:
        """Yield the records. Raises InputError if a file is damaged."""
        try:
            yield from self._records
        except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"DATASET {self.dataset} cannot be read: {first_line(error)}; "
                "repair or remove the file"
            ) from error


def _builtin_records(split: Split) -> Iterator[dict[str, str]]:
    for text in builtin.corpus(split):
        yield {"text": text}


def _expand_user(dataset: str) -> Path:
    """The path with a home directory in place of "~". Raises InputError if there is none."""
    try:
        return Path(dataset).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"DATASET must be a path or a name, got {dataset!r}: {first_line(error)}"
        ) from error


def _loader_of(path: Path) -> str | None:
    """The loader of `datasets` that reads a file of this name, or None."""
    return _LOADERS.get("".join(path.suffixes[-2:]).lower()) or _LOADERS.get(path.suffix.lower())


def _local_files(path: Path) -> tuple[str, list[str]]:
    """The loader and the files it reads, for `path`, a file or a folder."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    loaders = sorted({loader for file in files if (loader := _loader_of(file))})
    if len(loaders) != 1:
        raise InputError(
            f"DATASET must be a file or a folder of one kind of {', '.join(_LOADERS)}, "
            f"got {path}, which has {' and '.join(loaders) or 'none of them'}; "
            "convert it, or give the name of a dataset on the hub"
        )
    readable = [str(file) for file in files if _loader_of(file)]
    if not any(Path(file).stat().st_size for file in readable):
        raise InputError(f"DATASET {path} is empty; give one with at least one document")
    return loaders[0], readable


def _hub_records(name: str) -> IterableDataset:
    try:
        return load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub raises many kinds: not found, gated, offline, no split
        raise InputError(
            f"DATASET must be {builtin.NAME!r}, a local file or folder, or a dataset on the hub "
            f"with a train split, and {name!r} cannot be loaded: {first_line(error)}"
        ) from error
