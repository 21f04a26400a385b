"""The folder of a run: made only where nothing is lost, and written file by file at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from .errors import InputError


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, whole or not at all: written aside, synced, then renamed."""
    aside = path.with_name(path.name + ".partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make sure that the names in `folder`, not only the files' contents, are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_out(
    folder: Path, overwrite: bool, resume: bool, own: Collection[str], needed_bytes: int
) -> None:
    """Raise InputError if `folder` cannot take a run: it has files and neither `overwrite` nor
    `resume` is on, or files that match none of the patterns of a run's `own`; it is a file; its
    disk has less than `needed_bytes` free. Nothing is changed."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out must be a folder, and {folder} is a file; choose another")
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if files and not (overwrite or resume):
        raise InputError(
            f"--out must be a new or empty folder, and {folder} has files in it; choose another, "
            "go on with the run in it with --resume, or replace it with --overwrite"
        )
    known = [name.removesuffix(".partial") for name in files]
    foreign = [name for name in known if not any(fnmatch(name, pattern) for pattern in own)]
    if foreign:
        raise InputError(
            f"--out must hold nothing but a run, and {folder} has {', '.join(foreign[:3])} in it; "
            "choose another folder"
        )
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise InputError(
            f"--out {folder} needs about {needed_bytes / 1e6:.0f} MB, and its disk has "
            f"{free / 1e6:.0f} MB free; free some space, or choose another folder"
        )
