"""What would make a training smaller or shorter, found by planning again with a flag changed.

Legend: M latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from sparse_topk import costs
from sparse_topk.costs import TrainShape

from ..config import TrainConfig, check_config, heldout_tokens
from ..errors import InputError
from .cost_model import modelled
from .gpus import PEAKS
from .plan import Plan, Setting, plan_of, setting_of
from .times import StepTime, Times

_WORTH = 0.03  # of the peak, or of the time: what is saved by a flag that is told


class Suggestion(NamedTuple):
    """A flag, and what it saves."""

    flag: str
    saves_bytes: int
    """Of the peak."""
    saves_seconds: float | None
    """Of the whole time; None if that is not known."""
    fits: bool
    """Whether the run fits with it."""


def suggestions(plan: Plan, device: torch.device) -> list[Suggestion]:
    """The flags that save something, those that save most first; if the run does not fit, only
    those that save memory. Time is by the model, or by the model's ratio to what was measured."""
    found = []
    base = plan.memory.get("Python and torch", 0)
    for flag, configs in _alternatives(plan.setting):
        try:
            for each in configs:
                check_config(each)
            setting = setting_of(configs, device, plan.free)
        except InputError:  # such as fewer latents than k
            continue
        other = plan_of(setting, plan.device, device, base, None)
        saved = plan.peak - other.peak
        seconds = _seconds(plan, setting)
        time = None if plan.times is None else plan.times.total.wall - seconds
        saves_time = plan.times and time is not None and time >= _WORTH * plan.times.total.wall
        if saved >= _WORTH * plan.peak or (plan.fits and saves_time):
            found.append(Suggestion(flag, saved, time, other.fits))
    if not plan.fits or plan.times is None:
        return sorted(found, key=lambda s: -s.saves_bytes)
    total = plan.times.total.wall

    def most(s: Suggestion) -> float:
        return max(s.saves_bytes / plan.peak, (s.saves_seconds or 0) / total)

    return sorted(found, key=most, reverse=True)


def _alternatives(setting: Setting) -> Iterator[tuple[str, list[TrainConfig]]]:
    """Flags, and the settings with each of them."""
    configs, shape = list(setting.configs), setting.shape
    config = configs[0]

    def each(change: Callable[[TrainConfig], TrainConfig]) -> list[TrainConfig]:
        return [change(one) for one in configs]

    half = setting.micro_rows // 2 * shape.seq_len
    if half:
        yield f"--micro_tokens {half}", each(lambda one: replace(one, micro_tokens=half))
    name = "expansion" if config.sae.n_latents is None else "n_latents"
    sizes = [getattr(one.sae, name) for one in configs]
    if min(sizes) > 1:
        halves = " ".join(map(str, dict.fromkeys(size // 2 for size in sizes)))
        pairs = zip(configs, sizes, strict=True)
        smaller = [replace(one, sae=replace(one.sae, **{name: size // 2})) for one, size in pairs]
        yield f"--sae.{name} {halves}", smaller
    if len(shape.layers) > 1:
        fewer = shape.layers[1::2]
        named = " ".join(map(str, fewer))
        yield (
            f"--layers {named}",
            each(lambda one: replace(one, data=replace(one.data, layers=fewer))),
        )
    if len(configs) > 1:
        yield f"{len(configs) // 2} of the {len(configs)} SAEs", configs[: len(configs) // 2]
    shards = 2 * config.shard_latents
    yield (
        f"--shard_latents {shards}, on {shards} devices",
        each(lambda one: replace(one, shard_latents=shards)),
    )
    if setting.transformer.dtype == torch.float32:
        yield (
            "--model_dtype bfloat16",
            each(lambda one: replace(one, data=replace(one.data, model_dtype="bfloat16"))),
        )
    tokens = heldout_tokens(config) // 2
    if tokens >= shape.seq_len:
        yield f"--eval_tokens {tokens}", each(lambda one: replace(one, eval_tokens=tokens))


def _seconds(plan: Plan, other: Setting) -> float:
    """The seconds that the plan takes with another setting."""
    if plan.times is None:
        return 0.0
    configs, saes, shape, micro_rows, transformer, needs = other
    if plan.times.basis == "model":
        gpu = PEAKS[plan.device]
        return modelled(configs, saes, shape, needs, transformer, gpu, micro_rows).total.wall
    if configs[0].shard_latents != plan.setting.configs[0].shard_latents:
        return plan.times.total.wall  # what several processes do here is not known
    return scaled(plan.times, plan.setting, other).total.wall


def scaled(times: Times, before: Setting, after: Setting) -> Times:
    """Measured times, with those of the model and the SAEs in the ratio of their FLOPs."""
    seq_len = before.shape.seq_len
    model = after.transformer.flop(seq_len) / before.transformer.flop(seq_len)
    part, update = (f(after) / f(before) for f in (_part_flop, _update_flop))
    step = StepTime(times.step.model * model, times.step.sae * part, times.step.optimizer * update)
    evaluated = heldout_tokens(after.configs[0]) / heldout_tokens(before.configs[0])
    work = (step.model + step.sae).wall / (times.step.model + times.step.sae).wall
    once = dict(times.once)
    if "validation" in once:
        once["validation"] *= work * evaluated
    if "first batch" in once:
        once["first batch"] *= work
    return Times(times.basis, step, times.steps, times.step_tokens, once, times.rests_on)


def _shapes(setting: Setting) -> list[TrainShape]:
    tokens = setting.needs.step_tokens
    n_layers = len(setting.shape.layers)
    return [
        TrainShape("", n_layers, tokens, sae.d_in, sae.n_latents, sae.k_max or sae.k)
        for sae in setting.saes
    ]


def _part_flop(setting: Setting) -> float:
    return sum(cost.flop for shape in _shapes(setting) for cost in costs.training_part(shape, 4))


def _update_flop(setting: Setting) -> float:
    return sum(cost.flop for shape in _shapes(setting) for cost in costs.optimizer_step(shape, 4))
