"""Whether the model and the text of a run that is resumed are those it began with, wherever they
are.

A local file or folder is told by its fingerprint (`data.fingerprint`), which is saved in each
checkpoint. What is built in or on the hub is told by its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import builtin
from ..config import TrainConfig
from ..data.fingerprint import fingerprint
from ..errors import InputError

INPUTS = {"model": "MODEL", "dataset": "DATASET"}
"""The settings that name what a run reads, and their names on the command line."""

Fingerprints = dict[str, str | None]
"""By setting; None if it is not a local file or folder."""


def fingerprints(config: TrainConfig) -> Fingerprints:
    """The fingerprints of what `config` names. Raises InputError if a file cannot be read."""
    return {name: _fingerprint_of(name, value) for name, value in _names(config).items()}


def check_inputs(
    config: TrainConfig, saved: Mapping[str, Any], before: Fingerprints | None, now: Fingerprints
) -> None:
    """Raise InputError if `config` names other inputs than the run with the `saved` settings read.

    `before` are the fingerprints saved with it, None in a checkpoint of version 0.2: then the names
    must be those of the same file. With --moved, nothing is compared.
    """
    if config.moved:
        return
    for name, value in _names(config).items():
        old, argument = saved.get(name), INPUTS[name]
        if before is None:
            if value != old and not _same_path(value, old):
                raise InputError(
                    f"{argument} must be {old} to resume this run, as it began, got {value}; if "
                    "that is the same at another place, give --moved (the run is of an earlier "
                    "version, and its checkpoint does not tell the content)"
                )
        elif now[name] is None and before[name] is None:
            if value != old:
                raise InputError(
                    f"{argument} must be {old} to resume this run, as it began, got {value}; if "
                    "that is the same by another name, give --moved"
                )
        elif now[name] != before[name]:
            raise InputError(
                f"{argument} must be what this run began with, {old}, to resume it, and {value} "
                f"{'has other content' if now[name] else 'is no file or folder here'}; give that "
                "one, or --moved to go on with this one"
            )


def _names(config: TrainConfig) -> dict[str, str | None]:
    return {"model": config.data.model, "dataset": config.data.dataset}


def _fingerprint_of(name: str, value: str | None) -> str | None:
    if value is None or value == builtin.NAME:
        return None
    path = Path(os.path.expanduser(value))
    try:
        return fingerprint(path) if path.exists() else None
    except OSError as error:
        raise InputError(
            f"{INPUTS[name]} {value} cannot be read: {error.strerror} ({error.filename}); make it "
            "readable, or give another"
        ) from error


def _same_path(value: str | None, old: str | None) -> bool:
    if value is None or old is None or builtin.NAME in (value, old):
        return False
    one, other = Path(os.path.expanduser(value)), Path(os.path.expanduser(old))
    return one.exists() and one.resolve() == other.resolve()
