"""What the programs share: the command line, the exit code, the tables they print.

A program's module holds its help text (the module's docstring) and `main`; the work is in the
packages, because no module imports a program.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TypeVar

import tyro
from rich.table import Table

from .errors import InputError, exit_on_bad_input, first_line
from .launcher import LostContactError, is_rank0, log_rank0

Config = TypeVar("Config")

_NO_MEMORY = (
    "not enough memory", "can't allocate memory", "Storage size calculation overflowed",
)  # fmt: skip
"""What torch says of memory on the CPU, in an error of no type of its own."""
_LAUNCHER_SECONDS = 5  # within which a launcher ends this process and names the one that failed


def parse(
    config_type: type[Config],
    doc: str | None,
    arguments: Sequence[str],
    prog: str,
    default: Config | None = None,
) -> Config:
    """The settings on a command line; those not given have the values of `default`.

    The help begins with `doc`, up to its legend of symbols. Only rank 0 prints help and errors.
    """
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        config_type,
        args=arguments,
        prog=prog,
        description=(doc or "").split("Legend:")[0],
        use_underscores=True,
        console_outputs=is_rank0(),
        **defaults,
    )


def preset(arguments: Sequence[str], presets: Mapping[str, Config]) -> Config:
    """The preset that `--preset` names on a command line, "default" if none; what the settings that
    are not given default to."""
    # tyro takes its defaults before it parses, so the preset is read first; it refuses an unknown
    # one.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    return presets.get(parser.parse_known_args(arguments)[0].preset, presets["default"])


def run_program(
    run: Callable[[], object],
    *failures: type[Exception],
    interrupted: str = "interrupted",
) -> None:
    """Call `run()`, and turn what it raises into a message and an exit code.

        1    one of `failures`, lost contact with another process, or nobody reads the output
        2    bad input, a full disk, or too little memory: see `errors.exit_on_bad_input`
        130  Ctrl-C; the message is `interrupted`

    Any other exception is a bug and keeps its traceback.
    """
    silence_transformers()
    _escape_unprintable()
    with exit_on_bad_input():
        try:
            with raise_out_of_memory():
                run()
            sys.stdout.flush()  # here, where a full disk is told in one line
        except BrokenPipeError:  # what reads the output has ended: `| head`
            _drop_unwritten()
            sys.exit(1)
        except LostContactError as error:
            # Every process loses contact when one fails; only the launcher knows which one it was.
            time.sleep(_LAUNCHER_SECONDS)
            print(f"error: {error}; continue with the same command and --resume", file=sys.stderr)
            sys.exit(1)
        except failures as error:
            log_rank0(f"error: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            log_rank0(interrupted)
            sys.exit(130)
        except OSError:  # told in one line by `exit_on_bad_input`
            _drop_unwritten()
            raise


@contextmanager
def raise_out_of_memory() -> Iterator[None]:
    """Raise InputError where torch or Python cannot have the memory that the settings ask for."""
    try:
        yield
    except MemoryError as error:
        raise _too_large(error) from error
    except RuntimeError as error:  # by its name, since not every program needs torch
        no_memory = type(error).__name__ == "OutOfMemoryError"
        if not no_memory and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise _too_large(error) from error


def silence_transformers() -> None:
    """Turn off transformers' warnings and progress bars, if it is imported: a program that imports
    it after `run_program` has begun calls this again."""
    # Not imported here: convert and report do not load it, and it takes seconds.
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def _too_large(error: BaseException) -> InputError:
    return InputError(
        f"there is too little memory: {first_line(error)}; take less at a time with "
        "--micro_tokens, or less in all: fewer --tokens, a smaller SAE, fewer --layers"
    )


def _drop_unwritten() -> None:
    """Drop what stdout cannot write: Python would try once more at its end, fail with a message of
    its own, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape_unprintable() -> None:
    """Print what stdout cannot encode, such as a path that is not UTF-8, as escapes."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def empty_table(title: str, headings: Sequence[str], left: Collection[str] = ()) -> Table:
    """A table without rows; its columns are right-aligned, except those named in `left`."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    return table
