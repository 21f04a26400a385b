"""Write files whole or not at all; check that an output folder can take a run, and hold it for one
process."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from .errors import InputError
from .launcher import log_rank0

LOCK = ".lock"
"""The file in a folder that is locked by the process that writes a run there."""

LABELS = "labels.json"
"""The file in a run's folder with what a user wrote about its latents."""

# What evaluation and analysis leave in a run's folder, and a new run there replaces.
EVALUATION_FILES = ("evaluation.csv", "evaluation.json")
ANALYSIS_FILES = (
    "analysis.json",
    "analysis.safetensors",
    "analysis_latents.parquet",
    "analysis_examples.parquet",
    "analysis_prompt.json",
    "prompt.html",
)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without them


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace the file at `path` as a whole or not at all:

        with replacing(path) as partial:
            partial.write_bytes(content)

    Yields the path to write to, `path` with ".partial" appended. At the end of the block that file
    is synced to the disk and renamed to `path`; on an error it is removed, and `path` is untouched.
    Raises InputError if `path` is a folder.
    """
    if path.is_dir():
        raise InputError(f"{path} must be a file to be replaced, and is a folder; remove it")
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


@contextmanager
def new_folder(folder: Path, argument: str = "--out") -> Iterator[Path]:
    """Make `folder` as a whole or not at all:

        with new_folder(folder) as partial:
            (partial / "name").write_bytes(content)

    Yields the folder to write to, `folder` with ".partial" appended, which becomes `folder` at the
    end of the block; on an error it is removed. What a killed process left of it is replaced.
    Raises InputError if `folder`, which `argument` names, has files in it, or cannot be made.
    """
    check_folder(folder, argument)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"{argument} must be a new or empty folder, and {folder} is not; choose another"
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.is_dir():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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


@contextmanager
def locked(folder: Path, timeout: float = 1) -> Iterator[None]:
    """Hold `folder` in this block, so that no other process writes a run to it. If one does, wait
    for `timeout` seconds.

    The lock is the operating system's, on the file `.lock`, which is removed at the end. It ends
    with the process, so a killed one leaves none behind. On NFS it needs the server's lock manager;
    on a file system without locks, a line says so. A folder that is not there is made, and removed
    again if it is empty at the end.

    Raises InputError if another process holds the folder, or if it is, or is in, a file.
    """
    check_folder(folder)
    folder = folder.absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder, timeout)
        yield
    finally:
        if lock.is_locked:
            if os.name == "posix":  # while it is held: afterwards it may be another process's
                (folder / LOCK).unlink(missing_ok=True)
            lock.release()
            if os.name != "posix":  # Windows removes no open file, so another process's stays
                with suppress(OSError):
                    (folder / LOCK).unlink()
        for path in made:
            with suppress(OSError):  # not empty, or not there
                path.rmdir()


def _acquire(lock: FileLock, folder: Path, timeout: float) -> None:
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        # Where only a file's existence locks, a killed process on another machine leaves it behind.
        stale = f" (if none is, remove {folder / LOCK})" if isinstance(lock, SoftFileLock) else ""
        raise InputError(
            f"--out must be a folder of one run at a time, and another process is writing to "
            f"{folder}{stale}; wait for its end, or choose another"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log_rank0(
            f"the file system of {folder} has no locks ({error.strerror}), so nothing keeps "
            "another process from writing a run to the same --out"
        )


def check_folder(folder: Path, argument: str = "--out", files: Collection[str] = ()) -> None:
    """Raise InputError if `files` could not be written to `folder`, which need not be there yet;
    `argument` is what names it."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is to be made, or a path through a file, which is told below
    except OSError as error:
        raise InputError(
            f"{argument} must be a folder, and {folder} cannot be one: {error.strerror}; "
            "choose another"
        ) from error
    places = (folder, *folder.absolute().parents)
    nearest = next(path for path in places if os.path.lexists(path))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        what = "may not be written to" if nearest.is_dir() else "is no folder"
        raise InputError(
            f"{argument} must be a folder to write to, got {folder}, and {nearest} {what}; "
            "choose another"
        )
    for name in files:
        if (folder / name).is_dir():
            raise InputError(
                f"{argument} must be a folder in which {name} can be written, and "
                f"{folder / name} is itself a folder; remove it, or choose another"
            )


def check_out(
    folder: Path, overwrite: bool, resume: bool, own: Collection[str], needed_bytes: int
) -> None:
    """Check that `folder` can take a run; change nothing.

    Raises InputError if it is a file; if it has files and neither `overwrite` nor `resume` is set;
    if a file in it matches none of `own`, the patterns of a run's files; or if its disk has less
    than `needed_bytes` free. The lock of the folder does not count.
    """
    check_folder(folder)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if name != LOCK]
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
