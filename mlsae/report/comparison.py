"""Several runs on one page, beside the paper's published results for the same models.

Legend: R is the expansion, latents per dimension of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go

from ..data.sinks import DropRule
from ..errors import InputError
from ..files import write_file
from .pack import pack_plots, packed_plotly, render, rounded
from .run_data import RunData, read_run_data
from .style import COLORS, GRAY, LOG_TICKS, SYMBOLS, error_bars, plot


class Metric(NamedTuple):
    """A column of the table and a plot: its heading, its axis title, the format of its values."""

    title: str
    axis: str
    form: str
    log: bool = False


METRICS = {
    "fvu": Metric("FVU", "FVU (share of variance)", "{:.4f}"),
    "fvu_paper": Metric("FVU, paper’s", "FVU as in the paper", "{:.4f}"),
    "delta_ce": Metric("ΔCE", "ΔCE (nats per token)", "{:.3f}"),
    "l1": Metric("L1", "L1 (standardized units)", "{:.1f}"),
    "ratio_a_equations": Metric("ratio A", "ratio A (equations)", "{:.3f}"),
    "ratio_a": Metric("A, released", "ratio A (released code)", "{:.3f}"),
    "ratio_b_equations": Metric("ratio B", "ratio B (equations)", "{:.4f}", True),
    "ratio_b": Metric("B, released", "ratio B (released code)", "{:.4f}", True),
    "entropy": Metric("entropy", "entropy ÷ ln L (summed activation)", "{:.3f}"),
    "mmcs": Metric("MMCS", "MMCS (cosine)", "{:.3f}"),
}
AXES = {"expansion": "R (latents ÷ d_model)", "k": "k (active latents per token)", "model": "model"}
_GLYPHS = dict(zip(SYMBOLS, "●■◆▲✖★⬢▼", strict=True))
_OPEN_GLYPHS = dict(zip(SYMBOLS, "○□◇△✕☆⬡▽", strict=True))


@dataclass(frozen=True)
class Point:
    """An MLSAE in the comparison: a run, or one of the paper's."""

    name: str
    model: str
    expansion: float
    k: int
    values: dict[str, tuple[float | None, float | None, float | None]]
    """By metric: the value and the ends of its interval. A metric not measured has no entry."""
    published: bool
    """Whether it is one of the paper's."""
    run_data: RunData | None = None

    @property
    def short_model(self) -> str:
        """The model's name without its owner or folder."""
        return self.model.rstrip("/").split("/")[-1]

    def group(self, axis: str) -> tuple[Any, ...]:
        """What stays the same along a line on which only `axis` varies."""
        fixed = {"model": self.model, "expansion": self.expansion, "k": self.k}
        return tuple(value for name, value in fixed.items() if name != axis)

    def label(self, axis: str) -> str:
        """`group` in words, for the legend."""
        fixed = {
            "model": self.short_model,
            "expansion": f"R = {self.expansion:g}",
            "k": f"k = {self.k}",
        }
        words = ", ".join(str(value) for name, value in fixed.items() if name != axis)
        return ("the paper’s " if self.published else "") + words


class Series(NamedTuple):
    """Points that one line joins, and how they are drawn."""

    points: list[Point]
    label: str
    glyph: str
    """The symbol as a character, for the legend."""
    color: str
    symbol: str
    """The symbol by Plotly's name."""


def write_comparison(folders: Sequence[Path], out: Path) -> None:
    """Write the page that compares the runs in `folders` to `out`.

    Raises InputError if a folder holds no run, or is given twice.
    """
    repeated = [folder for i, folder in enumerate(folders) if folder in folders[:i]]
    if repeated:
        raise InputError(f"RUN must be different folders, got {repeated[0]} twice; leave one out")
    read = [read_run_data(folder) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    runs = [
        _point(run, name if names.count(name) == 1 else str(run.folder))
        for run, name in zip(read, names, strict=True)
    ]
    paper = json.loads((resources.files(__package__) / "paper.json").read_text(encoding="utf-8"))
    published = _published(paper, {point.model for point in runs})
    series = {axis: _series(axis, runs, published) for axis in AXES}
    plots = {
        f"{metric}-{axis}": _plot(metric, axis, series[axis]) for axis in AXES for metric in METRICS
    }
    page = render(
        "comparison.html",
        ("packed.js", "page.js"),
        {"plotly": packed_plotly(), "plots": pack_plots(plots)},
        title=f"Comparison of {len(runs)} multi-layer SAEs",
        rows=_rows(runs, published),
        metrics=METRICS,
        axes=AXES,
        shown_axis=max(AXES, key=lambda axis: len({getattr(point, axis) for point in runs})),
        series=series,
        plots=plots,
        missing=_missing(runs),
        texts=sorted({point.run_data.dataset or "not named" for point in runs if point.run_data}),
        rules=sorted({_dropped(point.run_data) for point in runs if point.run_data}),
        source=paper["source"] if published else None,
    )
    write_file(out, page)


def _point(run: RunData, name: str) -> Point:
    ends: dict[str, tuple[Any, Any, Any]] = {}
    if run.evaluation:
        for metric in ("fvu", "fvu_paper", "delta_ce", "l1"):
            measured = run.evaluation["figures"][metric]
            ends[metric] = (measured["mean"], *measured["mean_interval"])
    elif run.validation:
        for metric in ("fvu", "fvu_paper"):
            ends[metric] = (run.validation[-1]["heldout"][metric], None, None)
    if run.analysis:
        summary = run.analysis.summary
        for metric, estimate in (
            ("ratio_a_equations", summary["ratios"]["equations"]["A"]),
            ("ratio_a", summary["ratios"]["released"]["A"]),
            ("ratio_b_equations", summary["ratios"]["equations"]["B"]),
            ("ratio_b", summary["ratios"]["released"]["B"]),
            ("entropy", summary["entropy"]["totals"]),
            ("mmcs", summary["mmcs"]),
        ):
            ends[metric] = (estimate["value"], estimate.get("low"), estimate.get("high"))
    values = {
        metric: (rounded(value), rounded(low), rounded(high))
        for metric, (value, low, high) in ends.items()
    }
    return Point(name, run.model, run.expansion, run.config["k"], values, False, run)


def _dropped(run: RunData) -> str:
    """Which tokens the metrics of a run leave out."""
    evaluated = run.evaluation.get("dropped", {}) if run.evaluation else None
    rule = run.dropped if evaluated is None else str(DropRule.from_dict(evaluated))
    return rule or "none"


def _published(paper: dict[str, Any], models: set[str]) -> list[Point]:
    """The paper's results for these models."""
    return [
        Point(
            "the paper",
            name,
            point["expansion"],
            point["k"],
            {metric: (point[metric], None, None) for metric in METRICS if metric in point},
            True,
        )
        for model in paper["models"]
        for name in model["names"]
        if name in models
        for point in model["points"]
    ]


def _series(axis: str, runs: Sequence[Point], published: Sequence[Point]) -> list[Series]:
    """The lines of every plot against `axis`. Published results are hollow markers in the color
    of the runs they are compared with."""
    series = []
    for i, group in enumerate(dict.fromkeys(point.group(axis) for point in runs)):
        color, symbol = COLORS[i % len(COLORS)], SYMBOLS[i % len(SYMBOLS)]
        for points, glyphs, suffix in ((runs, _GLYPHS, ""), (published, _OPEN_GLYPHS, "-open")):
            members = [point for point in points if point.group(axis) == group]
            if axis != "model":
                members.sort(key=lambda point: getattr(point, axis))
            if members:
                label = members[0].label(axis)
                series.append(Series(members, label, glyphs[symbol], color, symbol + suffix))
    return series


def _plot(metric: str, axis: str, series: Sequence[Series]) -> go.Figure:
    traces = []
    for points, label, _, color, symbol in series:
        measured = [point for point in points if metric in point.values]
        ends = [point.values[metric] for point in measured]
        value, low, high = zip(*ends, strict=True) if ends else ((), (), ())
        dash = "dot" if points[0].published else "solid"
        traces.append(
            go.Scatter(
                x=[
                    point.short_model if axis == "model" else getattr(point, axis)
                    for point in measured
                ],
                y=value,
                error_y=error_bars(low, value, high),
                mode="markers" if axis == "model" else "lines+markers",
                line={"color": color, "width": 1.2, "dash": dash},
                marker={"color": color, "symbol": symbol, "size": 9, "line": {"width": 1.5}},
                text=[point.name for point in measured],
                hovertemplate="%{text}<br>%{x}: %{y:.4g}<extra>" + label + "</extra>",
            )
        )
    x: dict[str, Any] = {"title": {"text": AXES[axis]}, "showgrid": False}
    if axis == "model":
        x["type"] = "category"
    else:
        ticks = sorted({getattr(point, axis) for line in series for point in line.points})
        x |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    title, log = METRICS[metric].axis, METRICS[metric].log
    y: dict[str, Any] = {"title": {"text": title}, "type": "log" if log else "linear"}
    y |= {"tickvals": LOG_TICKS} if log else {"rangemode": "tozero"}
    empty = not any(len(trace.x) for trace in traces)
    note = {"text": "not measured yet", "showarrow": False, "xref": "paper", "yref": "paper",
            "x": 0.5, "y": 0.5, "font": {"color": GRAY}}  # fmt: skip
    return plot(
        traces, x, y, showlegend=False, height=270, annotations=[note] if empty else [],
        margin={"l": 62, "r": 12, "t": 8, "b": 44},
    )  # fmt: skip


def _rows(runs: Sequence[Point], published: Sequence[Point]) -> list[Point]:
    """The rows of the table: the runs, and below the last run of each model, R and k, the paper's
    result for the same."""
    keys = [(point.model, point.expansion, point.k) for point in runs]
    rows: list[Point] = []
    for i, point in enumerate(runs):
        rows.append(point)
        if keys[i] not in keys[i + 1 :]:
            rows += [p for p in published if (p.model, p.expansion, p.k) == keys[i]]
    return rows


def _missing(runs: Sequence[Point]) -> list[str]:
    """The commands that measure what is missing."""
    commands = []
    for run in (point.run_data for point in runs):
        if run and not run.evaluation:
            commands.append(f"python -m mlsae.evaluate {run.quoted}")
        if run and not run.analysis:
            commands.append(f"python -m mlsae.analyze {run.quoted}")
    return commands
