"""A plan as tables to read, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cli import empty_table
from .plan import Plan
from .suggestions import Suggestion
from .times import Times

_NAMES = {
    "transformer": "transformer's weights",
    "state": "SAE: weights, gradients, optimizer",
    "residuals": "residuals of a part",
    "activations": "activations and workspaces",
    "validation": "validation, beyond a step",
}


def as_dict(plan: Plan, found: Sequence[Suggestion]) -> dict[str, Any]:
    """The plan: numbers in bytes, seconds and tokens; JSON-serializable."""
    needs, transformer, times = plan.setting.needs, plan.setting.transformer, plan.times
    disk = needs.disk
    return {
        "device": plan.device,
        "transformer": {
            "parameters": transformer.parameters,
            "blocks": transformer.blocks,
            "dtype": str(transformer.dtype).removeprefix("torch."),
        },
        "saes": [
            {
                "name": config.sae.name,
                "n_latents": sae.n_latents,
                "parameters": _parameters(plan, i),
                "optimizer": plan.optimizers[i],
                "peak_rate": plan.peak_rates[i],
            }
            for i, (config, sae) in enumerate(
                zip(plan.setting.configs, plan.setting.saes, strict=True)
            )
        ],
        "steps": needs.steps,
        "step_tokens": needs.step_tokens,
        "memory": {
            "parts": plan.memory,
            "peak": plan.peak,
            "if_all_latents_die": plan.peak + plan.dead,
            "free": plan.free,
            "fits": plan.fits,
        },
        "disk": {
            "checkpoint": disk.checkpoint,
            "checkpoints_written": needs.checkpoints,
            "checkpoints_kept": disk.kept,
            "models": disk.models,
            "rest": disk.rest,
            "most": disk.most,
        },
        "time": None if times is None else _time_dict(times),
        "suggestions": [suggestion._asdict() for suggestion in found],
    }


def _time_dict(times: Times) -> dict[str, Any]:
    return {
        "basis": times.basis,
        "rests_on": times.rests_on,
        "queued": times.queued,
        "tokens_per_second": times.tokens_per_second,
        "seconds": times.total.wall,
        "cpu_seconds": times.total.cpu if times.basis == "probe" else None,
        "parts": {name: span.wall for name, span in times.parts.items()},
    }


def print_plan(plan: Plan, found: Sequence[Suggestion]) -> None:
    """Print the plan."""
    console = Console(highlight=False)
    setting, needs = plan.setting, plan.setting.needs
    transformer, disk = setting.transformer, needs.disk
    blocks = f"{transformer.blocks} of its {transformer.whole} blocks"
    lines = [
        f"transformer: {transformer.parameters:,} parameters with {blocks}, in "
        f"{str(transformer.dtype).removeprefix('torch.')}"
    ]
    for i, (config, sae) in enumerate(zip(setting.configs, setting.saes, strict=True)):
        lines.append(
            f"SAE {config.sae.name}: {_parameters(plan, i):,} parameters, {sae.n_latents:,} "
            f"latents; {plan.optimizers[i]}, peak learning rate {plan.peak_rates[i]:.2e}"
        )
    lines.append(
        f"{needs.steps:,} steps of {needs.step_tokens:,} tokens, in parts of "
        f"{setting.micro_rows * setting.shape.seq_len:,}"
    )
    console.print(*lines, sep="\n", soft_wrap=True)
    console.print(_memory_table(plan))
    free = "" if plan.free is None else f"; {size(plan.free)} is free"
    fits = "it fits" if plan.fits else "it does not fit"
    console.print(
        f"{fits}: {size(plan.peak)}{free}; up to {size(plan.dead)} more if latents die",
        f"disk: a checkpoint of {size(disk.checkpoint)} {needs.checkpoints}, of which {disk.kept} "
        f"stay; model {size(disk.models)}, the rest at most {size(disk.rest)}: "
        f"{size(disk.most)} at most",
        sep="\n", soft_wrap=True,
    )  # fmt: skip
    if plan.times is None:
        why = "it does not fit" if not plan.fits else "it takes several processes"
        console.print(f"time: not measured, since {why}; --gpu NAME gives a model", soft_wrap=True)
    else:
        console.print(_time_table(plan.times))
        console.print(_spoken(plan.times), soft_wrap=True)
    for suggestion in found:
        console.print(_said(suggestion, plan), soft_wrap=True)


def _parameters(plan: Plan, i: int) -> int:
    sae = plan.setting.saes[i]
    return 2 * sae.n_latents * sae.d_in + sae.d_in + sae.bias * sae.n_latents


def _memory_table(plan: Plan) -> Table:
    table = empty_table(f"Peak memory, {plan.device}", ("part", "size"), left=("part",))
    for name, n_bytes in plan.memory.items():
        table.add_row(_NAMES.get(name, name), size(n_bytes))
    table.add_section()
    table.add_row("all", size(plan.peak))
    return table


def _time_table(times: Times) -> Table:
    here = times.basis == "probe"
    title = "Time, measured here by a probe" if here else "Time, by a model: nothing was measured"
    headings = ("part", "by the clock", *(["of the processor"] if here else []))
    table = empty_table(title, headings, left=("part",))
    for name, span in (*times.parts.items(), ("all", times.total)):
        if name == "all":
            table.add_section()
        table.add_row(name, duration(span.wall), *([duration(span.cpu)] if here else []))
    return table


def _spoken(times: Times) -> str:
    kind = "probe" if times.basis == "probe" else "model"
    rests = "; ".join(times.rests_on)
    busy = (
        f"; a guess, for this machine is busy: other processes had the processor for "
        f"{times.queued:.0%} of the time that the probe could have run" if times.busy else ""
    )  # fmt: skip
    return (
        f"{kind}: {times.tokens_per_second:,.0f} tokens/s while it trains, "
        f"{times.total.wall / 3600:.2f} hours in all{busy}\nthis rests on: {rests}"
    )


def _said(suggestion: Suggestion, plan: Plan) -> str:
    flag, saved, seconds, fits = suggestion
    saves = [f"{size(saved)} of memory ({saved / plan.peak:.0%})"] if saved > 0 else []
    if seconds is not None and plan.times and seconds > 0.01 * plan.times.total.wall:
        share = seconds / plan.times.total.wall
        saves.append(f"{duration(seconds)} ({share:.0%})")
    then = "" if plan.fits else ("; then it fits" if fits else "; it still does not fit")
    return f"{flag} saves {' and '.join(saves) or 'nothing'}{then}"


def size(n_bytes: float) -> str:
    """Bytes to read: "1.23 GB", "45 MB"."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds to read: "3.2 s", "4.5 min", "12.3 h"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
