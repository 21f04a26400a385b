"""dictionary_learning (`dictionary-learning`): the folder of one trainer.

ae.pt          torch.save of a state dict: encoder.weight (M, D), encoder.bias (M,),
               decoder.weight (D, M), b_dec (D,), k (), threshold ()
config.json    {trainer: {dict_class: "AutoEncoderTopK", trainer_class: "TopKTrainer",
               activation_dim, dict_size, k, layer, lm_name, submodule_name, …}, …}

It applies ReLU before it selects, as sparsify does. AutoEncoderTopK selects by k; `threshold` is a
running mean that only its `encode(use_threshold=True)` reads, so no output depends on it and it is
carried along. BatchTopKSAE has the same tensors but selects by `threshold`; below 0, as it begins,
that is ReLU. Only config.json tells the two apart, so it is required.

    dict_class                the tensors of ae.pt                                      read as
    AutoEncoderTopK           as above                                                  topk
    BatchTopKSAE              as above                                                  jumprelu
    MatryoshkaBatchTopKSAE    W_enc (D, M), W_dec (M, D), b_enc (M,), b_dec (D,), k (),
                              threshold (), group_sizes (G,)                            jumprelu
    JumpReluAutoEncoder       W_enc (D, M), W_dec (M, D), b_enc (M,), b_dec (D,),
                              threshold (M,); it does not subtract b_dec                jumprelu

Written as AutoEncoderTopK. Checked against dictionary-learning 0.1.0.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .places import layer_of, place
from .saved import (
    SavedSAE,
    object_in,
    read_json,
    read_pickle,
    rename_weights,
    unsupported,
)
from .thresholds import center, thresholded

_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "b_dec": "b_dec",
}
_PARAMETERS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_CLASSES = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")
_THRESHOLD = "dictionary_learning.threshold"


def matches(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    return (folder / "ae.pt").is_file()


def read(folder: Path) -> SavedSAE:
    """Read the SAE. Raises InputError if it is damaged, or of another class than those above."""
    config = read_json(folder / "config.json")
    trainer = object_in(config, "trainer", folder / "config.json")
    kind = trainer.get("dict_class")
    if kind not in _CLASSES:
        raise unsupported(
            folder / "config.json", "trainer.dict_class", f"one of {', '.join(_CLASSES)}", kind,
            "the other classes have no counterpart here",
        )  # fmt: skip
    path = folder / "ae.pt"
    tensors = read_pickle(path)
    k = tensors.pop("k", trainer.get("k"))
    if isinstance(k, Tensor):
        k = k.tolist()
    if k != trainer.get("k", k):
        raise InputError(f"k in {path} must be {trainer['k']!r}, as in config.json, got {k!r}")
    threshold = tensors.pop("threshold", None)
    if kind == "MatryoshkaBatchTopKSAE":
        tensors.pop("group_sizes", None)  # of the training: it decodes with all groups
    by_rows = kind in ("AutoEncoderTopK", "BatchTopKSAE")
    weights = rename_weights(tensors, _NAMES if by_rows else _PARAMETERS, path)
    turned = "W_dec" if by_rows else "W_enc"
    weights[turned] = weights[turned].T.contiguous()
    submodule = trainer.get("submodule_name")
    residual = layer_of(submodule)
    told: dict[str, Any] = {
        "standardize": False,
        "layers": () if residual is None else (residual,),
        "model": trainer.get("lm_name") or "",
        "about": {"dictionary_learning": config, **place(submodule)},
    }
    if kind == "AutoEncoderTopK":
        carried = {_THRESHOLD: threshold} if isinstance(threshold, Tensor) else {}
        return SavedSAE(weights, 0 if k is None else k, carried=carried, **told)
    if kind == "JumpReluAutoEncoder":
        weights = center(weights)
    return SavedSAE(**thresholded(weights, threshold, path, k), **told)


def files(sae: SavedSAE) -> dict[str, bytes]:
    """The files of `sae`, by name. Raises InputError if it standardizes its inputs.

    An unknown threshold is written as −1, as in an AutoEncoderTopK that was not trained long
    enough to have one.
    """
    sae.require_plain_inputs("dictionary_learning")
    theirs: dict[str, Any] = sae.settings_of("dictionary_learning", "trainer")
    layer = sae.layers[0] if len(sae.layers) == 1 else None
    trainer = {
        "trainer_class": "TopKTrainer",  # by which readers of the format tell the kind of SAE
        "dict_class": "AutoEncoderTopK",
        "layer": layer,
        "lm_name": sae.model,
        "submodule_name": None if layer is None else f"resid_post_layer_{layer}",
        **theirs.get("trainer", {}),
        "activation_dim": sae.d_in,
        "dict_size": sae.n_latents,
        "k": sae.k,
    }
    weights = {
        **sae.weights,
        "b_enc": sae.b_enc(),
        "W_dec": sae.weights["W_dec"].T.contiguous(),
    }
    tensors = {theirs: weights[ours].contiguous() for theirs, ours in _NAMES.items()}
    tensors["k"] = torch.tensor(sae.k, dtype=torch.int32)
    tensors["threshold"] = sae.carried.get(_THRESHOLD, torch.tensor(-1.0))
    content = io.BytesIO()
    torch.save(tensors, content)
    config = {**theirs, "trainer": trainer}
    return {"ae.pt": content.getvalue(), "config.json": json.dumps(config, indent=2).encode()}
