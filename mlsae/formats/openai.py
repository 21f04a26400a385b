"""openai/sparse_autoencoder: one file, torch.save of `Autoencoder.state_dict()`.

autoencoder.pt (or a .pt file of any name)
    pre_bias (D,), encoder.weight (M, D), latent_bias (M,), decoder.weight (D, M),
    activation "TopK", activation_state_dict {k, postact_fn: "ReLU"},
    stats_last_nonzero (M,), latents_activation_frequency (M,), latents_mean_square (M,)

When their `from_state_dict` loads a file whose activation is "TopK", the SAE standardizes every
vector exactly as ours does (μ, the unbiased σ plus 1e-5, undone after decoding); the format cannot
express a TopK SAE that does not. The last three tensors are training statistics: no output depends
on them, and they are carried along.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .saved import SavedSAE, object_in, read_pickle, rename_weights, unsupported

_NAMES = {
    "pre_bias": "b_dec",
    "encoder.weight": "W_enc",
    "latent_bias": "b_enc",
    "decoder.weight": "W_dec",
}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def matches(path: Path) -> bool:
    """Whether `path` is a file in this format, or a folder that holds one."""
    return path.is_file() or (path / "autoencoder.pt").is_file()


def read(path: Path) -> SavedSAE:
    """Read the SAE. Raises InputError if it is damaged, or its activation is not TopK."""
    path = path if path.is_file() else path / "autoencoder.pt"
    tensors = read_pickle(path)
    activation = tensors.pop("activation", "ReLU")  # their default
    state = object_in(tensors, "activation_state_dict", path)
    tensors.pop("activation_state_dict", None)
    for name, rule, value in (
        ("activation", "TopK", activation),
        ("postact_fn", "ReLU", state.get("postact_fn", "ReLU")),
    ):
        if value != rule:
            raise unsupported(
                path, name, repr(rule), value, "other values have no counterpart here"
            )
    statistics = {name: tensors.pop(name, None) for name in _STATISTICS}
    carried = {f"openai.{name}": t for name, t in statistics.items() if isinstance(t, Tensor)}
    weights = rename_weights(tensors, _NAMES, path)
    weights["W_dec"] = weights["W_dec"].T.contiguous()
    return SavedSAE(weights, state.get("k", 0), standardize=True, carried=carried)


def files(sae: SavedSAE) -> dict[str, bytes]:
    """The file of `sae`, by name. Raises InputError if it does not standardize its inputs.

    Unknown statistics are written as in a new Autoencoder of theirs: 0, 1 and 0.
    """
    if not sae.standardize:
        raise InputError(
            "--to openai must not be given for an SAE that does not standardize its inputs, since "
            "that format's TopK SAEs always do and the outputs would differ; give "
            "--to sparsify, saelens, dictionary_learning or mlsae"
        )
    weights = {
        **sae.weights,
        "b_enc": sae.b_enc(),
        "W_dec": sae.weights["W_dec"].T.contiguous(),
    }
    content: dict[str, Any] = {
        theirs: weights[ours].contiguous() for theirs, ours in _NAMES.items()
    }
    fresh = (torch.zeros(sae.n_latents, dtype=torch.int64), torch.ones(sae.n_latents))
    for name, start in zip(_STATISTICS, (*fresh, torch.zeros(sae.n_latents)), strict=True):
        content[name] = sae.carried.get(f"openai.{name}", start)
    content["activation"] = "TopK"
    content["activation_state_dict"] = {"k": sae.k, "postact_fn": "ReLU"}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return {"autoencoder.pt": buffer.getvalue()}
