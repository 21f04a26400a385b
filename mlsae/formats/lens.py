"""Lenses on disk: this project's own file, and the folders of the tuned-lens package.

lens.safetensors    A (n, D, D), b (n, D) of n layers: z = A x + b, and in its metadata, as JSON,
                    lens: {layers, n_layers, kind, model, revision, fingerprint, …}. `layers` are
                    counted as everywhere here: layer ℓ is the output of block ℓ. The last layer,
                    n_layers − 1, has the identity unless it is among them.

Legend: D width of the residual stream.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from ..basis import Lens
from ..errors import InputError
from . import tuned_lens
from .saved import is_integer, layers_in, read_tensors

FILE = "lens.safetensors"


def read_lens(path: Path | str, trained_on: tuple[int, ...] | None = None) -> Lens:
    """The lens in a file lens.safetensors, in a folder with one (a run's too), or in a folder of
    the tuned-lens package, with the translators of which the paper's own code took others (see
    `tuned_lens`): with `trained_on`, as it did for an MLSAE of these layers (empty: of all).

    Raises InputError if it cannot be read, or inverted.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir() and tuned_lens.matches(path):
        return tuned_lens.read(path, trained_on)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"--lens must be a file {FILE}, a folder with one, or a folder with the config.json "
            f"and params.pt of the tuned-lens package, and {path} "
            f"{'is not' if path.exists() else 'does not exist'}; train one with "
            "`python -m mlsae.lens`"
        )
    tensors, about = read_tensors(file), _metadata(file)
    if tensors.keys() != {"A", "b"}:
        raise InputError(
            f"{file} must hold the tensors A and b of a lens, got {', '.join(tensors) or 'none'}"
        )
    layers, n_layers = layers_in(about, file), about.pop("n_layers", None)
    del about["layers"]
    if not all(map(is_integer, (n_layers, *layers))):
        raise InputError(f"layers and n_layers in {file} must be integers; repair the file")
    return Lens(layers, tensors["A"], tensors["b"], n_layers, about)


def lens_for(path: Path | str, layers: tuple[int, ...], about: dict[str, Any], name: str) -> Lens:
    """The lens at `path` for the MLSAE `name`, whose files hold none; for a checkpoint of the
    paper's own code, of `layers`, as that took it. Raises InputError if the MLSAE was trained here,
    `about` says, and so without; or the lens cannot be read."""
    if "training" in about:
        raise InputError(
            f"--lens is for an MLSAE whose files do not tell it, and {name} was trained without "
            "one; leave it out"
        )
    return read_lens(path, layers if "released" in about else None)


def lens_bytes(lens: Lens) -> bytes:
    """The content of the file of `lens`."""
    about = {"layers": lens.layers, "n_layers": lens.n_layers, **lens.about}
    tensors = {"A": lens.matrix.float().cpu(), "b": lens.bias.float().cpu()}
    return safetensors.torch.save(tensors, {"lens": json.dumps(about)})


def _metadata(file: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {})["lens"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{file} must be a lens's file, and its metadata names none") from error
    if not isinstance(about, dict) or "layers" not in about:
        raise InputError(f"{file} must be a lens's file, and its metadata names no layers")
    return about
