"""EleutherAI's sparsify (`eai-sparsify`): the folder of one hookpoint.

cfg.json           {d_in, k, num_latents (0: d_in · expansion_factor), expansion_factor, activation,
                   normalize_decoder, multi_topk, skip_connection, transcode}
sae.safetensors    encoder.weight (M, D), encoder.bias (M,), W_dec (M, D), b_dec (D,)

It applies ReLU before it selects, topk(relu((x − b_dec) W_encᵀ + b)), and we after: the values are
equal, and the indices differ only where the value is 0. The folder is named after its hookpoint:
"layers.5" is the residual after block 5. Checked against eai-sparsify 1.3.3.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import safetensors.torch

from .places import layer_of, place
from .saved import SavedSAE, read_json, read_tensors, rename_weights, unsupported

_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_PLAIN = {"activation": "topk", "skip_connection": False, "transcode": False, "signed": False}


def matches(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    return (folder / "sae.safetensors").is_file()


def read(folder: Path) -> SavedSAE:
    """Read the SAE. Raises InputError if it is damaged, or not a plain TopK autoencoder."""
    cfg = read_json(folder / "cfg.json")
    for name, value in _PLAIN.items():
        if cfg.get(name, value) != value:
            raise unsupported(
                folder / "cfg.json", name, repr(value), cfg[name],
                "only plain TopK autoencoders have a counterpart here",
            )  # fmt: skip
    path = folder / "sae.safetensors"
    name = folder.resolve().name
    hookpoint = name if re.search(r"(layers|h|blocks)\.\d", name) else None  # else any folder
    layer = layer_of(hookpoint)
    return SavedSAE(
        rename_weights(read_tensors(path), _NAMES, path),
        cfg.get("k", 0),
        standardize=False,
        layers=() if layer is None else (layer,),
        about={"sparsify": cfg, **place(hookpoint)},
    )


def files(sae: SavedSAE) -> dict[str, bytes]:
    """The files of `sae`, by name. Raises InputError if it standardizes its inputs."""
    sae.require_plain_inputs("sparsify")
    cfg = {
        "activation": "topk",
        "expansion_factor": sae.n_latents // sae.d_in,
        "normalize_decoder": True,
        "num_latents": sae.n_latents,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        **sae.settings_of("sparsify"),
        "k": sae.k,
        "d_in": sae.d_in,
    }
    weights = {**sae.weights, "b_enc": sae.b_enc()}
    tensors = {theirs: weights[ours].contiguous() for theirs, ours in _NAMES.items()}
    return {
        "sae.safetensors": safetensors.torch.save(tensors),
        "cfg.json": json.dumps(cfg, indent=2).encode(),
    }
