"""Where text comes from: the built-in corpus, local files, a dataset on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from datasets import IterableDataset, load_dataset

from .. import builtin
from ..errors import InputError, first_line

Split = Literal["train", "heldout"]

_FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.zst": "json",
    ".parquet": "parquet",
}


class Documents:
    """The documents of `dataset`, in order: "builtin", a local file or folder, or a name on the
    hub. Iterating again goes on where it stopped, also from a `state_dict`.

    A local .txt file is one document; .jsonl, .jsonl.zst and .parquet files, and datasets of the
    hub (streamed, their "train" split), have one in `column` of each record. Only the built-in
    corpus has files that are held out as such; of the others `data.Rows` holds out rows.

    Raises InputError for a dataset that does not exist or is empty, an unknown kind of file, or,
    while iterating, a missing column.
    """

    def __init__(self, dataset: str, split: Split, column: str = "text") -> None:
        self.dataset, self.column = dataset, column
        self._empty = True
        path = Path(dataset).expanduser()
        if dataset == builtin.NAME:
            self.column = "text"
            self._records = IterableDataset.from_generator(_corpus, gen_kwargs={"split": split})
        elif path.exists():
            kind, files = _local_files(path)
            options = {"sample_by": "document"} if kind == "text" else {}
            self.column = "text" if kind == "text" else column
            self._records = load_dataset(
                kind, data_files=files, split="train", streaming=True, **options
            )
        else:
            self._records = _hub_records(dataset)

    def __iter__(self) -> Iterator[str]:
        for record in self._readable():
            text = record.get(self.column)
            if not isinstance(text, str):
                names = [name for name, value in record.items() if isinstance(value, str)]
                raise InputError(
                    f"--column must name a column of text in {self.dataset}, got {self.column!r}; "
                    f"its columns of text are: {', '.join(names) or 'none'}"
                )
            if text:
                self._empty = False
                yield text
        if self._empty:
            raise InputError(
                f"DATASET {self.dataset} holds no text; give one with at least one document"
            )

    def state_dict(self) -> dict[str, Any]:
        """How far the iteration has come, as JSON has it."""
        return {"records": self._records.state_dict(), "empty": self._empty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next iteration."""
        self._records.load_state_dict(state["records"])
        self._empty = state["empty"]

    def _readable(self) -> Iterator[dict[str, Any]]:
        """The records; what a damaged file raises becomes one clear line."""
        try:
            yield from self._records
        except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"DATASET {self.dataset} cannot be read: {first_line(error)}; "
                "repair or remove the file"
            ) from error


def _corpus(split: Split) -> Iterator[dict[str, str]]:
    for text in builtin.corpus(split):
        yield {"text": text}


def _format(path: Path) -> str | None:
    """Which of `datasets`' loaders reads a file of this name."""
    return _FORMATS.get("".join(path.suffixes[-2:]).lower()) or _FORMATS.get(path.suffix.lower())


def _local_files(path: Path) -> tuple[str, list[str]]:
    """The loader's name and the files to read, of a file or a folder."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    kinds = sorted({kind for file in files if (kind := _format(file))})
    if len(kinds) != 1:
        raise InputError(
            f"DATASET must be a file or a folder of one kind of {', '.join(_FORMATS)}, "
            f"got {path}, which has {' and '.join(kinds) or 'none of them'}; "
            "convert it, or give the name of a dataset on the hub"
        )
    chosen = [str(file) for file in files if _format(file)]
    if not any(Path(file).stat().st_size for file in chosen):
        raise InputError(f"DATASET {path} is empty; give one with at least one document")
    return kinds[0], chosen


def _hub_records(name: str) -> IterableDataset:
    try:
        return load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub's many: not found, gated, offline, no such split
        raise InputError(
            f"DATASET must be {builtin.NAME!r}, a local file or folder, or a dataset on the hub "
            f"with a train split, and {name!r} cannot be had: {first_line(error)}"
        ) from error
