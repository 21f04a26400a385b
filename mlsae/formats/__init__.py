"""Read and write saved SAEs in this project's format and in those of other libraries.

    sae = read("theirs/layers.5")  # the files tell which format it is
    write(sae, "ours", "mlsae")

One module per format, with the format's specification at its top. What a format cannot express is
written beside its files, where the other library does not look: `mlsae.json` (layers, model,
whether latents have a bias, settings) and `carried.safetensors` (tensors that no output depends
on). `read` reads both back, so a round trip loses nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch

from ..errors import InputError
from ..files import write_file
from . import (
    dictionary_learning,
    gemmascope,
    llamascope,
    openai,
    own,
    qwenscope,
    released,
    saelens,
    sparsify,
)
from .lens import FILE as LENS
from .lens import lens_bytes, lens_for, read_lens
from .remote import folders_in, listed, local_folder
from .saved import SavedSAE, check_finite, layers_in, object_in, read_json, read_tensors

__all__ = [
    "FORMATS", "LENS", "WRITTEN", "SavedSAE", "detect", "folders_in", "lens_bytes", "lens_for",
    "listed", "local_folder", "read", "read_lens", "write",
]  # fmt: skip

SETTINGS, CARRIED = "mlsae.json", "carried.safetensors"


class Format(Protocol):
    """What each module of this package provides."""

    def matches(self, path: Path, /) -> bool:
        """Whether `path` holds an SAE in this format."""

    def read(self, path: Path, /) -> SavedSAE:
        """Read the SAE at `path`."""


class WrittenFormat(Format, Protocol):
    """What it provides if SAEs are written in it, too."""

    def files(self, sae: SavedSAE, /) -> dict[str, bytes]:
        """The files of `sae` in this format, by name."""


WRITTEN: dict[str, WrittenFormat] = {
    "mlsae": own,
    "released": released,
    "sparsify": sparsify,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "openai": openai,
}
FORMATS: dict[str, Format] = {
    "gemmascope": gemmascope,
    "llamascope": llamascope,
    "qwenscope": qwenscope,
    **WRITTEN,  # openai last: any file is taken for it
}


def detect(path: Path) -> str:
    """The name of the format at `path`. Raises InputError if it is none of `FORMATS`."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # since Python 3.14, `is_file` is False where it may not look
        for name, form in FORMATS.items():
            if form.matches(path):
                return name
    except OSError as error:
        raise InputError(
            f"SRC must be a folder or a file that can be read, and {path} cannot: {error.strerror}"
        ) from error
    inside = folders_in(path) if path.is_dir() else []
    way_out = f"give --hookpoint, one of: {listed(inside)}" if inside else "check the path"
    raise InputError(
        f"SRC must hold an SAE in one of the formats {', '.join(FORMATS)}, and {path} "
        f"{'does not' if path.exists() else 'does not exist'}; {way_out}"
    )


def read(path: Path | str, hookpoint: str | None = None) -> SavedSAE:
    """Read the SAE at `path`, a folder, a file, or the name of another library's repository on the
    Hugging Face hub; `hookpoint` is its folder there, if it has several SAEs. Raises InputError if
    it cannot be read."""
    path = local_folder(path, hookpoint)
    sae = FORMATS[detect(path)].read(path)
    check_finite(sae.weights, path)
    folder = path if path.is_dir() else path.parent
    if (folder / SETTINGS).is_file():
        settings = read_json(folder / SETTINGS)
        weights = dict(sae.weights)
        if settings.get("bias") is False and not sae.b_enc().any():
            weights.pop("b_enc", None)  # zeros, written because the format always has a b_enc
        sae = replace(
            sae,
            weights=weights,
            layers=layers_in(settings, folder / SETTINGS) or sae.layers,
            model=settings.get("model", sae.model),
            about=object_in(settings, "about", folder / SETTINGS) | sae.about,
        )
    if (folder / CARRIED).is_file():
        sae = replace(sae, carried=read_tensors(folder / CARRIED) | sae.carried)
    return sae


def write(sae: SavedSAE, folder: Path | str, to: str) -> list[Path]:
    """Write `sae` into `folder` in the format `to`, and beside it what the format cannot express.

    Returns the files written. Each is replaced whole or not at all. Raises InputError, and writes
    nothing, if the format cannot express what the SAE computes.
    """
    if to != "mlsae":
        sae.require_no_lens(to)
        if (to, sae.activation) != ("saelens", "jumprelu"):
            sae.require_topk(to)
    folder, files = Path(folder), WRITTEN[to].files(sae)
    if to != "mlsae":
        settings: dict[str, Any] = {
            "layers": sae.layers,
            "model": sae.model,
            "bias": "b_enc" in sae.weights,
            "about": {name: value for name, value in sae.about.items() if name != to},
        }
        files[SETTINGS] = json.dumps(settings, indent=2).encode()
    carried = {name: t for name, t in sae.carried.items() if not name.startswith(to + ".")}
    if carried:
        files[CARRIED] = safetensors.torch.save(carried)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content)
    return [folder / name for name in files]
