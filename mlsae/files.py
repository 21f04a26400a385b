"""Write files whole or not at all, and check that an output folder can take a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from .errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace the file at `path` as a whole or not at all:

        with replacing(path) as partial:
            partial.write_bytes(content)

    Yields the path to write to, `path` with ".partial" appended. At the end of the block that file
    is synced to the disk and renamed to `path`; on an error it is removed, and `path` is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes) -> None:
    """Replace the file at `path` by `content`, see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def sync_folder(folder: Path) -> None:
    """Sync the entries of `folder` to the disk: a file's own sync does not cover its name. Windows
    cannot do that, and there it does nothing."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_out(
    folder: Path, overwrite: bool, resume: bool, own: Collection[str], needed_bytes: int
) -> None:
    """Check that `folder` can take a run; change nothing.

    Raises InputError if it is a file; if it has files and neither `overwrite` nor `resume` is set;
    if a file in it matches none of `own`, the patterns of a run's files; or if its disk has less
    than `needed_bytes` free.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out must be a folder, and {folder} is a file; choose another")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names and not (overwrite or resume):
        raise InputError(
            f"--out must be a new or empty folder, and {folder} has files in it; choose another, "
            "resume the run in it with --resume, or replace it with --overwrite"
        )
    whole_names = [name.removesuffix(".partial") for name in names]
    foreign = [name for name in whole_names if not any(fnmatch(name, pattern) for pattern in own)]
    if foreign:
        raise InputError(
            f"--out must hold nothing but a run, and {folder} has {', '.join(foreign[:3])} in it; "
            "choose another folder"
        )
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed_bytes:
        raise InputError(
            f"--out {folder} needs about {needed_bytes / 1e6:.0f} MB, and its disk has "
            f"{free / 1e6:.0f} MB free; free some space, or choose another folder"
        )
