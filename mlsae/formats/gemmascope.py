"""Gemma Scope, and Gemma Scope 2 (Lieberum et al., arXiv 2408.05147): the folder of one SAE.

params.npz            W_enc (D, M), W_dec (M, D), b_enc (M,), b_dec (D,), threshold (M,), float32,
                      in layer_20/width_16k/average_l0_71 of google/gemma-scope-2b-pt-res
params.safetensors    the same, as w_enc, w_dec, b_enc, b_dec, threshold, and
config.json           {architecture: "jump_relu", hf_hook_point_in: "model.layers.12.output",
                      hf_hook_point_out, model_name, affine_connection, …} of version 2, in
                      resid_post/layer_12_width_16k_l0_medium of google/gemma-scope-2-1b-pt

z = x W_enc + b_enc, without subtracting b_dec; h = ReLU(z) where z > threshold. An .npz does not
say where its SAE was trained; the names of its folders do: layer_N, average_l0_N and that of the
repository, which ends in -res, -att or -mlp. Transcoders are refused. Checked against sae-lens
6.54.12's readers of both.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .places import layer_of, place
from .saved import SavedSAE, read_json, read_tensors, rename_weights, unsupported
from .thresholds import center, thresholded

_NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_SITES = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out"}


def matches(path: Path) -> bool:
    """Whether `path` holds this format, or is an .npz file."""
    if path.is_file():
        return path.suffix == ".npz"
    return any((path / name).is_file() for name in ("params.npz", "params.safetensors"))


def read(path: Path) -> SavedSAE:
    """Read the SAE. Raises InputError if it is damaged, or a transcoder."""
    folder = path.parent if path.is_file() else path
    file = path if path.is_file() else folder / "params.npz"
    if file.is_file():
        tensors, hook, model = _read_npz(file), *_named(folder.resolve())
    else:
        file = folder / "params.safetensors"
        found = read_tensors(file)
        tensors = {re.sub("^w_", "W_", name): tensor for name, tensor in found.items()}
        hook, model = _configured(folder / "config.json")
    threshold = tensors.pop("threshold", None)
    weights = rename_weights(tensors, _NAMES, file)
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    mean = re.search(r"average_l0_(\d+)", folder.resolve().as_posix())
    layer = layer_of(hook)
    return SavedSAE(
        standardize=False,
        layers=() if layer is None else (layer,),
        model=model,
        about={"gemmascope": {"hook": hook}, **place(hook)},
        **thresholded(center(weights), threshold, file, int(mean[1]) if mean else None),
    )


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file, without running code. Raises InputError if it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} must be a readable .npz file of arrays: {error}") from error


def _named(folder: Path) -> tuple[str | None, str]:
    """The hook and the model that the folders of a Gemma Scope SAE name; None and "" if they do
    not."""
    parts = folder.as_posix()
    layer = re.search(r"/layer_(\d+)", parts)
    # …/gemma-scope-2b-pt-res/…, and in the hub's cache …/models--google--gemma-scope-2b-pt-res/…
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|att|mlp)", parts)
    if repository is None or (layer is None and "/embedding/" not in parts):
        return None, ""
    size, kind, site = repository.groups()
    model = f"google/gemma-2-{size}{'-it' if kind == 'it' else ''}"
    if layer is None:
        return "hook_embed, before the factor √d_model", model
    return f"blocks.{layer[1]}.{_SITES[site]}", model


def _configured(path: Path) -> tuple[str | None, str]:
    """The hook and the model that the config.json of Gemma Scope 2 names. Raises InputError if it
    is of something else than an SAE."""
    config: dict[str, Any] = read_json(path)
    if config.get("architecture") != "jump_relu":
        raise unsupported(
            path, "architecture", "'jump_relu'", config.get("architecture"),
            "others have no counterpart here",
        )  # fmt: skip
    hook = config.get("hf_hook_point_in")
    if config.get("hf_hook_point_out", hook) not in (hook, None):
        raise unsupported(
            path, "hf_hook_point_out", f"{hook!r}, as hf_hook_point_in is",
            config["hf_hook_point_out"], "transcoders have no counterpart here",
        )  # fmt: skip
    name = str(config.get("model_name") or "").replace("-v3", "-3")
    model = name if not name or "/" in name else f"google/{name}"
    return (hook.removesuffix(".output") if isinstance(hook, str) else None), model
