"""The state of a training: all that the next step depends on, and that a checkpoint holds.

Legend: L layers, N tokens, D width of the residual stream, M latents, S shards.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sparse_topk import UnitNormAdam

from .. import metrics
from ..distributed import ALONE, Group
from ..errors import NonFiniteError
from ..model import MLSAE
from .step import Step, StepMetrics


class TrainState:
    """An MLSAE with its optimizer and all else that changes while it trains.

    Everything is counted in tokens, so batch size does not change what a run means:
    `inactive_tokens` (M,) is how many tokens ago each latent was last active; a latent is dead from
    `dead_tokens` on, and then AuxK trains it. The loss divides by variances of the tokens seen
    *before* the step, so that a step split in parts has the gradient of the whole.

    `schedule` gives the learning rate after so many tokens, and `name` tells the SAE from others
    in error messages. Each process of the group `data` has tokens of its own; with an MLSAE of S
    shards, `inactive_tokens` (M/S,) is of this shard's latents. All else is the same in all.
    """

    def __init__(
        self,
        mlsae: MLSAE,
        *,
        schedule: Callable[[int], float],
        dead_tokens: int,
        k_aux: int,
        aux_weight: float,
        max_grad_norm: float | None = None,
        dtype: torch.dtype = torch.float32,
        data: Group = ALONE.data,
        name: str = "",
    ) -> None:
        config, sae = mlsae.config, mlsae.sae
        self.mlsae, self.data, self.name = mlsae, data, name
        self.schedule = schedule
        self.dead_tokens, self.k_aux, self.aux_weight = dead_tokens, k_aux, aux_weight
        self.dtype = dtype
        self.device = sae.W_dec.device
        self.optimizer = UnitNormAdam(
            sae.parameter_groups(), max_grad_norm=max_grad_norm, total_norm=sae.total_norm
        )
        self.tokens = 0
        self.steps = 0
        self.inactive_tokens = torch.zeros(len(sae.W_dec), dtype=torch.int64, device=self.device)
        self.moments = metrics.Moments(len(config.layers), config.d_in, self.device)
        self.error_variance: Tensor | None = None  # (L,) of x̃ − x̃̂ in the last step
        self.window = self._empty_metrics()
        """Metrics of the steps since the last log line."""

    def dead(self) -> Tensor:
        """Which of this process's latents are dead, (M,) bool."""
        return self.inactive_tokens >= self.dead_tokens

    def dead_share(self) -> float:
        """The share of all latents that are dead. Collective: every process must call it."""
        n_dead = self.mlsae.shards.sum_int(int(self.dead().sum()))
        return n_dead / self.mlsae.config.n_latents

    def initialize(self, moments: metrics.Moments, center: Tensor | None) -> None:
        """Begin with the first batch's moments (see `init.init_stats`), and b_pre at `center`, or
        where it is if None."""
        self.moments.merge(moments)
        if center is not None:
            with torch.no_grad():
                self.mlsae.sae.b_dec.copy_(center)

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """The context in which the SAE computes in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def begin_step(self, n_tokens: int) -> Step:
        """A step of `n_tokens` tokens, in all parts of all processes. Collective when sharded."""
        dead = self.dead().nonzero().flatten()
        any_dead = self.mlsae.shards.sum_int(len(dead)) > 0
        return Step(
            n_tokens,
            self.moments.variance().float(),
            dead if any_dead else None,
            len(self.inactive_tokens),
            self.mlsae.config.d_in,
        )

    def end_step(self, step: Step) -> None:
        """Count what a step has seen, after its update of the weights."""
        self.tokens += step.n_tokens
        self.steps += 1
        self.inactive_tokens += step.n_tokens
        self.inactive_tokens[step.active] = 0
        self.moments.merge(step.metrics.moments)
        self.error_variance = step.errors.variance().float()
        step.metrics.steps = 1
        self.window.add(step.metrics)

    def end_window(self) -> StepMetrics:
        """The metrics of the steps since the last call."""
        window, self.window = self.window, self._empty_metrics()
        return window

    def check_weights(self) -> None:
        """Raise NonFiniteError if a weight is not finite: a finite loss may have a gradient that
        is not, and such weights must not become a checkpoint."""
        for name, weight in self.mlsae.sae.named_parameters():
            if not weight.isfinite().all():
                raise NonFiniteError(
                    f"{self.where()}{name} is not finite after step {self.steps - 1}, "
                    f"{self.tokens:,} tokens. Lower --lr, or clip with --max_grad_norm"
                )

    def where(self) -> str:
        """How an error message begins: "in NAME, ", or nothing without a name."""
        return f"in {self.name}, " if self.name else ""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: tensors and JSON-serializable values, whatever the
        number of processes. Collective when sharded: every process must call it; only rank 0
        receives the result."""
        gather = self.mlsae.sae.gather_rows
        optimizer = {
            str(i): {name: _convert(value, gather) for name, value in moments.items()}
            for i, moments in self.optimizer.state_dict()["state"].items()
        }
        return {
            "window": self.window.state_dict(),
            "trainer": {  # the name in the files since version 0.1
                "tokens": self.tokens,
                "steps": self.steps,
                "inactive_tokens": gather(self.inactive_tokens),
                "moments": self.moments.state_dict(),
                "error_variance": self.error_variance,
                "weights": self.mlsae.weights(),
                "optimizer": optimizer,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        self.window.load_state_dict(state["window"])
        saved, own_rows = state["trainer"], self.mlsae.sae.own_rows
        self.tokens, self.steps = saved["tokens"], saved["steps"]
        self.inactive_tokens.copy_(own_rows(saved["inactive_tokens"]))
        self.moments.load_state_dict(saved["moments"])
        error_variance = saved["error_variance"]
        if error_variance is not None:
            error_variance = error_variance.to(self.device)
        self.error_variance = error_variance
        weights = {name: _convert(weight, own_rows) for name, weight in saved["weights"].items()}
        self.mlsae.sae.load_state_dict(weights)
        moments = {
            int(i): {name: _convert(value, own_rows) for name, value in moments.items()}
            for i, moments in saved["optimizer"].items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _empty_metrics(self) -> StepMetrics:
        return StepMetrics(len(self.mlsae.config.layers), self.mlsae.config.d_in, self.device)


def _convert(value: Any, rows: Callable[[Tensor], Tensor]) -> Any:
    """`value` through `rows` if it is a matrix: of those, each row belongs to a latent."""
    return rows(value) if isinstance(value, Tensor) and value.ndim == 2 else value
