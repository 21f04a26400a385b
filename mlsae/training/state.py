"""The state of a training run, and one optimizer step.

Legend: L layers, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sparse_topk import UnitNormAdam

from .. import metrics
from ..distributed import ALONE, Group
from ..model import ACTIVE, MLSAE


class NonFiniteError(FloatingPointError):
    """A loss, or a weight, is not finite."""


class Sums:
    """What is summed over the parts of a step, or over the steps between two log lines."""

    def __init__(self, n_layers: int, d_in: int, device: torch.device) -> None:
        self.steps = 0
        self.loss = torch.zeros((), device=device)
        self.aux = torch.zeros((), device=device)
        self.sq_error = torch.zeros(n_layers, dtype=torch.float64, device=device)
        self.moments = metrics.Moments(n_layers, d_in, device)

    def fvu(self) -> Tensor:
        """(L,) of the tokens summed over; see `metrics.fvu`."""
        return metrics.fvu(self.sq_error, self.moments.count, self.moments)

    def add(self, other: Sums) -> None:
        """Take in what `other` has summed."""
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
        """Take on saved sums."""
        self.steps = state["steps"]
        for name in ("loss", "aux", "sq_error"):
            getattr(self, name).copy_(state[name])
        self.moments.load_state_dict(state["moments"])


class Trainer:
    """An MLSAE with its optimizer and all else that changes while it trains.

    Everything is counted in tokens, so batch size does not change what a run means:
    `inactive_tokens` (M,) is how many tokens ago each latent was last active; from `dead_tokens`
    on it is dead, and AuxK takes it up. The loss divides by variances of the tokens seen *before*
    the step, so that a step split in parts has the gradient of the whole.

    Of the processes of the group `data`, each has tokens of its own; with an MLSAE of several
    shards, `inactive_tokens` (M/S,) is of this shard's latents. All else is the same in all.
    """

    def __init__(
        self,
        mlsae: MLSAE,
        *,
        dead_tokens: int,
        k_aux: int,
        aux_weight: float,
        max_grad_norm: float | None = None,
        dtype: torch.dtype = torch.float32,
        data: Group = ALONE.data,
    ) -> None:
        config, sae = mlsae.config, mlsae.sae
        self.mlsae, self.data = mlsae, data
        self.dead_tokens, self.k_aux, self.aux_weight = dead_tokens, k_aux, aux_weight
        self.dtype = dtype
        self.device = sae.W_dec.device
        self.optimizer = UnitNormAdam(
            sae.parameter_groups(),
            max_grad_norm=max_grad_norm,
            total_norm=sae.total_norm,
        )
        self.tokens = 0
        self.steps = 0
        self.inactive_tokens = torch.zeros(len(sae.W_dec), dtype=torch.int64, device=self.device)
        self.moments = metrics.Moments(len(config.layers), config.d_in, self.device)
        self.error_variance: Tensor | None = None  # (L,) of x̃ − x̃̂ in the last step

    def sums(self) -> Sums:
        """Empty sums of the run's shapes."""
        return Sums(len(self.mlsae.config.layers), self.mlsae.config.d_in, self.device)

    def dead(self) -> Tensor:
        """Which of this process's latents are dead, (M,) bool."""
        return self.inactive_tokens >= self.dead_tokens

    def dead_share(self) -> float:
        """The share of all latents that are dead. All processes must call it."""
        n_dead = self.mlsae.shards.total(int(self.dead().sum()))
        return n_dead / self.mlsae.config.n_latents

    def initialize(self, moments: metrics.Moments, center: Tensor) -> None:
        """Begin with what `survey` found: the first variances, and b_pre at the center (D,)."""
        self.moments.merge(moments)
        with torch.no_grad():
            self.mlsae.sae.b_dec.copy_(center)

    def check_weights(self) -> None:
        """Raise NonFiniteError if a weight is not finite: a finite loss may have a gradient
        that is not, and such weights must not become a checkpoint."""
        for name, weight in self.mlsae.sae.named_parameters():
            if not weight.isfinite().all():
                raise NonFiniteError(
                    f"{name} is not finite after step {self.steps - 1}, {self.tokens:,} tokens. "
                    "Lower --lr, or clip with --max_grad_norm"
                )

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: tensors, and values as JSON has them. It does not
        depend on the number of processes. Of shards, all must call it, and the first one has it."""
        optimizer = {
            str(i): {
                name: self._rows(value, self.mlsae.gather_rows) for name, value in moments.items()
            }
            for i, moments in self.optimizer.state_dict()["state"].items()
        }
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "inactive_tokens": self.mlsae.gather_rows(self.inactive_tokens),
            "moments": self.moments.state_dict(),
            "error_variance": self.error_variance,
            "weights": self.mlsae.weights(),
            "optimizer": optimizer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.tokens, self.steps = state["tokens"], state["steps"]
        own_rows = self.mlsae.own_rows
        self.inactive_tokens.copy_(own_rows(state["inactive_tokens"]))
        self.moments.load_state_dict(state["moments"])
        error_variance = state["error_variance"]
        if error_variance is not None:
            error_variance = error_variance.to(self.device)
        self.error_variance = error_variance
        weights = {name: self._rows(weight, own_rows) for name, weight in state["weights"].items()}
        self.mlsae.sae.load_state_dict(weights)
        groups = self.optimizer.state_dict()["param_groups"]
        saved = {
            int(i): {name: self._rows(value, own_rows) for name, value in moments.items()}
            for i, moments in state["optimizer"].items()
        }
        self.optimizer.load_state_dict({"state": saved, "param_groups": groups})

    def _rows(self, value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
        """`value`, converted where it is a matrix: of those, each row belongs to a latent."""
        return convert(value) if isinstance(value, Tensor) and value.ndim == 2 else value

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """The context in which the SAE computes in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


class Step:
    """An optimizer step, whose tokens come in parts:

        step = Step(trainer, n_tokens)
        for x in parts:  # residuals (L, N, D), n_tokens in all parts of all processes
            step.add(x)
        step.check()
        sums = step.end(lr)

    Until its end nothing of the trainer has changed but the gradients.
    """

    def __init__(self, trainer: Trainer, n_tokens: int) -> None:
        self.trainer, self.n_tokens = trainer, n_tokens
        self.sums, self.errors = trainer.sums(), trainer.sums().moments
        self._variance = trainer.moments.variance().float()
        dead = trainer.dead().nonzero().flatten()
        self._dead = dead if trainer.mlsae.shards.total(len(dead)) else None
        self._active = torch.zeros_like(trainer.inactive_tokens, dtype=torch.bool)

    def add(self, x: Tensor) -> None:
        """Forward and backward of a part, residuals (L, N, D)."""
        trainer, sums = self.trainer, self.sums
        with trainer.autocast():
            losses = trainer.mlsae.losses(
                x,
                self._variance,
                self.n_tokens,
                dead=self._dead,
                k_aux=trainer.k_aux,
                error_variance=trainer.error_variance,
                aux_weight=trainer.aux_weight,
            )
        losses.loss.backward()
        sums.loss += losses.loss.detach()
        sums.aux += losses.aux
        sums.sq_error += losses.sq_error
        sums.moments.update(x)
        self.errors.update(losses.error)
        self._active[losses.codes.indices[losses.codes.values > ACTIVE]] = True

    def check(self) -> None:
        """Add up what the processes have found. Raise NonFiniteError, in all of them, where the
        loss is not finite; the gradients are then dropped."""
        self._reduce()
        if not math.isfinite(self.sums.loss.item()):
            self.trainer.optimizer.zero_grad()
            raise NonFiniteError(self._blame())

    def end(self, lr: float) -> Sums:
        """Update the weights, and all that is counted; the sums of the step."""
        trainer = self.trainer
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.tokens += self.n_tokens
        trainer.steps += 1
        trainer.inactive_tokens += self.n_tokens
        trainer.inactive_tokens[self._active] = 0
        trainer.moments.merge(self.sums.moments)
        trainer.error_variance = self.errors.variance().float()
        self.sums.steps = 1
        return self.sums

    def _reduce(self) -> None:
        """Sums, gradients and activity of all processes together, in each of them.

        Once a step, and not beside the backward pass: the gradients of both weights come out of
        its last function together, so there is nothing left to hide the messages behind.
        """
        trainer, sums = self.trainer, self.sums
        if trainer.data.size == 1:
            return
        parameters = [p for g in trainer.optimizer.param_groups for p in g["params"]]
        for p in parameters:
            if p.grad is None:  # of a process that has no tokens of this step
                p.grad = torch.zeros_like(p)
        trainer.data.sum_all_([p.grad for p in parameters if p.grad is not None])
        both = [sums.moments, self.errors]
        metrics.reduce(both, [sums.loss, sums.aux, sums.sq_error], trainer.data)
        self._active = trainer.data.max_(self._active.to(torch.uint8)).bool()

    def _blame(self) -> str:
        """Which layer made the loss not finite, and what to do."""
        trainer, sums = self.trainer, self.sums
        layers = trainer.mlsae.config.layers
        at = f"at step {trainer.steps}, after {trainer.tokens:,} tokens; the weights are untouched"
        for layer, mean in zip(layers, sums.moments.mean, strict=True):
            if not mean.isfinite().all():
                return (
                    f"the residuals of layer {layer} are not finite {at}. Leave that layer out "
                    "with --layers, or give a dtype of larger range with --model_dtype"
                )
        for layer, sq_error in zip(layers, sums.sq_error, strict=True):
            if not sq_error.isfinite():
                return f"the reconstruction of layer {layer} is not finite {at}. Lower --lr"
        return f"the loss is {sums.loss.item()} {at}. Lower --lr"
