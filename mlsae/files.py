"""The folder of a run: made only where nothing is lost, and written file by file at once."""

from __future__ import annotations

import os
import shutil
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


def check_out(folder: Path, overwrite: bool, needed_bytes: int) -> None:
    """Raise InputError where `folder` cannot take a run: it has files and `overwrite` is off, it
    is a file, or its disk has less than `needed_bytes` free. Nothing is changed."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out must be a folder, and {folder} is a file; choose another")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"--out must be a new or empty folder, and {folder} has files in it; "
            "choose another, or replace that run with --overwrite"
        )
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise InputError(
            f"--out {folder} needs about {needed_bytes / 1e6:.0f} MB, and its disk has "
            f"{free / 1e6:.0f} MB free; free some space, or choose another folder"
        )
