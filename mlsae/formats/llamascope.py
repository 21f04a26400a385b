"""Llama Scope, and others of OpenMOSS's Language-Model-SAEs (He et al., arXiv 2410.20526).

hyperparams.json               {act_fn: "jumprelu" or "topk", jump_relu_threshold, top_k, d_model,
                               d_sae, dataset_average_activation_norm {in, out}, norm_activation,
                               hook_point_in, hook_point_out, sparsity_include_decoder_norm, …}
checkpoints/final.safetensors  encoder.weight (M, D), encoder.bias (M,), decoder.weight (D, M),
                               decoder.bias (D,), bfloat16

in a folder such as Llama3_1-8B-Base-L15R-32x of fnlp/Llama3_1-8B-Base-LXR-32x. The inputs are
scaled to a mean norm of √D: with s = √D / norm, and without subtracting the decoder's bias,

    z = s x W_encᵀ + b_enc,   h = z where z > s · jump_relu_threshold,   x̂ = (h W_dec + b_dec) / s

Here s is moved into the weights, so that h stays the same. That is sae-lens 6.54.12's reader after
its `fold_activation_norm_scaling_factor(s)`, by which this was checked. It does not weigh z by the
norms of W_dec's rows, as sparsity_include_decoder_norm says: one whose norms are not 1 is refused,
since it would be two SAEs.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from .places import layer_of, place
from .saved import SavedSAE, object_in, read_json, read_tensors, rename_weights, unsupported
from .thresholds import center, thresholded

_NAMES = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc",
    "decoder.weight": "W_dec", "decoder.bias": "b_dec",
}  # fmt: skip
_FILE = Path("checkpoints", "final.safetensors")
_UNIT = 0.02  # norms this close to 1 differ by the rounding of bfloat16


def matches(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    return (folder / "hyperparams.json").is_file() and (folder / _FILE).is_file()


def read(folder: Path) -> SavedSAE:
    """Read the SAE. Raises InputError if it is damaged, or computes something else."""
    path = folder / "hyperparams.json"
    config = read_json(path)
    hook = config.get("hook_point_in")
    for name, default, allowed in (
        ("act_fn", None, ("jumprelu", "topk")),
        ("norm_activation", None, ("dataset-wise",)),
        ("apply_decoder_bias_to_pre_encoder", False, (False,)),
        ("use_decoder_bias", True, (True,)),
        ("use_glu_encoder", False, (False,)),
        ("hook_point_out", hook, (hook,)),
    ):
        if config.get(name, default) not in allowed:
            raise unsupported(
                path, name, " or ".join(map(repr, allowed)), config.get(name, default),
                "others have no counterpart here",
            )  # fmt: skip
    weights = rename_weights(read_tensors(folder / _FILE), _NAMES, folder / _FILE)
    weights = {name: weight.float() for name, weight in weights.items()}
    weights["W_dec"] = weights["W_dec"].T.contiguous()
    scale = _scale(config, weights["W_dec"], path)
    weights = center(
        {
            **weights,
            "W_enc": weights["W_enc"] * scale,
            "W_dec": weights["W_dec"] / scale,
            "b_dec": weights["b_dec"] / scale,
        }
    )
    codes: dict[str, Any] = {"weights": weights, "k": config.get("top_k", 0)}
    if config["act_fn"] == "jumprelu":
        threshold = _number(config, "jump_relu_threshold", path) * scale
        codes = thresholded(weights, weights["b_enc"].new_tensor(threshold), path)
    layer = layer_of(hook)
    return SavedSAE(
        standardize=False,
        layers=() if layer is None else (layer,),
        model="meta-llama/Llama-3.1-8B" if "Llama3_1-8B-Base" in folder.resolve().name else "",
        about={"llamascope": config, **place(hook)},
        **codes,
    )


def _scale(config: dict[str, Any], W_dec: Tensor, path: Path) -> float:
    """s, √D over the mean norm of the inputs. Raises InputError if it is no number above 0, is
    another for the outputs, or the norms of W_dec's rows are not 1 where they matter."""
    average = object_in(config, "dataset_average_activation_norm", path)
    norm = _number(average, "in", path)
    if average.get("out", norm) != norm:
        raise unsupported(
            path, "dataset_average_activation_norm.out", f"{norm}, as in", average["out"],
            "transcoders have no counterpart here",
        )  # fmt: skip
    weighted = config.get("sparsity_include_decoder_norm", True)
    if weighted and (W_dec.norm(dim=1) - 1).abs().max() > _UNIT:
        raise unsupported(
            path, "sparsity_include_decoder_norm", "false unless the rows of W_dec have norm 1",
            weighted, "libraries disagree what it computes then",
        )  # fmt: skip
    return math.sqrt(W_dec.shape[1]) / norm


def _number(content: dict[str, Any], name: str, path: Path) -> float:
    value = content.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{name} in {path} must be a number above 0, got {value!r}")
    return float(value)
