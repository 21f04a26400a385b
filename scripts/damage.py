"""Ways to damage a file that the programs read, for `scripts.fuzz`: as bytes, and as what it holds.

Each takes a `random.Random` and changes the file in place; it returns what it did, in words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor

WRONG = (
    None, True, -1, 0, 1, 3.5, 10**30, float("nan"), float("inf"), "", "x", "1", [], [None], [1, 1],
    [-1], ["0"], [[]], {}, {"x": 1},
)  # fmt: skip
"""JSON values, each of them wrong in most places."""


def damage(random: Random, path: Path) -> str:
    """Damage the file at `path`: what it holds, if that is understood, else its bytes."""
    held = HELD.get(path.suffix)
    try:
        how = held(random, path) if held and random.random() < 0.75 else _bytes(random, path)
    except Exception:  # it is damaged already, so that it does not even load
        how = _bytes(random, path)
    return f"{path.name}: {how}"


def _bytes(random: Random, path: Path) -> str:
    content = path.read_bytes() if path.is_file() else b""
    how = random.choice(("missing", "empty", "cut", "longer", "noise", "flipped", "folder", "loop"))
    path.unlink(missing_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    elif how != "missing":
        flipped = bytearray(content)
        for _ in range(8 if content else 0):
            flipped[random.randrange(min(len(content), 400))] ^= 1 << random.randrange(8)
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[: random.randrange(len(content) + 1)],
                "longer": content + b"\x00\xff{",
                "noise": random.randbytes(100),
                "flipped": bytes(flipped),
            }[how]
        )
    return how


def _json(random: Random, path: Path) -> str:
    content = json.loads(path.read_text())
    how = _change(random, content)
    path.write_text(json.dumps(content))
    return how


def _jsonl(random: Random, path: Path) -> str:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    i = random.randrange(len(lines))
    if random.random() < 0.2:
        lines[i], how = random.choice(WRONG), "not an object"
    else:
        how = _change(random, lines[i])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"line {i + 1}: {how}"


def _change(random: Random, content: Any) -> str:
    """Replace, remove or add a value somewhere in JSON `content`."""
    place, name = content, ""
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            place.append(random.choice(WRONG)) if isinstance(place, list) else place.update(x=1)
            return f"{name}: one more"
        key = random.choice(keys)
        name += f".{key}" if name else str(key)
        if isinstance(place[key], dict | list) and random.random() < 0.6:
            place = place[key]
            continue
        if random.random() < 0.3:
            del place[key]
            return f"no {name}"
        place[key] = random.choice(WRONG)
        return f"{name} = {place[key]!r}"


def _safetensors(random: Random, path: Path) -> str:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    how = _change_tensors(random, tensors)
    safetensors.torch.save_file(tensors, path, metadata)
    return how


def _pickle(random: Random, path: Path) -> str:
    content = torch.load(path, weights_only=True)
    if random.random() < 0.4:
        name = random.choice(list(content))
        content[name] = random.choice((None, 3, "x", [], {}, {1: 2}, torch.zeros(2, 2)))
        how = f"{name} = {content[name]!r}"
    else:
        how = _change_tensors(random, content)
    torch.save(content, path)
    return how


def _change_tensors(random: Random, tensors: dict[str, Any]) -> str:
    name = random.choice([name for name, value in tensors.items() if isinstance(value, Tensor)])
    tensor = tensors.pop(name)
    changes: dict[str, Callable[[], Tensor]] = {
        "NaN": lambda: torch.full_like(tensor.float(), torch.nan),
        "infinite": lambda: torch.full_like(tensor.float(), torch.inf),
        "all 0": lambda: torch.zeros_like(tensor),
        "negative": lambda: -tensor.abs() - 1,
        "transposed": lambda: tensor.T.contiguous() if tensor.ndim == 2 else tensor[None],
        "shorter": lambda: tensor[1:].clone() if tensor.ndim else tensor[None],
        "without elements": lambda: torch.empty(0, *tensor.shape[1:]),
        "half precision": lambda: tensor.half(),
        "8-bit": lambda: tensor.to(torch.float8_e4m3fn),
        "integers": lambda: tensor.long(),
        "complex": lambda: tensor.to(torch.complex64),
    }
    how = random.choice([*changes, "missing", "one more", "renamed"])
    if how in changes:
        tensors[name] = changes[how]()
    elif how == "one more":
        tensors |= {name: tensor, "extra": torch.zeros(3)}
    elif how == "renamed":
        tensors[name + "_"] = tensor
    return f"{name}: {how}"


def _parquet(random: Random, path: Path) -> str:
    table = pq.read_table(path)
    name = random.choice(table.column_names)
    i, column = table.column_names.index(name), table[name]
    how = random.choice(("no column", "null", "text", "negative", "huge", "fewer rows", "no rows"))
    changed: Any = {
        "null": lambda: pa.nulls(len(column), column.type),
        "text": lambda: pa.array(["x"] * len(column)),
        "negative": lambda: pa.array([-1] * len(column)),
        "huge": lambda: pa.array([10**9] * len(column)),
    }
    if how in changed:
        table = table.set_column(i, name, changed[how]())
    elif how == "no column":
        table = table.remove_column(i)
    else:
        table = table.slice(0, len(column) // 2 if how == "fewer rows" else 0)
    pq.write_table(table, path)
    return f"{name}: {how}"


HELD: dict[str, Callable[[Random, Path], str]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".safetensors": _safetensors,
    ".pt": _pickle,
    ".parquet": _parquet,
}
