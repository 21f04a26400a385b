"""SAELens, version 6 and later (`sae-lens`): what its `save_model` writes.

cfg.json                  {architecture: "topk", d_in, d_sae, k, dtype, device,
                          apply_b_dec_to_input, normalize_activations, reshape_activations,
                          rescale_acts_by_decoder_norm, metadata {model_name, hook_name,
                          sae_lens_version, …}}
sae_weights.safetensors   W_enc (D, M), W_dec (M, D), b_enc (M,), b_dec (D,)

Its normalize_activations "layer_norm" is our standardization, to the letter: μ, the unbiased σ,
plus 1e-5, and undone after decoding. Its hook "blocks.5.hook_resid_post" is our layer 5. Without a
sae_lens_version of 6 or more in the metadata, it would take cfg.json for an older one. Checked
against sae-lens 6.54.12.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from .saved import SavedSAE, read_json, read_tensors, refuse, take

_NAMES = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_post")
_UNIT = 1e-5  # norms this close to 1 rescale nothing but rounding


def found_in(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    return (folder / "sae_weights.safetensors").is_file()


def read(folder: Path) -> SavedSAE:
    """Read it. Raises InputError if it is damaged, or computes what we cannot."""
    cfg, path = read_json(folder / "cfg.json"), folder / "sae_weights.safetensors"
    weights = take(read_tensors(path), _NAMES, path)
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    _check(cfg, weights["W_dec"], folder / "cfg.json")
    metadata = cfg.get("metadata", {})
    hook = _RESIDUAL.fullmatch(metadata.get("hook_name") or "")
    return SavedSAE(
        weights,
        cfg.get("k", 0),
        standardize=cfg.get("normalize_activations", "none") == "layer_norm",
        layers=(int(hook[1]),) if hook else (),
        model=metadata.get("model_name") or "",
        about={"saelens": cfg},
    )


def _check(cfg: dict[str, Any], W_dec: Tensor, path: Path) -> None:
    """Raise InputError if `cfg` asks for what a SavedSAE does not compute."""
    for name, default, allowed, way_out in (
        ("architecture", None, ("topk",), "only their TopK SAEs have a counterpart here"),
        (
            "normalize_activations", "none", ("none", "layer_norm"),
            "fold the others into the weights in SAELens first, and save again",
        ),
        ("reshape_activations", "none", ("none",), "give it the heads in one vector, and save so"),
        (
            "apply_b_dec_to_input", True, (True,),
            "in SAELens: sae.b_enc.data += sae.b_dec @ sae.W_enc; "
            "sae.cfg.apply_b_dec_to_input = True; sae.save_model(…)",
        ),
    ):  # fmt: skip
        if cfg.get(name, default) not in allowed:
            rule = " or ".join(map(repr, allowed))
            raise refuse(path, name, rule, cfg.get(name, default), way_out)
    norms = W_dec.double().norm(dim=1)
    if cfg.get("rescale_acts_by_decoder_norm") and (norms - 1).abs().max() > _UNIT:
        raise refuse(
            path, "rescale_acts_by_decoder_norm", "false where W_dec's rows are not of norm 1",
            True,
            "in SAELens: sae.fold_W_dec_norm(); sae.cfg.rescale_acts_by_decoder_norm = False; "
            "sae.save_model(…)",
        )  # fmt: skip


def files(found: SavedSAE) -> dict[str, bytes]:
    """The files of it, by name: also of an SAE that standardizes its inputs."""
    theirs = found.about.get("saelens", {})
    metadata = {"sae_lens_version": "6.0.0", **theirs.get("metadata", {})}
    if found.model:
        metadata["model_name"] = found.model
    if len(found.layers) == 1:
        metadata["hook_name"] = f"blocks.{found.layers[0]}.hook_resid_post"
    cfg = {
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        **theirs,
        "architecture": "topk",
        "d_in": found.d_in,
        "d_sae": found.n_latents,
        "dtype": str(found.weights["W_enc"].dtype).removeprefix("torch."),
        "k": found.k,
        "normalize_activations": "layer_norm" if found.standardize else "none",
        "metadata": metadata,
    }
    tensors: dict[str, Tensor] = {
        "W_enc": found.weights["W_enc"].T.contiguous(),
        "W_dec": found.weights["W_dec"].contiguous(),
        "b_enc": found.b_enc().contiguous(),
        "b_dec": found.weights["b_dec"].contiguous(),
    }
    return {
        "sae_weights.safetensors": safetensors.torch.save(tensors),
        "cfg.json": json.dumps(cfg, indent=2).encode(),
    }
