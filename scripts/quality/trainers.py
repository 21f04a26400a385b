"""The trainers that are compared, and the peak rate that each has by default.

Legend: M latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from mlsae.config import SAEConfig, TrainConfig, law_of_rates, peak_rate

Cell = dict[str, Any]
"""What tells one training from another: trainer, factor, lr, seed, tokens, batch_tokens, layers,
n_latents, k."""


class Trainer(NamedTuple):
    """One way to train a TopK SAE."""

    package: str | None
    """Of the package index; None for this repository's own code."""
    title: str
    rate: Callable[[Cell], float]
    """The peak learning rate at factor 1: the library's default."""
    factor: float = 1.0
    """What gave the lowest FVU in a coarse sweep: see docs/quality.md."""


def own_config(cell: Cell) -> TrainConfig:
    """The settings of a training by this repository, as `mlsae.train` takes them."""
    sae = SAEConfig(n_latents=cell["n_latents"], k=cell["k"])
    config = TrainConfig(
        tokens=cell["tokens"],
        batch_tokens=cell["batch_tokens"],
        seed=cell["seed"],
        lr=cell.get("lr"),
        sae=sae,
    )
    if cell["trainer"] == "adam":
        config = replace(config, optimizer="adam")
    if cell["trainer"] == "0.2":
        old = replace(sae, init="unit")
        config = replace(config, optimizer="adam", betas=(0.9, 0.999), decay=0.2, sae=old)
    return config


def _own_rate(cell: Cell) -> float:
    config = replace(own_config(cell), lr=None)
    return peak_rate(config, cell["n_latents"], cell["tokens"])


def _by_size(rate: float) -> Callable[[Cell], float]:
    """rate / √(M / 2¹⁴), as Gao et al. and the peers that follow them."""
    return lambda cell: rate / math.sqrt(cell["n_latents"] / 2**14)


_SPARSIFY, _SAE_LENS = "eai-sparsify==1.3.3", "sae-lens==6.54.12"
_DICTIONARY_LEARNING = "dictionary-learning==0.1.0"
TRAINERS = {
    "normuon": Trainer(None, "this package", _own_rate),
    "adam": Trainer(None, "this package, `--optimizer adam`", _own_rate),
    "0.2": Trainer(None, "this package's version 0.2.0", _own_rate),
    "sparsify-signum": Trainer(
        _SPARSIFY, "sparsify, Signum + Schedule-Free (its default)", _by_size(5e-3)
    ),
    "sparsify-muon": Trainer(_SPARSIFY, "sparsify, Muon", lambda cell: 2e-3, 6),
    "sae-lens": Trainer(_SAE_LENS, "SAELens, Adam", lambda cell: 3e-4, 10),
    "dictionary-learning": Trainer(
        _DICTIONARY_LEARNING, "dictionary_learning, Adam", _by_size(2e-4), 10
    ),
}


def law(cell: Cell) -> float:
    """The unit in which the rates of our own trainers are told, whatever their default is."""
    return law_of_rates(cell["n_latents"], cell["tokens"])
