"""Text → packed rows of tokens, split into train and held-out, shuffled with a seed.

Legend: B rows, T positions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import load_dataset
from torch import Tensor

from . import builtin
from .errors import InputError

Split = Literal["train", "heldout"]

_HELDOUT_EVERY = 20  # of a user's dataset, every 20th row is held out
_DOCUMENTS_AT_ONCE = 256  # tokenised together, so that the tokenizer's threads have work
_FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.zst": "json",
    ".parquet": "parquet",
}


def documents(dataset: str, split: Split, column: str = "text") -> Iterator[str]:
    """Yield the documents of `dataset`: "builtin", a local file or folder, or a name on the hub.

    A local .txt file is one document; .jsonl, .jsonl.zst and .parquet files, and datasets of the
    hub (streamed, their "train" split), have one in `column` of each record. Only the built-in
    corpus has files that are held out as such; of the others `rows` holds out every 20th row.

    Raises InputError for a dataset that does not exist or is empty, an unknown kind of file, or a
    missing column.
    """
    if dataset == builtin.NAME:
        yield from builtin.corpus(split)
        return
    path = Path(dataset).expanduser()
    if path.exists():
        kind, files = _local_files(path)
        options = {"sample_by": "document"} if kind == "text" else {}
        column = "text" if kind == "text" else column
        records: Iterable[dict[str, Any]] = load_dataset(
            kind, data_files=files, split="train", streaming=True, **options
        )
    else:
        records = _hub_records(dataset)
    empty = True
    for record in _readable(records, dataset):
        if not isinstance(record.get(column), str):
            text_columns = [name for name, value in record.items() if isinstance(value, str)]
            raise InputError(
                f"--column must name a column of text in {dataset}, got {column!r}; "
                f"its columns of text are: {', '.join(text_columns) or 'none'}"
            )
        if record[column]:
            empty = False
            yield record[column]
    if empty:
        raise InputError(f"DATASET {dataset} holds no text; give one with at least one document")


def rows(
    dataset: str,
    tokenizer: Any,
    seq_len: int,
    split: Split,
    *,
    column: str = "text",
    seed: int | None = None,
    buffer_rows: int = 4096,
) -> Iterator[Tensor]:
    """Yield rows of `seq_len` token ids, (T,) int64: one pass over the split's documents.

    Documents are joined by EOS and cut into rows; what is left at the end is shorter than a row
    and dropped. A tokenizer that begins every text with BOS has it at the start of every row, as
    the model saw it in training. With a seed, rows leave a buffer of `buffer_rows` in random
    order; the same seed gives the same order.

    Raises InputError where the whole split is shorter than one row.
    """
    packed = _packed(documents(dataset, split, column), tokenizer, seq_len)
    if dataset != builtin.NAME:
        wanted = split == "heldout"
        packed = (row for i, row in enumerate(packed) if (i % _HELDOUT_EVERY == 0) == wanted)
    first = next(packed, None)
    if first is None:
        need = seq_len if dataset == builtin.NAME or split == "heldout" else 2 * seq_len
        raise InputError(
            f"DATASET {dataset} is shorter than the {need} tokens that its {split} rows need; "
            f"give more text, or shorter rows with --seq_len (now {seq_len})"
        )
    everything = chain([first], packed)
    yield from everything if seed is None else _shuffled(everything, seed, buffer_rows)


def batches(
    dataset: str, tokenizer: Any, seq_len: int, batch_rows: int, *, column: str, seed: int
) -> Iterator[Tensor]:
    """Yield batches (B, T) of train rows without end: pass after pass, each in an order of its
    own, `seed` + the number of the pass. A batch may reach from one pass into the next."""
    passes = (
        rows(dataset, tokenizer, seq_len, "train", column=column, seed=seed + i) for i in count()
    )
    endless = chain.from_iterable(passes)
    while True:
        yield torch.stack(list(islice(endless, batch_rows)))


def not_special(input_ids: Tensor, tokenizer: Any) -> Tensor:
    """Where `input_ids` (B, T) is not a special token (EOS, BOS, padding, …): (B, T) bool.

    The residuals at special tokens are dropped, not zeroed: as zeros they would stay in every
    mean.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), device=input_ids.device)
    return ~torch.isin(input_ids, special)


def _packed(texts: Iterator[str], tokenizer: Any, seq_len: int) -> Iterator[Tensor]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "MODEL's tokenizer must have an EOS token, which joins documents, and it has none; "
            "set tokenizer.eos_token and save it with the model"
        )
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    length = seq_len - len(begin)
    rest: list[int] = []
    while some := list(islice(texts, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        rest.extend(chain.from_iterable([*ids, eos] for ids in encoded))
        whole = len(rest) // length * length
        for start in range(0, whole, length):
            yield torch.tensor(begin + rest[start : start + length])
        del rest[:whole]


def _shuffled(items: Iterator[Tensor], seed: int, size: int) -> Iterator[Tensor]:
    """Each item leaves a buffer of `size` from a random place, the next one taking it."""
    generator = random.Random(seed)
    buffer = list(islice(items, size))
    generator.shuffle(buffer)
    for item in items:
        place = generator.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = item
    yield from buffer


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


def _hub_records(name: str) -> Iterable[dict[str, Any]]:
    try:
        return load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub's many: not found, gated, offline, no such split
        raise InputError(
            f"DATASET must be {builtin.NAME!r}, a local file or folder, or a dataset on the hub "
            f"with a train split, and {name!r} cannot be had: {_first_line(error)}"
        ) from error


def _readable(records: Iterable[dict[str, Any]], dataset: str) -> Iterator[dict[str, Any]]:
    """The records; what a damaged file raises becomes one clear line."""
    try:
        yield from records
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"DATASET {dataset} cannot be read: {_first_line(error)}; repair or remove the file"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
