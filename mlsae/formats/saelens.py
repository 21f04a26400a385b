"""SAELens, version 6 and later (`sae-lens`): the folder that its `save_model` writes.

cfg.json                  {architecture: "topk", "jumprelu" or "standard", d_in, d_sae, k (of topk),
                          dtype, device,
                          apply_b_dec_to_input, normalize_activations, reshape_activations,
                          rescale_acts_by_decoder_norm, metadata {model_name, hook_name,
                          sae_lens_version, …}}
sae_weights.safetensors   W_enc (D, M), W_dec (M, D), b_enc (M,), b_dec (D,) and, of jumprelu,
                          threshold (M,)

Its "jumprelu" is h = ReLU(z) where z > threshold, and "standard" is h = ReLU(z): a threshold of 0.
Its BatchTopK SAEs, Matryoshka ones too, are saved as jumprelu (`save_inference_model`). Without
apply_b_dec_to_input, b_dec is not subtracted from the inputs: here it is, and b_enc makes up for
it. Its normalize_activations "layer_norm" is exactly our standardization: μ, the unbiased σ plus
1e-5, undone after decoding. Its hook "blocks.5.hook_resid_post" is our layer 5. If the metadata
lacked a sae_lens_version of 6 or more, SAELens would read cfg.json as an older version's. Checked
against sae-lens 6.54.12.

Versions 3 to 5 have no `metadata` and no `k`: {architecture: "standard" or "topk",
activation_fn_str (or activation_fn): "topk", activation_fn_kwargs: {"k"}, hook_name (or
hook_point), normalize_activations (also null or a bool), model_name, …}, and the architecture
"jumprelu" or "standard" with the activation "relu". They are read too.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .places import layer_of, place
from .saved import (
    THRESHOLD,
    SavedSAE,
    object_in,
    read_json,
    read_tensors,
    rename_weights,
    unsupported,
)
from .thresholds import center, thresholded

_NAMES = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_AVERAGE = "expected_average_only_in"  # a scale that all inputs share
_BEFORE_6 = (
    ("topk", "standard"), ("topk", "topk"), ("relu", "standard"), ("relu", "jumprelu"),
)  # fmt: skip
_UNIT = 1e-5  # norms this close to 1 differ by rounding only


def matches(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    return (folder / "sae_weights.safetensors").is_file()


def read(folder: Path) -> SavedSAE:
    """Read the SAE. Raises InputError if it is damaged, or no SAE that we can compute."""
    cfg = _as_version_6(read_json(folder / "cfg.json"), folder / "cfg.json")
    path = folder / "sae_weights.safetensors"
    tensors = read_tensors(path)
    for name in ("finetuning_scaling_factor", "scaling_factor"):  # one per latent, before decoding
        if name in tensors and (tensors[name] == 1).all():
            del tensors[name]
    is_jumprelu = cfg.get("architecture") == "jumprelu"
    threshold = tensors.pop("threshold", None) if is_jumprelu else torch.zeros(())  # ReLU's
    weights = rename_weights(tensors, _NAMES, path)
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    _check(cfg, weights["W_dec"], folder / "cfg.json")
    if not cfg.get("apply_b_dec_to_input", True):
        weights = center(weights)
    metadata = object_in(cfg, "metadata", folder / "cfg.json")
    layer = layer_of(metadata.get("hook_name"))
    codes: dict[str, Any] = {"weights": weights, "k": cfg.get("k", 0)}
    if cfg["architecture"] != "topk":
        codes = thresholded(weights, threshold, path)
    return SavedSAE(
        **codes,
        standardize=cfg.get("normalize_activations", "none") == "layer_norm",
        layers=() if layer is None else (layer,),
        model=metadata.get("model_name") or "",
        about={"saelens": cfg, **place(metadata.get("hook_name"))},
    )


def _as_version_6(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """The cfg.json of a version before 6 in the terms of version 6. Raises InputError if it is of
    an SAE without counterpart here, or scales its activations."""
    if "metadata" in cfg or "k" in cfg:
        return cfg
    name = "activation_fn" if "activation_fn" in cfg else "activation_fn_str"
    architecture = cfg.get("architecture", "standard")
    # What tells is the activation, or of version 5 the architecture alone.
    activation = cfg.get(name, "topk" if architecture == "topk" else "relu")
    if (activation, architecture) not in _BEFORE_6:
        raise unsupported(
            path, name, "'topk' or 'relu', of the architecture 'standard', 'topk' or 'jumprelu'",
            f"{activation}, {architecture}", "others have no counterpart here",
        )  # fmt: skip
    options = object_in(cfg, "activation_fn_kwargs", path)
    if activation == "topk" and options.keys() - {"k"}:
        raise unsupported(
            path, "activation_fn_kwargs", "{'k': …} only", options,
            "what follows the selection of the k largest is ReLU here",
        )  # fmt: skip
    if cfg.get("finetuning_scaling_factor"):
        raise unsupported(
            path, "finetuning_scaling_factor", "false", True, "fold it in SAELens, and save again"
        )
    hook_name = cfg.get("hook_name", cfg.get("hook_point"))
    normalize = cfg.get("normalize_activations")  # a bool before version 3
    metadata = {key: cfg[key] for key in ("model_name", "dataset_path") if key in cfg}
    kept = ("d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input")
    return {
        **{key: cfg[key] for key in kept if key in cfg},
        **({"architecture": "topk", "k": options.get("k", 0)} if activation == "topk" else {}),
        **({"architecture": architecture} if activation == "relu" else {}),
        "normalize_activations": _AVERAGE if normalize is True else normalize or "none",
        "reshape_activations": "hook_z" if "hook_z" in str(hook_name) else "none",
        "metadata": metadata if hook_name is None else {**metadata, "hook_name": hook_name},
    }


def _check(cfg: dict[str, Any], W_dec: Tensor, path: Path) -> None:
    """Raise InputError if `cfg` has a setting that a SavedSAE cannot express."""
    for name, default, allowed, way_out in (
        (
            "architecture", None, ("topk", "jumprelu", "standard"),
            "others have no counterpart here",
        ),
        (
            "normalize_activations", "none", ("none", "layer_norm"),
            "fold other normalizations into the weights in SAELens, and save again",
        ),
        (
            "reshape_activations", "none", ("none",),
            "concatenate the heads into one vector in SAELens, and save again",
        ),
    ):  # fmt: skip
        if cfg.get(name, default) not in allowed:
            rule = " or ".join(map(repr, allowed))
            raise unsupported(path, name, rule, cfg.get(name, default), way_out)
    norms = W_dec.double().norm(dim=1)
    if cfg.get("rescale_acts_by_decoder_norm") and (norms - 1).abs().max() > _UNIT:
        raise unsupported(
            path, "rescale_acts_by_decoder_norm", "false unless the rows of W_dec have norm 1",
            True,
            "in SAELens: sae.fold_W_dec_norm(); sae.cfg.rescale_acts_by_decoder_norm = False; "
            "sae.save_model(…)",
        )  # fmt: skip


def files(sae: SavedSAE) -> dict[str, bytes]:
    """The files of `sae`, by name, whether or not it standardizes its inputs."""
    theirs = sae.settings_of("saelens", "metadata")
    metadata = {"sae_lens_version": "6.0.0", **theirs.get("metadata", {})}
    if sae.model:
        metadata["model_name"] = sae.model
    if len(sae.layers) == 1 and layer_of(metadata.get("hook_name")) != sae.layers[0]:
        metadata["hook_name"] = f"blocks.{sae.layers[0]}.hook_resid_post"
    cfg = {
        "device": "cpu",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        **theirs,
        "apply_b_dec_to_input": True,  # also of one read without: its bias makes up for it
        "architecture": sae.activation,
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": str(sae.weights["W_enc"].dtype).removeprefix("torch."),
        **({"k": sae.k} if sae.activation == "topk" else {}),
        "normalize_activations": "layer_norm" if sae.standardize else "none",
        "metadata": metadata,
    }
    tensors: dict[str, Tensor] = {
        "W_enc": sae.weights["W_enc"].T.contiguous(),
        "W_dec": sae.weights["W_dec"].contiguous(),
        "b_enc": sae.b_enc().contiguous(),
        "b_dec": sae.weights["b_dec"].contiguous(),
    }
    if sae.activation == "jumprelu":
        tensors["threshold"] = sae.weights[THRESHOLD].expand(sae.n_latents).contiguous()
    return {
        "sae_weights.safetensors": safetensors.torch.save(tensors),
        "cfg.json": json.dumps(cfg, indent=2).encode(),
    }
