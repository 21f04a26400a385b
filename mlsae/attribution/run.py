"""Trace a prediction, or a latent, of an opened run: what `python -m mlsae.trace` and a notebook
call.

Legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..analysis.geometry import token_strings
from ..data.residuals import ResidualReader
from ..errors import InputError
from ..intervention import Opened
from ..model import MLSAE
from .ablation import Check, ablate
from .gradient import Attribution, attribute
from .memory import check_fits, estimate, weight_bytes
from .result import Trace
from .targets import LatentTarget, LogitTarget, Target, check_active, check_latent, token_id


def trace(
    opened: Opened,
    prompt: str,
    *,
    target: str | None = None,
    against: str | None = None,
    latent: int | None = None,
    at_layer: int | None = None,
    at_token: int = -1,
    check: int = 10,
    edges: int = 0,
    tell: Callable[[str], object] | None = None,
) -> Trace:
    """What a prediction after `prompt`, or a latent in it, rests on: attributions of every active
    latent at every layer and token below it, by one forward and one backward pass (`gradient`).

        trace(open_run(OpenConfig(run=Path("runs/demo"))), "def main(", target="argv")

    The target is the logit of the token `target` (None: the likeliest) after the prompt, minus that
    of `against` or, if None, the mean of all logits; or with `latent`, its activation at the layer
    `at_layer` and the position `at_token`, where it must be active.

    The `check` strongest latents, and as many errors, are also ablated, in a pass each. `edges`
    gives what rests on what among the so many strongest latents, by one more backward pass for
    each. `tell` is given a line on memory before the pass.

    Raises InputError if an argument names nothing that can be traced, or it does not fit in memory.
    """
    check_counts(check=check, edges=edges)
    ids = opened.tokenize(prompt)
    mlsae, reader = opened.mlsae, opened.reader
    goal: Target
    if latent is None:
        if at_layer is not None or at_token != -1:
            raise InputError(
                "--at_layer and --at_token must come with --latent, got none; a prediction is "
                "that after the prompt"
            )
        goal = _logit_target(opened, prompt, ids, (target, against), tell)
    else:
        goal, ids = _latent_target(opened, ids, latent, at_layer, at_token, (target, against))
        _check_memory(opened, ids, tell)
        x = reader(ids[None].to(mlsae.sae.W_dec.device))
        check_active(goal, mlsae, x[reader.layers.index(goal.layer), 0, -1])
    found = attribute(mlsae, reader, ids, goal, edges)
    checks = _checks(mlsae, reader, ids, goal, found, check)
    strings = token_strings(opened.tokenizer, ids.tolist())
    return Trace(
        opened.name,
        ids.tolist(),
        strings,
        list(reader.layers[: goal.below(reader.layers)]),
        goal,
        _name(opened, goal, strings),
        found,
        checks,
    )


def check_counts(**counts: int) -> None:
    """Raise InputError if a count, by the name of its argument, is negative."""
    for name, value in counts.items():
        if value < 0:
            raise InputError(f"--{name} must be at least 0, got {value}")


def _logit_target(
    opened: Opened,
    prompt: str,
    ids: Tensor,
    texts: tuple[str | None, str | None],
    tell: Callable[[str], object] | None,
) -> LogitTarget:
    """The target after the prompt's ids (T,), which are known to fit in memory then."""
    chosen, other = (
        None if text is None else token_id(opened.tokenizer, prompt, text, argument)
        for text, argument in zip(texts, ("--target", "--against"), strict=True)
    )
    _check_memory(opened, ids, tell)
    if chosen is None:
        with torch.no_grad():
            logits = opened.reader.logits(ids[None].to(opened.mlsae.sae.W_dec.device))
        chosen = int(logits[0, -1].argmax())
    if chosen == other:
        raise InputError(f"--against must be another token than --target, got {texts[1]!r}")
    return LogitTarget(chosen, other)


def _latent_target(
    opened: Opened,
    ids: Tensor,
    latent: int,
    layer: int | None,
    token: int,
    texts: tuple[str | None, str | None],
) -> tuple[LatentTarget, Tensor]:
    """The target, and the ids (T,) up to its position."""
    if texts != (None, None):
        raise InputError("--target and --against must be left out with --latent, got both kinds")
    layers = opened.reader.layers
    if layer is None:
        raise InputError(f"--at_layer must be given with --latent, one of {_shown(layers[1:])}")
    goal = LatentTarget(latent, layer)
    check_latent(goal, opened.mlsae, layers)
    if not -len(ids) <= token < len(ids):
        raise InputError(
            f"--at_token must be in [{-len(ids)}, {len(ids) - 1}] (the prompt has {len(ids)} "
            f"tokens), got {token}"
        )
    return goal, ids[: token % len(ids) + 1]


def _check_memory(opened: Opened, ids: Tensor, tell: Callable[[str], object] | None) -> None:
    """Tell what tracing ids (T,) takes, and raise InputError if it does not fit."""
    mlsae, reader = opened.mlsae, opened.reader
    needed, device = estimate(mlsae, reader, ids), mlsae.sae.W_dec.device
    if tell is not None:
        tell(needed.told(weight_bytes(mlsae, reader), device))
    check_fits(needed, len(ids), device)


def _checks(
    mlsae: MLSAE,
    reader: ResidualReader,
    ids: Tensor,
    target: Target,
    found: Attribution,
    n: int,
) -> list[Check]:
    nodes, errors = found.nodes, found.errors
    strongest = (column.tolist()[:n] for column in nodes)
    chosen: list[tuple[int, int, int | None, float]] = [
        (token, layer, latent, effect)
        for token, layer, latent, _, effect in zip(*strongest, strict=True)
    ]
    for place in errors.abs().flatten().argsort(descending=True, stable=True).tolist()[:n]:
        layer, token = divmod(place, errors.shape[1])
        if errors[layer, token]:
            chosen.append((token, reader.layers[layer], None, errors[layer, token].item()))
    return [
        Check(
            token, layer, latent, effect,
            ablate(mlsae, reader, ids, target, found.value, token, layer, latent),
        )
        for token, layer, latent, effect in chosen
    ]  # fmt: skip


def _name(opened: Opened, target: Target, tokens: list[str]) -> str:
    if isinstance(target, LatentTarget):
        return (
            f"latent {target.latent} at layer {target.layer} and token {len(tokens) - 1}, "
            f"{tokens[-1]!r}"
        )
    ids = [target.token] if target.against is None else [target.token, target.against]
    named = [f"logit of {text!r}" for text in token_strings(opened.tokenizer, ids)]
    return " − ".join(named if target.against is not None else [*named, "mean of all logits"])


def _shown(layers: tuple[int, ...]) -> str:
    return " ".join(map(str, layers)) or "none: this MLSAE has one layer"
