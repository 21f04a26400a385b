"""Train an MLSAE on harvested residuals by the code that `python -m mlsae.train` runs."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from mlsae.config import TrainConfig
from mlsae.data.stream import Residuals, Shape
from mlsae.distributed import ALONE, Mesh
from mlsae.model import MLSAE
from mlsae.training.init import fit_scale_, init_stats, mlsae_config
from mlsae.training.loop import train_step
from mlsae.training.run import new_state

from .vectors import Vectors


class _Place(NamedTuple):
    """All that `new_state` asks of a stream."""

    device: torch.device = torch.device("cpu")
    mesh: Mesh = ALONE


def train(config: TrainConfig, vectors: Vectors) -> tuple[MLSAE, list[float]]:
    """The trained MLSAE, and the seconds of each step."""
    about = vectors.about
    shape = Shape(about.d_in, about.layers, seq_len=0)
    state = new_state(config, mlsae_config(config, shape), _Place(), config.tokens)
    first, _ = next(vectors.batches())
    batch = init_stats(state.mlsae, [first])
    state.initialize(batch.moments, batch.center)
    if config.sae.init == "fitted":
        fit_scale_(state.mlsae.sae, batch.vectors)
    seconds = []
    for x, counted in vectors.batches():
        started = time.perf_counter()
        everything = torch.ones(x.shape[1], dtype=torch.bool)
        train_step([state], [Residuals(x, everything)], counted)
        seconds.append(time.perf_counter() - started)
    return state.mlsae, seconds
