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
from .selection import Selected

_SUMS = ("loss", "aux", "sq_error")
_SELECTED = ("threshold", "capped")  # with batchtopk


class StepMetrics:
    """Losses and moments, summed over the parts of a step or over several steps."""

    def __init__(
        self, n_layers: int, d_in: int, device: torch.device, batchtopk: bool = False
    ) -> None:
        self.steps = 0
        self._names = (*_SUMS, *_SELECTED) if batchtopk else _SUMS
        self._shape, self._device = (n_layers,), device
        self._sums: dict[str, Tensor] = {}  # those that are not 0: a sum with 0 would be a launch
        self.moments = metrics.Moments(n_layers, d_in, device)
        """Of x."""
        self.errors = metrics.Moments(n_layers, d_in, device)
        """Of (x − x̂) / (σ + ε); of one step only."""

    @property
    def loss(self) -> Tensor:
        """() float64."""
        return self._sum("loss", ())

    @property
    def aux(self) -> Tensor:
        """() float64, the AuxK loss; exactly 0 with no dead latents."""
        return self._sum("aux", ())

    @property
    def sq_error(self) -> Tensor:
        """(L,) float64, Σ_n |x − x̂|² in the units of x."""
        return self._sum("sq_error", self._shape)

    @property
    def threshold(self) -> Tensor:
        """() float64, the mean over the tokens of the thresholds that they were selected by."""
        return self._sum("threshold", ()) / self.moments.n_tokens.clamp_min(1)

    @property
    def capped_share(self) -> Tensor:
        """() float64, the share of vectors whose candidates all stayed; see `selection`."""
        n_vectors = self.moments.n_tokens * self._shape[0]
        return self._sum("capped", ()) / n_vectors.clamp_min(1)

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
        selected: Selected | None = None,
    ) -> None:
        """Add what a part of a step has."""
        self._add(loss=loss, aux=aux, sq_error=sq_error)
        if selected is not None:
            self._add(**selected._asdict())
        self.moments.merge(moments)
        self.errors.merge(errors)

    def add(self, other: StepMetrics) -> None:
        """Add a step's."""
        self.steps += other.steps
        self._add(**other._sums)
        self.moments.merge(other.moments)

    def all_reduce_(self, data: Group) -> None:
        """Add up what the processes of the group `data` have: the same in all of them."""
        sums = {name: sum_.clone() for name, sum_ in self._all_sums().items()}
        metrics.reduce([self.moments, self.errors], list(sums.values()), data)
        self._sums = sums

    def _all_sums(self) -> dict[str, Tensor]:
        shapes = {"sq_error": self._shape}
        return {name: self._sum(name, shapes.get(name, ())) for name in self._names}

    def _sum(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name in self._sums:
            return self._sums[name]
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    def _add(self, **sums: Tensor | None) -> None:
        for name, value in sums.items():
            if value is not None:
                own = self._sums.get(name)
                self._sums[name] = value if own is None else own + value

    def state_dict(self) -> dict[str, Any]:
        """The sums, to be saved."""
        return {
            "steps": self.steps,
            **self._all_sums(),
            "moments": self.moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved sums."""
        self.steps = state["steps"]
        self._sums = {name: state[name].double().to(self._device) for name in self._names}
        self.moments.load_state_dict(state["moments"])


class Step:
    """One optimizer step of one SAE on `n_tokens` tokens, which come in parts: what is fixed for
    its duration, and what its parts add up to. `TrainState.begin_step` makes one."""

    def __init__(
        self,
        n_tokens: int,
        factor: Tensor,
        dead: Tensor | None,
        d_in: int,
        batchtopk: bool = False,
    ) -> None:
        self.n_tokens = n_tokens
        self.factor = factor
        """(L,) float64: 1 / (L · n_tokens · variance) of the tokens before this step."""
        self.dead = dead
        """(Q,) ids of this process's dead latents; None if no process has any."""
        self.n_dead = (0, 0)
        """Latents dead after the step, of this process and of all; see `TrainState.fetch`."""
        self.metrics = StepMetrics(len(factor), d_in, factor.device, batchtopk)
