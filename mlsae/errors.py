"""Errors of the user's making, and how a program ends on them. Every package uses this file, so it
imports none of them."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from the user. The message names the argument, the rule, the value that breaks it,
    and what to do instead."""


class NonFiniteError(FloatingPointError):
    """A loss, or a weight, is not finite: training stops before it is used."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_installed(package: str, argument: str) -> None:
    """Raise InputError if `package`, which `argument` needs, cannot be imported."""
    missing = InputError(f"{argument} needs a package that is not installed: pip install {package}")
    try:
        module = importlib.import_module(package)
    except Exception as error:  # a package that is damaged, or lacks another, raises anything
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise missing from error
        raise InputError(
            f"{argument} needs the package {package}, which is installed but cannot be imported: "
            f"{first_line(error)}; repair it, or leave {argument} out"
        ) from error
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.origin is None:  # a folder of that name, such as wandb's own
        raise missing


_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
_PATH = (  # what is wrong with a path, which is the user's to repair
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EIO,
)  # fmt: skip


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """On bad input, a path that cannot be used, or a disk that is full or read-only, print one line
    and exit with code 2."""
    try:
        yield
    except InputError as error:
        lines = (line.strip() for line in str(error).splitlines())  # a library's error has several
        print(f"error: {' '.join(line for line in lines if line)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in _FULL:
            what = f"cannot write {error.filename or 'the output'}: {error.strerror}; "
            way_out = "free some space, or choose another folder with --out"
        elif error.errno in _PATH:
            what = f"cannot read or write {error.filename or 'a file'}: {error.strerror}; "
            way_out = "repair it, or give another path"
        else:
            raise
        print(f"error: {what}{way_out}", file=sys.stderr)
        sys.exit(2)
