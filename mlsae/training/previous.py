"""The run that --overwrite replaces: set aside until the new one has a checkpoint, and put back if
that one ends before.

It waits in `.previous` in the run's folder. Each step there and back is a rename, so that a process
that is killed at any moment loses nothing:

    .previous.partial    a run on its way there or back; `recover` puts it back
    .previous            a whole run; if the folder has another with a checkpoint, of no more use
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..distributed import log_rank0
from ..errors import InputError
from ..files import LOCK
from . import checkpoint

PREVIOUS, MOVING = ".previous", ".previous.partial"


@contextmanager
def replacing_run(out: Path) -> Iterator[None]:
    """Write a new run to `out` in this block. What is there is set aside; `discard` removes it once
    the new run has a checkpoint. On an error before that it is put back.

    The caller holds the folder, and has checked that it has nothing but runs.
    """
    set_aside(out)
    try:
        yield
    except BaseException as error:
        if not _has_run(out):
            if (out / PREVIOUS).exists():
                restore(out)
                log_rank0(f"the new run has no checkpoint, so the one before is back in {out}")
            elif isinstance(error, InputError):
                _clear(out)
        raise


def set_aside(out: Path) -> None:
    """Move the run in `out` to `.previous`. If one is there already, and the one in `out` never had
    a checkpoint, the older one stays and the newer one goes."""
    if (out / PREVIOUS).exists():
        if not _has_run(out):
            _clear(out)
            return
        shutil.rmtree(out / PREVIOUS)
    contents = _contents(out)
    if contents:
        _move(contents, out / MOVING)
        (out / MOVING).rename(out / PREVIOUS)


def restore(out: Path) -> None:
    """Put the run in `.previous` back, in place of what is in `out`."""
    _clear(out)
    (out / PREVIOUS).rename(out / MOVING)
    recover(out)


def recover(out: Path) -> None:
    """Put back a run whose move was cut short."""
    if (out / MOVING).exists():
        _move(list((out / MOVING).iterdir()), out)
        (out / MOVING).rmdir()


def discard(out: Path) -> None:
    """Remove the run that was set aside. What cannot be removed is left to the next call."""
    shutil.rmtree(out / PREVIOUS, ignore_errors=True)


def _contents(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.name not in (LOCK, PREVIOUS, MOVING)]


def _has_run(out: Path) -> bool:
    """Whether `out` has a checkpoint or a model, its own or of a sweep."""
    models = (path for pattern in ("", "*/") for path in out.glob(pattern + "model.safetensors"))
    return checkpoint.any_written(out) or any(path.parent.name != PREVIOUS for path in models)


def _move(paths: list[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in paths:
        path.rename(folder / path.name)


def _clear(out: Path) -> None:
    for path in _contents(out):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
