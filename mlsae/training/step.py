"""What is summed over an optimizer step, and over the steps between two log lines.

Legend: L layers, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..distributed import Group
from ..model import ACTIVE


class StepMetrics:
    """Losses and moments, summed over the parts of a step or over several steps."""

    def __init__(self, n_layers: int, d_in: int, device: torch.device) -> None:
        self.steps = 0
        self.loss = torch.zeros((), device=device)
        self.aux = torch.zeros((), device=device)
        self.sq_error = torch.zeros(n_layers, dtype=torch.float64, device=device)
        self.moments = metrics.Moments(n_layers, d_in, device)

    def fvu(self) -> Tensor:
        """(L,) of the tokens summed over; see `metrics.fvu`."""
        return metrics.fvu(self.sq_error, self.moments.n_tokens, self.moments)

    def add(self, other: StepMetrics) -> None:
        """Add the sums of `other`."""
        self.steps += other.steps
        self.loss += other.loss
        self.aux += other.aux
        self.sq_error += other.sq_error
        self.moments.merge(other.moments)

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
        self.steps = state["steps"]
        for name in ("loss", "aux", "sq_error"):
            getattr(self, name).copy_(state[name])
        self.moments.load_state_dict(state["moments"])


class Step:
    """One optimizer step of one SAE on `n_tokens` tokens, which come in parts: what is fixed for
    its duration, and what its parts add up to. `TrainState.begin_step` makes one."""

    def __init__(
        self, n_tokens: int, variance: Tensor, dead: Tensor | None, n_latents: int, d_in: int
    ) -> None:
        device = variance.device
        self.n_tokens = n_tokens
        self.variance = variance
        """(L,) of the tokens before this step: what the loss divides by."""
        self.dead = dead
        """(Q,) ids of this process's dead latents; None if no process has any."""
        self.n_dead = (0, 0)
        """Latents dead after the step, of this process and of all; see `TrainState.fetch`."""
        self.metrics = StepMetrics(len(variance), d_in, device)
        self.errors = metrics.Moments(len(variance), d_in, device)
        """Of (x − x̂) / (σ + ε)."""
        # One place more, for what is not active: so nothing is chosen by a mask, whose length the
        # host would wait for.
        self._active = torch.zeros(n_latents + 1, dtype=torch.bool, device=device)

    @property
    def active(self) -> Tensor:
        """(M,) whether a latent was active at any token."""
        return self._active[:-1]

    def update(
        self,
        loss: Tensor,
        aux: Tensor,
        sq_error: Tensor,
        moments: metrics.AnyMoments,
        errors: metrics.AnyMoments,
    ) -> None:
        """Add what a part adds to the metrics."""
        self.metrics.loss += loss
        self.metrics.aux += aux
        self.metrics.sq_error += sq_error
        self.metrics.moments.merge(moments)
        self.errors.merge(errors)

    def mark_active(self, values: Tensor, indices: Tensor, mask: Tensor | None) -> None:
        """Note which latents are active at a part's tokens, values and indices (L·N, K), of which
        mask (N,) is True where they count."""
        is_active = values > ACTIVE
        if mask is not None:
            is_active &= mask.repeat(len(self.metrics.sq_error))[:, None]
        chosen = torch.where(is_active, indices, len(self.active))
        self._active.index_fill_(0, chosen.flatten(), True)

    def all_reduce_(self, data: Group) -> None:
        """Add up what the processes of the group `data` have: the same in all of them."""
        if data.size == 1:
            return
        total = self.metrics
        sums = [total.loss, total.aux, total.sq_error]
        metrics.reduce([total.moments, self.errors], sums, data)
        self._active = data.max_(self._active.to(torch.uint8)).bool()
