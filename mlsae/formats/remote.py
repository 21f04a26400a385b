"""SAEs of other libraries on the Hugging Face hub, one of a repository's folders at a time; or one
of its files, where each is an SAE of its own (layer12.sae.pt)."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from ..errors import InputError, first_line

_SHOWN = 24  # hookpoints in a message
_DEPTH = 3  # folders between a local folder and the weights in it
_WEIGHTS = (".safetensors", ".pt", ".npz")
_INNER = "checkpoints"  # a folder of an SAE's own: of Llama Scope, with the weights in it
_ALONE = ".sae.pt"  # the end of a file that is an SAE by itself


def local_folder(name: Path | str, hookpoint: str | None = None) -> Path:
    """The local folder or file of the SAE `name`: a path, or a repository on the hub, of which only
    the folder `hookpoint` is downloaded, or the SAE at its top.

    Raises InputError if there is no such path or repository, or it has several SAEs and no
    `hookpoint` is given. Works offline for what was downloaded before, if `hookpoint` is given.
    """
    path = Path(os.path.expanduser(name))  # as os.path.exists, it raises nothing
    text = str(name)
    if os.path.exists(path) or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return path if hookpoint is None else _folder_in(path, hookpoint)
    try:
        folder = _only_folder(text) if hookpoint is None else hookpoint
        only: dict[str, Any] = (
            {"ignore_patterns": ["*/*"]}
            if folder == "."
            else {"allow_patterns": [glob.escape(folder) + ("" if _is_file(folder) else "/*")]}
        )
        snapshot = Path(snapshot_download(text, **only))
        found = snapshot / folder
        inside = found.exists() and found.resolve().is_relative_to(snapshot.resolve())
        folders = [] if inside else _folders(text)
    except InputError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        raise InputError(
            f"SRC must be a local SAE, or its name on the Hugging Face hub, and {text} cannot be "
            f"loaded: {first_line(error)}"
        ) from error
    if not inside:
        raise InputError(
            f"--hookpoint must be a folder of {text}, got {hookpoint!r}; its SAEs are: "
            f"{listed(_below(hookpoint, folders))}"
        )
    return found


def folders_in(path: Path) -> list[str]:
    """The folders in a local folder, and in those, that have weights; "." is itself."""
    files = (file for depth in range(_DEPTH + 1) for file in path.glob("*/" * depth + "*"))
    return _with_weights(file.relative_to(path) for file in files if file.is_file())


def _folder_in(path: Path, hookpoint: str) -> Path:
    """The folder `hookpoint` of a local folder. Raises InputError if it has no weights."""
    folders = folders_in(path)
    if hookpoint not in folders:
        raise InputError(
            f"--hookpoint must be a folder of {path} that holds an SAE, got {hookpoint!r}; its "
            f"SAEs are: {listed(_below(hookpoint, folders)) or 'none'}"
        )
    return path / hookpoint


def _folders(name: str) -> list[str]:
    """The folders of a repository that have weights; "." is its top."""
    return _with_weights(map(PurePosixPath, HfApi().list_repo_files(name)))


def _with_weights(files: Iterable[PurePath]) -> list[str]:
    """The folders of those of `files` that hold weights, and the files that are SAEs alone;
    layers.2 before layers.10."""
    weights = [file for file in files if file.suffix in _WEIGHTS]
    folders = {_sae_of(file).as_posix() for file in weights}
    return sorted(folders, key=lambda name: [(len(p), p) for p in re.split(r"([0-9]+)", name)])


def _sae_of(file: PurePath) -> PurePath:
    """The folder, or the file, that an SAE with the weights `file` is named by."""
    if _is_file(file.name):
        return file
    return file.parent.parent if file.parent.name == _INNER else file.parent


def _is_file(hookpoint: str) -> bool:
    return hookpoint.endswith(_ALONE)


def _below(hookpoint: str | None, folders: list[str]) -> list[str]:
    """Those of `folders` in the folder `hookpoint`, if there are any; else all."""
    inside = [name for name in folders if name.startswith(f"{hookpoint}/")]
    return inside or folders


def _only_folder(name: str) -> str:
    folders = _folders(name)
    if "." in folders or not folders:
        return "."
    if len(folders) > 1:
        raise InputError(
            f"{name} has several SAEs; choose one with --hookpoint (hookpoint=… in Python): "
            f"{listed(folders)}"
        )
    return folders[0]


def listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
