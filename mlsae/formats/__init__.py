"""SAEs on disk, in this project's format and in others'. A file a format, with the facts on it.

    found = read("theirs/layers.5")  # which format, the files tell
    write(found, "ours", "mlsae")

What a format has no word for lies beside its files, which the other library does not read:
`mlsae.json` (layers, model, whether latents have a bias, settings) and `carried.safetensors`
(tensors that no output depends on). Reading takes them in again: nothing is lost on the way there
and back.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch

from ..errors import InputError
from ..files import write_file
from . import dictionary_learning, openai, own, released, saelens, sparsify
from .saved import SavedSAE, read_json, read_tensors

__all__ = ["FORMATS", "SavedSAE", "detect", "read", "write"]

SETTINGS, CARRIED = "mlsae.json", "carried.safetensors"


class Format(Protocol):
    """What each file here is."""

    def found_in(self, path: Path, /) -> bool:
        """Whether `path` holds this format."""

    def read(self, path: Path, /) -> SavedSAE:
        """Read it."""

    def files(self, found: SavedSAE, /) -> dict[str, bytes]:
        """The files of it, by name."""


FORMATS: dict[str, Format] = {
    "mlsae": own,
    "released": released,
    "sparsify": sparsify,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "openai": openai,
}


def detect(path: Path) -> str:
    """The name of the format at `path`. Raises InputError if there is none."""
    if path.exists():
        for name, form in FORMATS.items():
            if form.found_in(path):
                return name
    inside = []
    if path.is_dir():
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
        inside = [str(f) for f in folders if any(form.found_in(f) for form in FORMATS.values())]
    way_out = f"give one of its folders: {', '.join(inside[:4])}" if inside else "check the path"
    raise InputError(
        f"SRC must hold an SAE in one of the formats {', '.join(FORMATS)}, and {path} "
        f"{'does not' if path.exists() else 'is not there'}; {way_out}"
    )


def read(path: Path | str) -> SavedSAE:
    """The SAE at `path`, a folder or a file. Raises InputError if it cannot be read."""
    path = Path(path)
    found = FORMATS[detect(path)].read(path)
    folder = path if path.is_dir() else path.parent
    if (folder / SETTINGS).is_file():
        beside = read_json(folder / SETTINGS)
        weights = dict(found.weights)
        if beside.get("bias") is False and not found.b_enc().any():
            weights.pop("b_enc", None)  # zeros, for a format that always has one
        found = replace(
            found,
            weights=weights,
            layers=tuple(beside.get("layers", found.layers)),
            model=beside.get("model", found.model),
            about=beside.get("about", {}) | found.about,
        )
    if (folder / CARRIED).is_file():
        found = replace(found, carried=read_tensors(folder / CARRIED) | found.carried)
    return found


def write(found: SavedSAE, folder: Path | str, to: str) -> list[Path]:
    """Write the SAE into `folder` in the format `to`, and beside it what that has no word for: the
    files written. Each is replaced at once.

    Raises InputError if the format cannot say what the SAE computes; nothing is written then.
    """
    folder, files = Path(folder), FORMATS[to].files(found)
    if to != "mlsae":
        about = {name: value for name, value in found.about.items() if name != to}
        beside: dict[str, Any] = {
            "layers": found.layers,
            "model": found.model,
            "bias": "b_enc" in found.weights,
            "about": about,
        }
        files[SETTINGS] = json.dumps(beside, indent=2).encode()
    carried = {name: t for name, t in found.carried.items() if not name.startswith(to + ".")}
    if carried:
        files[CARRIED] = safetensors.torch.save(carried)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content)
    return [folder / name for name in files]
