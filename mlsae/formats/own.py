"""This project's own format: the folder that MLSAE and SparseTopKSAE write in `save_pretrained`.

config.json          {d_in, n_latents, k, bias}; for an MLSAE also {layers, standardize, model} and
                     anything else known: training, versions, heldout; for one of batchtopk also
                     {activation: "batchtopk", k_max, threshold}, of jumprelu {activation, k_max};
                     for one with a lens {lens: its kind, its model, …, and the SHA-256 of its maps}
lens.safetensors     the lens, if there is one: see `lens`
model.safetensors    W_enc (M, D), W_dec (M, D), b_dec (D,), with `bias`, b_enc (M,) and, of
                     jumprelu, threshold () or (M,)

Legend: D inputs, M latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from ..basis import Lens
from ..errors import InputError
from . import lens as lenses
from .saved import THRESHOLD, SavedSAE, layers_in, object_in, read_json, read_tensors

_THRESHOLDED = ("activation", "k_max", "threshold")
CONFIG = ("d_in", "n_latents", "k", "layers", "standardize", "model", "bias", "lens", *_THRESHOLDED)


def matches(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    path = folder / "config.json"
    return path.is_file() and "d_in" in read_json(path)


def read(folder: Path) -> SavedSAE:
    """Read the SAE. Raises InputError if a file is missing or damaged, or the files disagree."""
    config = read_json(folder / "config.json")
    activation = config.get("activation", "topk")
    if activation not in ("topk", "batchtopk", "jumprelu"):
        raise InputError(
            f"activation in {folder / 'config.json'} must be topk, batchtopk or jumprelu, got "
            f"{activation!r}"
        )
    weights = read_tensors(folder / "model.safetensors")
    if (activation == "jumprelu") != (THRESHOLD in weights):
        raise InputError(
            f"threshold must be in {folder / 'model.safetensors'} if and only if the activation in "
            f"config.json is jumprelu, got {activation}"
        )
    sae = SavedSAE(
        weights,
        config.get("k", 0),
        config.get("standardize", False),  # absent for a SparseTopKSAE, which never standardizes
        layers_in(config, folder / "config.json"),
        config.get("model", ""),
        {name: value for name, value in config.items() if name not in CONFIG},
        k_max=None if activation == "topk" else config.get("k_max", 0),
        threshold=config.get("threshold", -1) if activation == "batchtopk" else None,
        lens=_lens(folder, object_in(config, "lens", folder / "config.json")),
    )
    for name in ("d_in", "n_latents"):
        if config.get(name) != getattr(sae, name):
            raise InputError(
                f"{name} in {folder / 'config.json'} must be {getattr(sae, name)}, as in "
                f"model.safetensors, got {config.get(name)}"
            )
    return sae


def files(sae: SavedSAE) -> dict[str, bytes]:
    """The files of `sae`, by name."""
    weights = {name: w.contiguous() for name, w in sae.weights.items()}
    more: dict[str, Any] = {} if sae.k_max is None else {"activation": sae.activation}
    if sae.k_max is not None:
        more["k_max"] = sae.k_max
    if sae.threshold is not None:
        more["threshold"] = sae.threshold
    config = {
        "d_in": sae.d_in,
        "n_latents": sae.n_latents,
        "k": sae.k,
        "layers": sae.layers,
        "standardize": sae.standardize,
        "model": sae.model,
        "bias": "b_enc" in sae.weights,
        **more,
        **({"lens": {**sae.lens.about, "sha256": sae.lens.digest}} if sae.lens else {}),
        **sae.about,
    }
    return {
        **({lenses.FILE: lenses.lens_bytes(sae.lens)} if sae.lens else {}),
        "model.safetensors": safetensors.torch.save(weights),
        "config.json": json.dumps(config, indent=2).encode(),
    }


def _lens(folder: Path, described: dict[str, Any]) -> Lens | None:
    """The lens that config.json describes. Raises InputError if it is not the one in the folder."""
    if not described:
        return None
    lens = lenses.read_lens(folder / lenses.FILE)
    if lens.digest != described.get("sha256"):
        raise InputError(
            f"{folder / lenses.FILE} must be the lens that config.json beside it names, and its "
            "maps have another SHA-256; put back the one it was trained with"
        )
    return lens
