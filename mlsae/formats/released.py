"""The checkpoints of the paper's own code, `tim-lawson/mlsae` (Lawson et al., arXiv 2409.04185).

Plain ones, `mlsae-{model}-x{R}-k{k}`:
    config.json          {n_inputs, n_latents, k, auxk, dead_steps_threshold, dead_threshold,
                         standardize}; some also have {layers, lens}
    model.safetensors    encoder.weight (M, D), decoder.weight (D, M), pre_encoder_bias (D,),
                         last_nonzero (M,) in some: steps since the latent was active
With the transformer, `…-tfm`:
    config.json          {model_name, layers (null: all), expansion_factor, k, standardize, …}
    model.safetensors    the same under "autoencoder.", and the transformer under "transformer."

They standardize as we do (unbiased σ, plus 1e-5), some not at all. Decoder rows are only about
unit norm, and are left so. A plain one names its model only on its model card (`base_model`), and
its layers mostly nowhere: all of that model's. `…-lens` ones were trained on residuals that a
tuned lens had transformed, which is no part of them (`tuned_lens`, in a -tfm one's config).

Legend: D inputs, M latents, R = M / D.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from torch import Tensor

from ..errors import InputError
from .saved import SavedSAE, read_json, read_tensors, refuse, take

_NAMES = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "pre_encoder_bias": "b_dec"}
_BLOCK = re.compile(r"transformer\.(?:.+\.)?(?:layers|h)\.(\d+)\.")


def found_in(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    return "n_inputs" in config or "expansion_factor" in config


def read(folder: Path) -> SavedSAE:
    """Read it. Raises InputError if it is damaged, or has a learned lens in it."""
    config, path = read_json(folder / "config.json"), folder / "model.safetensors"
    if config.get("lens"):
        raise refuse(
            folder / "config.json", "lens", "false", True,
            "an MLSAE here has no transform of its own for each layer",
        )  # fmt: skip
    with_transformer = "n_inputs" not in config
    tensors = read_tensors(path, "autoencoder." if with_transformer else "")
    counters = {"released.last_nonzero": tensors.pop("last_nonzero", None)}
    weights = take(tensors, _NAMES, path)
    weights["W_dec"] = weights["W_dec"].T.contiguous()
    layers = config.get("layers")
    if layers is None and with_transformer:
        layers = range(_n_layers(path))
    return SavedSAE(
        weights,
        config.get("k", 0),
        config.get("standardize", True),  # their default
        tuple(layers or ()),
        config.get("model_name") or _base_model(folder),
        {"released": config},
        {name: counter for name, counter in counters.items() if counter is not None},
    )


def files(found: SavedSAE) -> dict[str, bytes]:
    """The files of a plain one, by name. Raises InputError if latents have a bias.

    `dead_steps_threshold` counts steps of theirs: where unknown, 10⁷ tokens in steps of 64 × 2048,
    their default. Only the training of theirs reads it.
    """
    found.needs_no_latent_bias("released")
    theirs = found.about.get("released", {})
    config = {
        "n_inputs": found.d_in,
        "n_latents": found.n_latents,
        "k": found.k,
        "auxk": theirs.get("auxk", 256),
        "dead_steps_threshold": theirs.get("dead_steps_threshold") or 10_000_000 // (64 * 2048),
        "dead_threshold": theirs.get("dead_threshold", 1e-3),
        "standardize": found.standardize,
    }
    tensors: dict[str, Tensor] = {
        "encoder.weight": found.weights["W_enc"].contiguous(),
        "decoder.weight": found.weights["W_dec"].T.contiguous(),
        "pre_encoder_bias": found.weights["b_dec"].contiguous(),
        "last_nonzero": found.carried.get(
            "released.last_nonzero", torch.zeros(found.n_latents, dtype=torch.int64)
        ),
    }
    return {
        "model.safetensors": safetensors.torch.save(tensors),
        "config.json": json.dumps(config, indent=2).encode(),
    }


def _n_layers(path: Path) -> int:
    """How many blocks the transformer in a -tfm file has. Raises InputError if it has none."""
    with safetensors.safe_open(path, framework="pt") as file:
        found = [int(m[1]) for m in map(_BLOCK.match, file.keys()) if m]
    if not found:
        raise InputError(f"{path} must have the transformer's blocks in it, and has none")
    return max(found) + 1


def _base_model(folder: Path) -> str:
    """The model that the model card beside the files names, or ""."""
    path = folder / "README.md"
    named = ModelCard.load(path).data.base_model if path.is_file() else None
    return named if isinstance(named, str) else ""
