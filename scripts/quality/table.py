"""The table of a comparison."""

from __future__ import annotations

from collections.abc import Iterable

from .results import Line
from .trainers import TRAINERS, law

_HEADINGS = (
    "trainer", "peak rate", "seeds", "FVU", "ΔCE, nats", "recovered", "never active", "s a step",
)  # fmt: skip


def table(lines: Iterable[Line]) -> str:
    """Markdown: a row for each trainer and rate, its seeds together, lowest FVU first. ± is half
    the difference between the largest and the smallest of the seeds."""
    groups: dict[tuple[str, float], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["trainer"], line["lr"]), []).append(line)
    ordered = sorted(groups.values(), key=lambda group: _mean(group, "fvu"))
    rows = [_HEADINGS, ("---",) * len(_HEADINGS), *map(_row, ordered)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(group: list[Line]) -> tuple[str, ...]:
    first = group[0]
    trainer = TRAINERS[first["trainer"]]
    unit = "law" if trainer.package is None else "default"
    times = first["lr"] / law(first) if trainer.package is None else first["factor"]
    return (
        trainer.title,
        f"{first['lr']:.2g} ({times:.3g} × {unit})",
        " ".join(str(seed) for seed in sorted(line["seed"] for line in group)),
        _spread(group, "fvu"),
        _spread(group, "delta_ce"),
        f"{_mean(group, 'recovered_mean'):.1%}",
        f"{_mean(group, 'never_active'):.1%}",
        f"{_mean(group, 'step_seconds'):.2f}",
    )


def _mean(group: list[Line], name: str) -> float:
    return sum(line[name] for line in group) / len(group)


def _spread(group: list[Line], name: str) -> str:
    """The mean ± half the range; of a single seed, the value alone."""
    values = [line[name] for line in group]
    mean = f"{_mean(group, name):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"
