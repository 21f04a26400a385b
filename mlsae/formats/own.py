"""This project's own folder: what `save_pretrained` of MLSAE and of SparseTopKSAE writes.

config.json          {d_in, n_latents, k, bias}; of an MLSAE also {layers, standardize, model} and
                     what else is known of it: training, versions, heldout
model.safetensors    W_enc (M, D), W_dec (M, D), b_dec (D,) and, with `bias`, b_enc (M,)

Legend: D inputs, M latents.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from ..errors import InputError
from .saved import SavedSAE, read_json, read_tensors

CONFIG = ("d_in", "n_latents", "k", "layers", "standardize", "model", "bias")


def found_in(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    path = folder / "config.json"
    return path.is_file() and "d_in" in read_json(path)


def read(folder: Path) -> SavedSAE:
    """Read it. Raises InputError if a file is missing, damaged, or they do not agree."""
    config = read_json(folder / "config.json")
    found = SavedSAE(
        read_tensors(folder / "model.safetensors"),
        config.get("k", 0),
        config.get("standardize", False),  # a SparseTopKSAE does not say, and never does it
        tuple(config.get("layers", ())),
        config.get("model", ""),
        {name: value for name, value in config.items() if name not in CONFIG},
    )
    for name in ("d_in", "n_latents"):
        if config.get(name) != getattr(found, name):
            raise InputError(
                f"{name} in {folder / 'config.json'} must be {getattr(found, name)}, as in "
                f"model.safetensors beside it, got {config.get(name)}"
            )
    return found


def files(found: SavedSAE) -> dict[str, bytes]:
    """The files of it, by name."""
    weights = {name: w.contiguous() for name, w in found.weights.items()}
    config = {
        "d_in": found.d_in,
        "n_latents": found.n_latents,
        "k": found.k,
        "layers": found.layers,
        "standardize": found.standardize,
        "model": found.model,
        "bias": "b_enc" in found.weights,
        **found.about,
    }
    return {
        "model.safetensors": safetensors.torch.save(weights),
        "config.json": json.dumps(config, indent=2).encode(),
    }
