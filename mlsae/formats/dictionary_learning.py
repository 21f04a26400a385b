"""dictionary_learning (`dictionary-learning`): the folder of one trainer.

ae.pt          torch.save of a state dict: encoder.weight (M, D), encoder.bias (M,),
               decoder.weight (D, M), b_dec (D,), k (), threshold ()
config.json    {trainer: {dict_class: "AutoEncoderTopK", trainer_class: "TopKTrainer",
               activation_dim, dict_size, k, layer, lm_name, submodule_name, …}, …}

It clips before it selects, as sparsify does. AutoEncoderTopK selects by k; `threshold` is a running
mean that its `encode(use_threshold=True)` alone reads, so it is carried and no output depends on
it. BatchTopKSAE has the same tensors, and does select by it: only config.json tells the two apart,
so it must be there. Checked against dictionary-learning 0.1.0.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .saved import SavedSAE, read_json, read_pickle, refuse, take

_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "b_dec": "b_dec",
}
_THRESHOLD = "dictionary_learning.threshold"


def found_in(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    return (folder / "ae.pt").is_file()


def read(folder: Path) -> SavedSAE:
    """Read it. Raises InputError if it is damaged, or no AutoEncoderTopK."""
    config = read_json(folder / "config.json")
    trainer = config.get("trainer", {})
    if trainer.get("dict_class") != "AutoEncoderTopK":
        raise refuse(
            folder / "config.json", "trainer.dict_class", "'AutoEncoderTopK'",
            trainer.get("dict_class"), "the others have no counterpart here",
        )  # fmt: skip
    path = folder / "ae.pt"
    tensors = read_pickle(path)
    k = int(tensors.pop("k", trainer.get("k", 0)))
    if k != trainer.get("k", k):
        raise InputError(f"k in {path} must be as in config.json, {trainer['k']}, got {k}")
    threshold = tensors.pop("threshold", None)
    weights = take(tensors, _NAMES, path)
    weights["W_dec"] = weights["W_dec"].T.contiguous()
    layer = trainer.get("layer")
    residual = "resid_post" in (trainer.get("submodule_name") or "")
    return SavedSAE(
        weights,
        k,
        standardize=False,
        layers=(layer,) if isinstance(layer, int) and residual else (),
        model=trainer.get("lm_name") or "",
        about={"dictionary_learning": config},
        carried={} if threshold is None else {_THRESHOLD: threshold},
    )


def files(found: SavedSAE) -> dict[str, bytes]:
    """The files of it, by name. Raises InputError if the SAE standardizes its inputs.

    A threshold that is not known is −1, as in an AutoEncoderTopK that was not trained long enough
    to have one.
    """
    found.needs_plain_inputs("dictionary_learning")
    theirs: dict[str, Any] = found.about.get("dictionary_learning", {})
    layer = found.layers[0] if len(found.layers) == 1 else None
    trainer = {
        "trainer_class": "TopKTrainer",  # what readers of the format tell the kind of SAE by
        "dict_class": "AutoEncoderTopK",
        "layer": layer,
        "lm_name": found.model,
        "submodule_name": None if layer is None else f"resid_post_layer_{layer}",
        **theirs.get("trainer", {}),
        "activation_dim": found.d_in,
        "dict_size": found.n_latents,
        "k": found.k,
    }
    weights = {
        **found.weights,
        "b_enc": found.b_enc(),
        "W_dec": found.weights["W_dec"].T.contiguous(),
    }
    tensors = {theirs: weights[ours].contiguous() for theirs, ours in _NAMES.items()}
    tensors["k"] = torch.tensor(found.k, dtype=torch.int32)
    tensors["threshold"] = found.carried.get(_THRESHOLD, torch.tensor(-1.0))
    content = io.BytesIO()
    torch.save(tensors, content)
    config = {**theirs, "trainer": trainer}
    return {"ae.pt": content.getvalue(), "config.json": json.dumps(config, indent=2).encode()}
