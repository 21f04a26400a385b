"""The tuned-lens package (Belrose et al., arXiv 2303.08112; version 0.2.0): the folder of a lens.

config.json    {base_model_name_or_path, d_model, num_hidden_layers, bias, base_model_revision,
               unembed_hash, lens_type: "linear_tuned_lens"}
params.pt      torch.save of "i.weight" (D, D) and "i.bias" (D,), i = 0 … num_hidden_layers − 1:
               translator i maps the *input* of block i to h + W h + b

So translator i belongs to layer i − 1 here, as a layer is the output of its block; translator 0 is
of the embeddings, which are no layer, and the last layer has no translator, but the identity.

The paper's own code (tim-lawson/mlsae) gave translator ℓ the output of block ℓ instead, the last
one's too, since its list of hidden states begins after the first block. Its `-lens` checkpoints
were trained so, and mean what they mean only so. Of fewer layers than all, it took translator p for
the p-th of them.

Legend: D width of the residual stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..basis import Lens
from ..errors import InputError
from .saved import is_integer, read_json, read_pickle, unsupported

_CONFIG, _PARAMETERS, _TYPE = "config.json", "params.pt", "linear_tuned_lens"


def matches(folder: Path) -> bool:
    """Whether `folder` holds this format."""
    return (folder / _PARAMETERS).is_file() and (folder / _CONFIG).is_file()


def read(folder: Path, trained_on: tuple[int, ...] | None = None) -> Lens:
    """Read the lens; with `trained_on`, the translators that the paper's own code took for an MLSAE
    of these layers (empty: of all). Raises InputError if it is damaged, or of another type."""
    config, path = read_json(folder / _CONFIG), folder / _PARAMETERS
    if config.get("lens_type", _TYPE) != _TYPE:
        raise unsupported(
            folder / _CONFIG, "lens_type", _TYPE, config["lens_type"], "give another lens"
        )
    n_layers, d_in = config.get("num_hidden_layers"), config.get("d_model")
    if not is_integer(n_layers) or not is_integer(d_in) or n_layers < 2 or d_in < 1:
        raise InputError(
            f"num_hidden_layers and d_model in {folder / _CONFIG} must be integers, 2 and 1 or "
            f"more, got {n_layers!r} and {d_in!r}"
        )
    if trained_on is None:
        translators = {layer: layer + 1 for layer in range(n_layers - 1)}
    else:
        layers = trained_on or tuple(range(n_layers))
        translators = {layer: place for place, layer in enumerate(layers)}
    state, biased = read_pickle(path), config.get("bias", True)
    eye, no_bias = torch.eye(d_in), torch.zeros(d_in)
    matrices, biases = [], []
    for i in translators.values():
        matrices.append(eye + _tensor(state, f"{i}.weight", (d_in, d_in), path))
        biases.append(_tensor(state, f"{i}.bias", (d_in,), path) if biased else no_bias)
    about: dict[str, Any] = {
        "kind": "tuned-lens" if trained_on is None else "tuned-lens, as the paper's code took it",
        "model": config.get("base_model_name_or_path", ""),
        "revision": config.get("base_model_revision"),
    }
    return Lens(tuple(translators), torch.stack(matrices), torch.stack(biases), n_layers, about)


def _tensor(state: dict[str, Any], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    found = state.get(name)
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else "none"
        raise InputError(
            f"{path} must hold {name} of the shape {shape}, as its config.json says, got {got}"
        )
    return found.float()
