"""The paper's own code, `tim-lawson/mlsae` (Lawson et al., arXiv 2409.04185): released checkpoints.

Plain checkpoints, `mlsae-{model}-x{R}-k{k}`:
    config.json          {n_inputs, n_latents, k, auxk, dead_steps_threshold, dead_threshold,
                         standardize}; some also have {layers, lens}
    model.safetensors    encoder.weight (M, D), decoder.weight (D, M), pre_encoder_bias (D,),
                         in some last_nonzero (M,): steps since the latent was active
Checkpoints with the transformer, `…-tfm`:
    config.json          {model_name, layers (null: all), expansion_factor, k, standardize, …}
    model.safetensors    the same under "autoencoder.", and the transformer under "transformer."

Most standardize as we do (unbiased σ, plus 1e-5), some not at all. The norms of decoder rows are
only approximately 1, and are kept. A plain checkpoint names its model only on its model card
(`base_model`), and mostly does not name its layers, which are all of the model's. `…-lens`
checkpoints were trained on residuals transformed by a tuned lens that they do not contain (in a
-tfm config: `tuned_lens`), and whose translators they take at other layers than it has them for:
see `tuned_lens`.

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

from ..errors import InputError, first_line
from .saved import SavedSAE, layers_in, read_json, read_tensors, rename_weights, unsupported

_NAMES = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "pre_encoder_bias": "b_dec"}
_BLOCK = re.compile(r"transformer\.(?:.+\.)?(?:layers|h)\.(\d+)\.")


def matches(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    return "n_inputs" in config or "expansion_factor" in config


def read(folder: Path) -> SavedSAE:
    """Read the SAE. Raises InputError if it is damaged, or contains a learned lens."""
    config, path = read_json(folder / "config.json"), folder / "model.safetensors"
    if config.get("lens"):
        raise unsupported(
            folder / "config.json", "lens", "false", True,
            "an MLSAE here has no learned transform per layer",
        )  # fmt: skip
    with_transformer = "n_inputs" not in config
    tensors = read_tensors(path, "autoencoder." if with_transformer else "")
    counters = {"released.last_nonzero": tensors.pop("last_nonzero", None)}
    weights = rename_weights(tensors, _NAMES, path)
    weights["W_dec"] = weights["W_dec"].T.contiguous()
    layers = layers_in(config, folder / "config.json")
    if config.get("layers") is None and with_transformer:
        layers = tuple(range(_n_layers(path)))
    return SavedSAE(
        weights,
        config.get("k", 0),
        config.get("standardize", True),  # their default
        layers,
        config.get("model_name") or _base_model(folder),
        {"released": config},
        {name: counter for name, counter in counters.items() if counter is not None},
    )


def had_tuned_lens(sae: SavedSAE, name: str) -> bool:
    """Whether the checkpoint `name` was trained on residuals that a tuned lens had transformed. Of
    a plain one, only the name tells it."""
    theirs = sae.settings_of("released")
    return bool(theirs) and (bool(theirs.get("tuned_lens")) or "-lens" in Path(name).name)


def files(sae: SavedSAE) -> dict[str, bytes]:
    """The files of `sae` as a plain checkpoint, by name. Raises InputError if latents have a bias.

    If `dead_steps_threshold` is unknown, their default is written: 10⁷ tokens in steps of
    64 × 2048 tokens. Only their training reads it.
    """
    sae.require_no_latent_bias("released")
    theirs = sae.settings_of("released")
    config = {
        "n_inputs": sae.d_in,
        "n_latents": sae.n_latents,
        "k": sae.k,
        "auxk": theirs.get("auxk", 256),
        "dead_steps_threshold": theirs.get("dead_steps_threshold") or 10_000_000 // (64 * 2048),
        "dead_threshold": theirs.get("dead_threshold", 1e-3),
        "standardize": sae.standardize,
    }
    tensors: dict[str, Tensor] = {
        "encoder.weight": sae.weights["W_enc"].contiguous(),
        "decoder.weight": sae.weights["W_dec"].T.contiguous(),
        "pre_encoder_bias": sae.weights["b_dec"].contiguous(),
        "last_nonzero": sae.carried.get(
            "released.last_nonzero", torch.zeros(sae.n_latents, dtype=torch.int64)
        ),
    }
    return {
        "model.safetensors": safetensors.torch.save(tensors),
        "config.json": json.dumps(config, indent=2).encode(),
    }


def _n_layers(path: Path) -> int:
    """The number of transformer blocks in a -tfm file. Raises InputError if there are none."""
    with safetensors.safe_open(path, framework="pt") as file:
        blocks = [int(m[1]) for m in map(_BLOCK.match, file.keys()) if m]
    if not blocks:
        raise InputError(f"{path} must contain the transformer's blocks, and contains none")
    return max(blocks) + 1


def _base_model(folder: Path) -> str:
    """The base model that the model card beside the files names, or "" if it names none."""
    path = folder / "README.md"
    try:
        name = ModelCard.load(path).data.base_model if path.is_file() else None
    except Exception as error:  # of its YAML, which has errors of many types
        raise InputError(
            f"{path} must be a readable model card, or not there: {first_line(error)}"
        ) from error
    return name if isinstance(name, str) else ""
