"""Checkpoints of a training run: written whole or not at all, and checked for damage when read.

A checkpoint is `checkpoints/<tokens>.safetensors`: the tensors of a nested dict under their path
("trainer/optimizer/…"), and its other values as JSON in the metadata. Beside it is its `.sha256`,
in the format of `sha256sum --check`, written last: a checkpoint without one is not whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..files import replacing, sync_folder, write_file


def save(run: Path, tokens: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` after `tokens` tokens, synced to the disk, and remove all but the newest
    `keep` checkpoints."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    for unfinished in folder.glob("*.partial"):  # of a process that was killed while it wrote
        unfinished.unlink()
    tensors, rest = _split(state)
    path = folder / f"{tokens:015}.safetensors"
    with replacing(path) as partial:
        _write(tensors, partial, {"state": json.dumps(rest)})
        _digest_path(path).unlink(missing_ok=True)  # of an earlier one after as many tokens
    sync_folder(folder)
    write_file(_digest_path(path), f"{_digest(path)}  {path.name}\n".encode())
    sync_folder(folder)
    for old in _newest_first(folder)[keep:]:
        _digest_path(old).unlink(missing_ok=True)
        old.unlink()
    return path


class CheckpointWriter:
    """Writes checkpoints of the run in a folder while training goes on, one at a time. A state is
    copied to main memory, from a GPU without waiting for it; a thread saves the copy, and calls
    `then`.

    What goes wrong in the thread, such as a full disk, the next call of `save`, `check` or `wait`
    raises.
    """

    def __init__(self, run: Path, keep: int, then: Callable[[], None] = lambda: None) -> None:
        self.run, self.keep, self.then = run, keep, then
        self.saved: Path | None = None
        """The newest checkpoint that is whole."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def save(self, tokens: int, state: dict[str, Any]) -> None:
        """Begin to save `state`, which may change from now on."""
        self.wait()
        copied = _copied(state)
        done = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if done is not None:
            done.record()
        self._pending = self._thread.submit(self._save, tokens, copied, done)

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be saved."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is whole."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, once it has saved what it was given."""
        self._thread.shutdown()

    def _save(self, tokens: int, state: dict[str, Any], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self.saved = save(self.run, tokens, state, self.keep)
        self.then()


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict with its tensors in main memory: those of a GPU arrive, in pinned
    memory, once it has done what it was given so far."""
    copied: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            copied[key] = _copied(value)
        elif isinstance(value, Tensor) and value.is_cuda:
            copied[key] = value.detach().contiguous().to("cpu", non_blocking=True)
        elif isinstance(value, Tensor):
            copied[key] = value.detach().clone(memory_format=torch.contiguous_format)
        else:
            copied[key] = copy.deepcopy(value)
    return copied


def newest(run: Path, report: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint of a run, or None if there is none. `report` is called with
    a message for each damaged one."""
    for path in _newest_first(run / "checkpoints"):
        try:
            expected = _digest_path(path).read_text().split()[0]
        except (OSError, IndexError, UnicodeDecodeError):
            report(f"checkpoint {path} was not written to its end; trying the one before")
            continue
        if not path.is_file() or _digest(path) != expected:
            report(f"checkpoint {path} is damaged (its checksum differs); trying the one before")
            continue
        return path
    return None


def load(path: Path) -> dict[str, Any]:
    """The state in an undamaged checkpoint."""
    with safetensors.safe_open(path, framework="pt") as file:
        rest = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _join(tensors, rest)


def any_written(run: Path) -> bool:
    """Whether a checkpoint of the run was ever written to its end."""
    return any((run / "checkpoints").glob("*.sha256"))


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"), reverse=True)


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        # The library hides the system's error, such as a full disk, in its message.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a nested dict by path, and the dict without them."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[key] = value.detach().cpu().contiguous()
        elif isinstance(value, dict):
            inner, rest[key] = _split(value)
            tensors |= {f"{key}/{name}": tensor for name, tensor in inner.items()}
        else:
            rest[key] = value
    return tensors, rest


def _join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that `_split` took apart."""
    for path, tensor in tensors.items():
        *keys, last = path.split("/")
        place = rest
        for key in keys:
            place = place[key]
        place[last] = tensor
    return rest
