"""Train an MLSAE on harvested residuals by the code that `python -m mlsae.train` runs."""

from __future__ import annotations

import time

import torch

from mlsae.config import TrainConfig
from mlsae.data.stream import Residuals, Shape
from mlsae.distributed import ALONE
from mlsae.model import MLSAE
from mlsae.training.init import init_stats, mlsae_config
from mlsae.training.loop import train_step
from mlsae.training.start import begin, new_state

from .vectors import Vectors


def train(config: TrainConfig, vectors: Vectors) -> tuple[MLSAE, list[float]]:
    """The trained MLSAE, and the seconds of each step."""
    about = vectors.about
    shape = Shape(about.d_in, about.layers, seq_len=0)
    sae = mlsae_config(config, shape)
    state = new_state(config, sae, torch.device("cpu"), ALONE, config.tokens)
    first, _ = next(vectors.batches())
    begin(config, state, init_stats(state.mlsae, [first]))
    seconds = []
    for x, counted in vectors.batches():
        started = time.perf_counter()
        everything = torch.ones(x.shape[1], dtype=torch.bool)
        train_step([state], [Residuals(x, everything)], counted)
        seconds.append(time.perf_counter() - started)
    return state.mlsae, seconds
