"""The state of a training: all that the next step depends on, and that a checkpoint holds.

Legend: L layers, N tokens, D width of the residual stream, M latents, S shards.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sparse_topk.shadows import Shadows

from .. import metrics
from ..batchtopk import BatchTopKSAE
from ..distributed import ALONE, Group
from ..errors import NonFiniteError
from ..model import MLSAE
from .optimizers import ADAM, Optimizers
from .selection import RunningThreshold
from .step import Step, StepMetrics


class TrainState:
    """An MLSAE with its optimizer and all else that changes while it trains.

    Everything is counted in tokens, so batch size does not change what a run means:
    `last_active` (M,) is after how many tokens each latent was last active; after `dead_tokens`
    more it is dead, and then AuxK trains it. The loss divides by variances of the tokens seen
    *before* the step, so that a step split in parts has the gradient of the whole.

    `schedule` gives the learning rate after so many tokens, and `name` tells the SAE from others
    in error messages. Each process of the group `data` has tokens of its own; with an MLSAE of S
    shards, `last_active` (M/S,) is of this shard's latents. All else is the same in all.
    """

    def __init__(
        self,
        mlsae: MLSAE,
        *,
        schedule: Callable[[int], float],
        dead_tokens: int,
        k_aux: int,
        aux_weight: float,
        optimizers: Optimizers = ADAM,
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
        self.shadows = Shadows(dtype)
        """The weights in `dtype`, which the optimizer writes with the weights."""
        self.optimizer = optimizers.of(sae, self.shadows)
        self.tokens = 0
        self.steps = 0
        self.last_active = torch.zeros(len(sae.W_dec), dtype=torch.int64, device=self.device)
        self.moments = metrics.Moments(len(config.layers), config.d_in, self.device)
        self._errors: metrics.Moments | None = None  # of (x − x̂) / (σ + ε), in the last step
        self._error_variance: Tensor | None = None
        self.n_dead = self.n_dead_anywhere = 0  # of this shard, of all shards
        self.window = self._empty_metrics()
        """Metrics of the steps since the last log line."""
        self.threshold = RunningThreshold(self.device)
        """With batchtopk, what the MLSAE's is; else not used."""

    @property
    def inactive_tokens(self) -> Tensor:
        """(M,) how many tokens ago each latent was last active."""
        return self.tokens - self.last_active

    @property
    def error_variance(self) -> Tensor | None:
        """(L,) variance of the standardized errors of the last step, which AuxK divides by: most
        steps have no use for it, so it is computed when it is asked for."""
        if self._errors is not None:
            self.error_variance = self._errors.variance()
        return self._error_variance

    @error_variance.setter
    def error_variance(self, variance: Tensor | None) -> None:
        self._error_variance, self._errors = variance, None

    def dead(self) -> Tensor:
        """Which of this process's latents are dead, (M,) bool."""
        return self.last_active <= self.tokens - self.dead_tokens

    def dead_share(self) -> float:
        """The share of all latents that are dead after the last step."""
        return self.n_dead_anywhere / self.mlsae.config.n_latents

    def initialize(self, moments: metrics.Moments, center: Tensor | None) -> None:
        """Begin with the first batch's moments (see `init.init_stats`), and b_pre at `center`, or
        where it is if None."""
        self.moments.merge(moments)
        if center is not None:
            with torch.no_grad():
                self.mlsae.sae.b_dec.copy_(center)

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """The context in which the SAE computes in `dtype`."""
        if self.dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(self.device.type, self.dtype)
        return nullcontext()

    def begin_step(self, n_tokens: int) -> Step:
        """A step of `n_tokens` tokens, in all parts of all processes."""
        dead = None
        if self.n_dead_anywhere:  # a sort, as torch's nonzero waits for the device
            dead = self.dead().sort(descending=True, stable=True).indices[: self.n_dead]
        n_layers, d_in = self.moments.mean.shape
        # 1 / (L · n_tokens · variance)
        factor = self.moments.n_tokens / (n_layers * n_tokens) / self.moments.sq_dev.sum(1)
        return Step(n_tokens, factor, dead, d_in, self._batchtopk)

    def fetch(self, step: Step) -> float:
        """The loss of a step, all parts of all processes added up, and how many latents are dead
        after it: all that the host learns of a step, in one transfer. Collective when sharded."""
        dead = self.last_active <= self.tokens + step.n_tokens - self.dead_tokens
        n_dead = dead.sum(dtype=torch.float64)
        shards = self.mlsae.shards
        n_dead_anywhere = n_dead if shards.size == 1 else shards.sum_(n_dead.clone())
        told = torch.stack([step.metrics.loss, n_dead, n_dead_anywhere])
        loss, *counts = told.tolist()
        step.n_dead = (int(counts[0]), int(counts[1]))
        return loss

    def end_step(self, step: Step) -> None:
        """Count what a step has seen, after its update of the weights."""
        self.n_dead, self.n_dead_anywhere = step.n_dead
        self.tokens += step.n_tokens
        self.steps += 1
        self.moments.merge(step.metrics.moments)
        self._errors = step.metrics.errors
        if isinstance(self.mlsae.sae, BatchTopKSAE):
            self.mlsae.sae.threshold.copy_(self.threshold.update(step.metrics.threshold))
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
                **({"threshold": self.threshold.state_dict()} if self._batchtopk else {}),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        self.window.load_state_dict(state["window"])
        saved, own_rows = state["trainer"], self.mlsae.sae.own_rows
        self.tokens, self.steps = saved["tokens"], saved["steps"]
        inactive_tokens = own_rows(saved["inactive_tokens"]).to(self.device)
        self.last_active = self.tokens - inactive_tokens
        self.n_dead = int(self.dead().sum())
        self.n_dead_anywhere = self.mlsae.shards.sum_int(self.n_dead)
        self.moments.load_state_dict(saved["moments"])
        variance = saved["error_variance"]
        self.error_variance = None if variance is None else variance.double().to(self.device)
        weights = {name: _convert(weight, own_rows) for name, weight in saved["weights"].items()}
        self.mlsae.sae.load_state_dict(weights)
        moments = {
            int(i): {name: _convert(value, own_rows) for name, value in moments.items()}
            for i, moments in saved["optimizer"].items()
        }
        if isinstance(self.mlsae.sae, BatchTopKSAE):
            self.threshold.load_state_dict(saved["threshold"])
            self.mlsae.sae.threshold.copy_(self.threshold.value())
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    @property
    def _batchtopk(self) -> bool:
        return self.mlsae.config.k_max is not None

    def _empty_metrics(self) -> StepMetrics:
        config = self.mlsae.config
        return StepMetrics(len(config.layers), config.d_in, self.device, self._batchtopk)


def _convert(value: Any, rows: Callable[[Tensor], Tensor]) -> Any:
    """`value` through `rows` if it is a matrix: of those, each row belongs to a latent."""
    return rows(value) if isinstance(value, Tensor) and value.ndim == 2 else value
