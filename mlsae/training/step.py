"""What is summed over an optimizer step, and over the steps between two log lines.

Legend: L layers, N tokens, D width of the residual stream, Q dead latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_topk.torch_residuals import TokenMoments

from .. import metrics
from ..distributed import Group


class StepMetrics:
    """Losses and moments, summed over the parts of a step or over several steps."""

    def __init__(self, n_layers: int, d_in: int, device: torch.device) -> None:
        self.steps = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.aux = self.loss
        """() exactly 0 with no dead latents."""
        self.sq_error = self.loss.expand(n_layers)
        """(L,) Σ_n |x − x̂|² in the units of x."""
        self.moments = metrics.Moments(n_layers, d_in, device)
        """Of x."""
        self.errors = metrics.Moments(n_layers, d_in, device)
        """Of (x − x̂) / (σ + ε); of one step only."""
        self._is_empty = True

    def fvu(self) -> Tensor:
        """(L,) of the tokens summed over; see `metrics.fvu`."""
        return metrics.fvu(self.sq_error, self.moments.n_tokens, self.moments)

    def add_part(
        self,
        loss: Tensor,
        aux: Tensor | None,
        sq_error: Tensor,
        moments: TokenMoments,
        errors: TokenMoments,
    ) -> None:
        """Add what a part of a step has. The first one is taken as it is: a sum with zeros would
        be one more launch."""
        self._add(loss, aux, sq_error)
        self.moments.merge(moments)
        self.errors.merge(errors)

    def add(self, other: StepMetrics) -> None:
        """Add a step's."""
        self.steps += other.steps
        self._add(other.loss, other.aux, other.sq_error)
        self.moments.merge(other.moments)

    def _add(self, loss: Tensor, aux: Tensor | None, sq_error: Tensor) -> None:
        first, self._is_empty = self._is_empty, False
        self.loss = loss if first else self.loss + loss
        self.sq_error = sq_error if first else self.sq_error + sq_error
        if aux is not None:
            self.aux = self.aux + aux

    def all_reduce_(self, data: Group) -> None:
        """Add up what the processes of the group `data` have: the same in all of them."""
        sums = [t.clone() for t in (self.loss, self.aux, self.sq_error)]
        metrics.reduce([self.moments, self.errors], sums, data)
        self.loss, self.aux, self.sq_error = sums

    def state_dict(self) -> dict[str, Any]:
        """The sums, to be saved."""
        return {
            "steps": self.steps,
            "loss": self.loss,
            "aux": self.aux,
            "sq_error": self.sq_error,
            "moments": self.moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved sums."""
        self.steps, self._is_empty = state["steps"], False
        for name in ("loss", "aux", "sq_error"):
            setattr(self, name, state[name].to(getattr(self, name)))
        self.moments.load_state_dict(state["moments"])


class Step:
    """One optimizer step of one SAE on `n_tokens` tokens, which come in parts: what is fixed for
    its duration, and what its parts add up to. `TrainState.begin_step` makes one."""

    def __init__(self, n_tokens: int, factor: Tensor, dead: Tensor | None, d_in: int) -> None:
        self.n_tokens = n_tokens
        self.factor = factor
        """(L,) float64: 1 / (L · n_tokens · variance) of the tokens before this step."""
        self.dead = dead
        """(Q,) ids of this process's dead latents; None if no process has any."""
        self.n_dead = (0, 0)
        """Latents dead after the step, of this process and of all; see `TrainState.fetch`."""
        self.metrics = StepMetrics(len(factor), d_in, factor.device)
