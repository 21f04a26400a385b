"""openai/sparse_autoencoder: one file, torch.save of `Autoencoder.state_dict()`.

autoencoder.pt (or a .pt file of any name)
    pre_bias (D,), encoder.weight (M, D), latent_bias (M,), decoder.weight (D, M),
    activation "TopK", activation_state_dict {k, postact_fn: "ReLU"},
    stats_last_nonzero (M,), latents_activation_frequency (M,), latents_mean_square (M,)

Loading a file whose activation is "TopK", their `from_state_dict` standardizes every vector (μ,
the unbiased σ plus 1e-5, undone after decoding: ours to the letter); there is no word for one that
does not. The three statistics are of the training: carried, and no output depends on them.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .saved import SavedSAE, read_pickle, refuse, take

_NAMES = {
    "pre_bias": "b_dec",
    "encoder.weight": "W_enc",
    "latent_bias": "b_enc",
    "decoder.weight": "W_dec",
}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def found_in(path: Path) -> bool:
    """Whether `path` is such a file, or a folder that holds one."""
    return path.is_file() or (path / "autoencoder.pt").is_file()


def read(path: Path) -> SavedSAE:
    """Read it. Raises InputError if it is damaged, or has another activation than TopK."""
    path = path if path.is_file() else path / "autoencoder.pt"
    tensors = read_pickle(path)
    activation = tensors.pop("activation", "ReLU")  # their default
    state = tensors.pop("activation_state_dict", {})
    for name, rule, value in (
        ("activation", "TopK", activation),
        ("postact_fn", "ReLU", state.get("postact_fn", "ReLU")),
    ):
        if value != rule:
            raise refuse(path, name, repr(rule), value, "the others have no counterpart here")
    carried = {f"openai.{name}": tensors.pop(name) for name in _STATISTICS if name in tensors}
    weights = take(tensors, _NAMES, path)
    weights["W_dec"] = weights["W_dec"].T.contiguous()
    return SavedSAE(weights, state.get("k", 0), standardize=True, carried=carried)


def files(found: SavedSAE) -> dict[str, bytes]:
    """The file of it. Raises InputError if the SAE does not standardize its inputs.

    Statistics that are not known are as in a new Autoencoder of theirs: 0, 1 and 0.
    """
    if not found.standardize:
        raise InputError(
            "--to openai must not be given for an SAE that takes its inputs as they are, since "
            "that format's TopK SAEs always standardize them and their outputs would differ; give "
            "--to sparsify, saelens, dictionary_learning or mlsae"
        )
    weights = {
        **found.weights,
        "b_enc": found.b_enc(),
        "W_dec": found.weights["W_dec"].T.contiguous(),
    }
    content: dict[str, Any] = {
        theirs: weights[ours].contiguous() for theirs, ours in _NAMES.items()
    }
    fresh = (torch.zeros(found.n_latents, dtype=torch.int64), torch.ones(found.n_latents))
    for name, start in zip(_STATISTICS, (*fresh, torch.zeros(found.n_latents)), strict=True):
        content[name] = found.carried.get(f"openai.{name}", start)
    content["activation"] = "TopK"
    content["activation_state_dict"] = {"k": found.k, "postact_fn": "ReLU"}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return {"autoencoder.pt": buffer.getvalue()}
