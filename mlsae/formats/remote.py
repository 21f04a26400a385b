"""SAEs of other libraries on the Hugging Face hub, one of a repository's folders at a time."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download

from ..errors import InputError, first_line

_SHOWN = 8  # hookpoints in a message


def local_folder(name: Path | str, hookpoint: str | None = None) -> Path:
    """The local folder or file of the SAE `name`: a path, or a repository on the hub, of which only
    the folder `hookpoint` is downloaded, or the SAE at its top.

    Raises InputError if there is no such path or repository, or it has several SAEs and no
    `hookpoint` is given. Works offline for what was downloaded before, if `hookpoint` is given.
    """
    path = Path(os.path.expanduser(name))  # as os.path.exists, it raises nothing
    text = str(name)
    if os.path.exists(path) or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return path / hookpoint if hookpoint else path
    try:
        folder = hookpoint or _only_folder(text)
        pattern = "*" if folder == "." else f"{folder}/*"
        found = Path(snapshot_download(text, allow_patterns=[pattern])) / folder
    except InputError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        raise InputError(
            f"SRC must be a local SAE, or its name on the Hugging Face hub, and {text} cannot be "
            f"loaded: {first_line(error)}"
        ) from error
    if not found.is_dir():
        raise InputError(
            f"--hookpoint must be a folder of {text}, got {hookpoint}; its SAEs are: "
            f"{_listed(_folders(text))}"
        )
    return found


def _folders(name: str) -> list[str]:
    """The folders of a repository that have weights; "." is its top."""
    files = map(PurePosixPath, HfApi().list_repo_files(name))
    return sorted({str(f.parent) for f in files if f.suffix in (".safetensors", ".pt")})


def _only_folder(name: str) -> str:
    folders = _folders(name)
    if "." in folders or not folders:
        return "."
    if len(folders) > 1:
        raise InputError(
            f"{name} has several SAEs; choose one with --hookpoint (hookpoint=… in Python): "
            f"{_listed(folders)}"
        )
    return folders[0]


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
