"""Lenses with random maps, and the files of the tuned-lens package.

Legend: L layers, D width of the residual stream.
"""

import json

import torch

from mlsae.basis import Lens


def random_lens(n_layers, d_in, layers=None, seed=4, **about):
    """A lens with maps near the identity, of all layers but the last."""
    layers = tuple(range(n_layers - 1)) if layers is None else layers
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(layers), d_in, d_in, generator=generator) / (2 * d_in**0.5)
    bias = torch.randn(len(layers), d_in, generator=generator)
    return Lens(layers, torch.eye(d_in) + noise, bias, n_layers, {"kind": "random", **about})


def translators(n_layers, d_in):
    """W (L, D, D) and b (L, D) of the tuned-lens package's translators: h + W h + b."""
    generator = torch.Generator().manual_seed(6)
    weights = torch.randn(n_layers, d_in, d_in, generator=generator) / (3 * d_in**0.5)
    return weights, torch.randn(n_layers, d_in, generator=generator)


def save_tuned_lens(folder, n_layers, d_in, model="lab/model", **changes):
    """Write a lens as the tuned-lens package, version 0.2.0, saves it."""
    folder.mkdir(parents=True)
    weights, biases = translators(n_layers, d_in)
    state = {}
    for i in range(n_layers):
        state |= {f"{i}.weight": weights[i], f"{i}.bias": biases[i]}
    torch.save(state, folder / "params.pt")
    config = {
        "base_model_name_or_path": model, "d_model": d_in, "num_hidden_layers": n_layers,
        "bias": True, "base_model_revision": None, "unembed_hash": "0" * 64,
        "lens_type": "linear_tuned_lens", **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
