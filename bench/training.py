"""One training step of an MLSAE on random residuals, run by the trainer's own code: what
`bench.step` times and `bench.ledger` counts.

Legend: L layers, N tokens, D inputs, M latents.
"""

from __future__ import annotations

import torch

from mlsae.data.stream import Residuals
from mlsae.model import MLSAE, MLSAEConfig
from mlsae.training.gradients import forward_backward
from mlsae.training.loop import train_step
from mlsae.training.optimizers import Optimizers
from mlsae.training.state import TrainState

from .shapes import TrainShape

_DEAD_TOKENS = 10**7


class Training:
    """A training state, and a part of a batch: residuals x (L, N, D) as a model in `dtype` has
    them. Weights are float32; the SAE computes in `dtype`."""

    def __init__(
        self,
        shape: TrainShape,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        optimizer: str = "adam",
    ) -> None:
        torch.manual_seed(0)
        self.shape = shape
        config = MLSAEConfig(shape.d, shape.m, shape.k, tuple(range(shape.layers)))
        self.state = TrainState(
            MLSAE(config, device=device),
            schedule=lambda tokens: 1e-4,
            dead_tokens=_DEAD_TOKENS,
            k_aux=shape.k_aux,
            aux_weight=1 / 32,
            optimizers=Optimizers(optimizer, optimizer),
            dtype=dtype,
        )
        x = torch.randn(shape.layers, shape.n, shape.d, device=device, dtype=dtype)
        self.part = Residuals(x, torch.ones(shape.n, dtype=torch.bool, device=device))
        self.state.moments.update(x.float())
        self.state.error_variance = torch.ones(shape.layers, device=device)

    def kill(self) -> None:
        """Let the first `dead` latents be dead, and no others. A step that finds one of them active
        revives it, so this comes before each."""
        self.state.last_active.fill_(self.state.tokens)
        self.state.last_active[: self.shape.dead] = self.state.tokens - _DEAD_TOKENS
        self.state.n_dead = self.state.n_dead_anywhere = self.shape.dead

    def step(self) -> None:
        """A whole step: one part, the optimizer, and the counts."""
        train_step([self.state], [self.part], self.shape.n)

    def micro_step(self) -> None:
        """Forward and backward of the part alone. The gradients add up from call to call."""
        forward_backward(self.state, self._open_step, *self.part)

    def open_step(self) -> None:
        """Begin the step that `micro_step` adds to."""
        self._open_step = self.state.begin_step(self.shape.n)
