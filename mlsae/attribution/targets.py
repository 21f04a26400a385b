"""What is attributed: a number that a forward pass computes, at the last of its tokens.

Legend: L layers, T tokens, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..model import MLSAE

_LISTED = 8  # latents in an error


@dataclass(frozen=True)
class LogitTarget:
    """The logit of a token after the last one, minus that of another; or, if none is given, minus
    the mean of all logits, as attribution graphs do (Ameisen et al., Circuit Tracing, 2025): what
    softmax does not see, a constant added to all logits, is not attributed."""

    token: int
    """Its id."""
    against: int | None = None

    def value(
        self, mlsae: MLSAE, layers: Sequence[int], residuals: Sequence[Tensor], logits: Tensor
    ) -> Tensor:
        """The target, a scalar in float32 or float64, of the residuals (1, T, D) of `layers` and
        logits (1, T, V)."""
        last = logits[0, -1].to(torch.promote_types(logits.dtype, torch.float32))
        return last[self.token] - (last.mean() if self.against is None else last[self.against])

    def below(self, layers: Sequence[int]) -> int:
        """How many of `layers` the target depends on."""
        return len(layers)


@dataclass(frozen=True)
class LatentTarget:
    """The activation h of a latent at a layer and the last token, 0 if it is not among the active
    ones."""

    latent: int
    layer: int

    def value(
        self, mlsae: MLSAE, layers: Sequence[int], residuals: Sequence[Tensor], logits: Tensor
    ) -> Tensor:
        """As of `LogitTarget`."""
        x = residuals[layers.index(self.layer)][0, -1]
        return activation(mlsae, x, self.latent, self.layer)

    def below(self, layers: Sequence[int]) -> int:
        """As of `LogitTarget`."""
        return layers.index(self.layer)


Target = LogitTarget | LatentTarget


def activation(mlsae: MLSAE, x: Tensor, latent: int, layer: int) -> Tensor:
    """h of a latent in a residual vector x (D,) of a layer, differentiable where it is active."""
    values, indices = mlsae.encode(x, layer)
    return (values * (indices == latent)).sum()


def check_latent(target: LatentTarget, mlsae: MLSAE, layers: Sequence[int]) -> None:
    """Raise InputError unless the target is a latent of `mlsae`, at one of `layers` that is not the
    first."""
    if not 0 <= target.latent < mlsae.config.n_latents:
        raise InputError(
            f"--latent must be in [0, {mlsae.config.n_latents - 1}], got {target.latent}"
        )
    if target.layer not in layers[1:]:
        raise InputError(
            "--at_layer must be a layer that the MLSAE was trained on and has one below it "
            f"({' '.join(map(str, layers[1:])) or 'this MLSAE has none'}), got {target.layer}"
        )


def check_active(target: LatentTarget, mlsae: MLSAE, x: Tensor) -> None:
    """Raise InputError if the target is not active in its residual vector x (D,): its activation
    then has no gradient."""
    values, indices = mlsae.encode(x, target.layer)
    if not (values[indices == target.latent] > 0).any():
        strongest = values.argsort(descending=True)[:_LISTED]
        active = [str(int(indices[i])) for i in strongest if values[i] > 0]
        raise InputError(
            f"--latent must be active at --at_layer {target.layer} and --at_token, and "
            f"{target.latent} is not; the most active there are {', '.join(active) or 'none'}"
        )


def token_id(tokenizer: Any, prompt: str, text: str, argument: str) -> int:
    """The id of the one token that `text` is where it follows `prompt`. Raises InputError if it is
    none, or several."""
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(alone) == 1:
        return int(alone[0])
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(prompt + text)["input_ids"]
    # A tokenizer may write a text that stands alone in another way than one that goes on.
    if len(after) == len(before) + 1 and after[:-1] == before:
        return int(after[-1])
    parts = " ".join(repr(tokenizer.decode([i])) for i in alone)
    raise InputError(
        f"{argument} must be one token of the model, and {text!r} is {len(alone)}"
        f"{f' ({parts})' if parts else ''}; give one of them, with the space before it if it "
        "begins a word"
    )
