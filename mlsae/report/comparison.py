"""Several runs side by side, beside the paper's published numbers where the model is one of theirs.

R is the expansion: latents per dimension of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go

from ..errors import InputError
from ..files import write_file
from .pack import number, pack_figures, packed_plotly, render
from .run_data import Run, read_run_data
from .style import GRAY, LOG_TICKS, SERIES, SYMBOLS, bars_between, figure


class Metric(NamedTuple):
    """A figure of a run: what it is called, and how it is written."""

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
AXES = {"expansion": "R (latents ÷ d_model)", "k": "k (active latents a token)", "model": "model"}
_GLYPHS = dict(zip(SYMBOLS, "●■◆▲✖★⬢▼", strict=True))
_OPEN_GLYPHS = dict(zip(SYMBOLS, "○□◇△✕☆⬡▽", strict=True))


@dataclass(frozen=True)
class Point:
    """An MLSAE in the figures: a run, or one of the paper's."""

    name: str
    model: str
    expansion: float
    k: int
    values: dict[str, tuple[float | None, float | None, float | None]]
    """By metric: value, and the ends of its interval; nothing where it was not measured."""
    paper: bool
    run: Run | None = None

    @property
    def short_model(self) -> str:
        """The model without its owner or folder."""
        return self.model.rstrip("/").split("/")[-1]

    def group(self, axis: str) -> tuple[Any, ...]:
        """What is held fixed where `axis` varies."""
        held = {"model": self.model, "expansion": self.expansion, "k": self.k}
        return tuple(value for name, value in held.items() if name != axis)

    def label(self, axis: str) -> str:
        """The same in words."""
        held = {
            "model": self.short_model,
            "expansion": f"R = {self.expansion:g}",
            "k": f"k = {self.k}",
        }
        words = ", ".join(str(value) for name, value in held.items() if name != axis)
        return ("the paper’s " if self.paper else "") + words


def write_comparison(folders: Sequence[Path], out: Path) -> None:
    """Write the page that compares the runs in `folders`.

    Raises InputError if one of them holds no run, or is given twice.
    """
    twice = [folder for i, folder in enumerate(folders) if folder in folders[:i]]
    if twice:
        raise InputError(f"RUN must be different folders, got {twice[0]} twice; leave one out")
    names = [folder.resolve().name for folder in folders]
    runs = [
        _point(read_run_data(folder), name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]
    paper = json.loads((resources.files(__package__) / "paper.json").read_text(encoding="utf-8"))
    published = _published(paper, {point.model for point in runs})
    axis = max(AXES, key=lambda name: len({getattr(point, name) for point in runs}))
    figures, keys = {}, {}
    for name in AXES:
        for metric in METRICS:
            figures[f"{metric}-{name}"] = _figure(metric, name, runs, published)
        keys[name] = [
            (glyph, color, first.label(name))
            for first, _, glyph, color, _ in _series(name, runs, published)
        ]
    page = render(
        "comparison.html",
        ("page.js",),
        {"plotly": packed_plotly(), "figures": pack_figures(figures)},
        title=f"Comparison of {len(runs)} multi-layer SAEs",
        rows=_rows(runs, published),
        metrics=METRICS,
        axes=AXES,
        axis=axis,
        keys=keys,
        figures=figures,
        missing=_missing(runs),
        texts=sorted({str(point.run.config.get("training", {}).get("dataset") or "not named")
                      for point in runs if point.run}),
        source=paper["source"] if published else None,
    )  # fmt: skip
    write_file(out, page)


def _point(run: Run, title: str) -> Point:
    values: dict[str, tuple[float | None, float | None, float | None]] = {}
    if run.evaluation:
        for name in ("fvu", "fvu_paper", "delta_ce", "l1"):
            found = run.evaluation["figures"][name]
            values[name] = (found["mean"], *found["mean_interval"])
    elif run.heldout:
        for name in ("fvu", "fvu_paper"):
            values[name] = (run.heldout[-1]["heldout"][name], None, None)
    if run.analysis:
        about = run.analysis.about
        for name, found in (
            ("ratio_a_equations", about["ratios"]["equations"]["A"]),
            ("ratio_a", about["ratios"]["released"]["A"]),
            ("ratio_b_equations", about["ratios"]["equations"]["B"]),
            ("ratio_b", about["ratios"]["released"]["B"]),
            ("entropy", about["entropy"]["totals"]),
            ("mmcs", about["mmcs"]),
        ):
            values[name] = (found["value"], found.get("low"), found.get("high"))
    values = {name: tuple(map(number, ends)) for name, ends in values.items()}  # type: ignore[misc]
    model = str(run.config.get("model") or "not named")
    return Point(title, model, run.expansion, run.config["k"], values, False, run)


def _published(paper: dict[str, Any], models: set[str]) -> list[Point]:
    """The paper's points of these models."""
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


def _series(
    axis: str, runs: Sequence[Point], published: Sequence[Point]
) -> list[tuple[Point, list[Point], str, str, str]]:
    """Points that a line joins: a first one, all, glyph, color, Plotly symbol. The paper's share
    the color of the runs that they are to be held against, and are hollow."""
    groups = list(dict.fromkeys(point.group(axis) for point in runs))
    found = []
    for i, group in enumerate(groups):
        color, symbol = SERIES[i % len(SERIES)], SYMBOLS[i % len(SYMBOLS)]
        for points, glyphs, suffix in ((runs, _GLYPHS, ""), (published, _OPEN_GLYPHS, "-open")):
            own = [point for point in points if point.group(axis) == group]
            if axis != "model":
                own.sort(key=lambda point: getattr(point, axis))
            if own:
                found.append((own[0], own, glyphs[symbol], color, symbol + suffix))
    return found


def _figure(metric: str, axis: str, runs: Sequence[Point], published: Sequence[Point]) -> go.Figure:
    about = METRICS[metric]
    traces = []
    for first, points, _, color, symbol in _series(axis, runs, published):
        points = [point for point in points if metric in point.values]
        value, low, high = (
            zip(*(point.values[metric] for point in points), strict=True)
            if (points)
            else ((), (), ())
        )
        line = {"color": color, "width": 1.2, "dash": "dot" if first.paper else "solid"}
        traces.append(
            go.Scatter(
                x=[
                    point.short_model if axis == "model" else getattr(point, axis)
                    for point in points
                ],
                y=value,
                error_y=bars_between(low, value, high),
                mode="markers" if axis == "model" else "lines+markers",
                line=line,
                marker={"color": color, "symbol": symbol, "size": 9, "line": {"width": 1.5}},
                text=[point.name for point in points],
                hovertemplate="%{text}<br>%{x}: %{y:.4g}<extra>" + first.label(axis) + "</extra>",
            )
        )
    x: dict[str, Any] = {"title": {"text": AXES[axis]}, "showgrid": False}
    if axis == "model":
        x["type"] = "category"
    else:
        ticks = sorted({getattr(point, axis) for trace in _series(axis, runs, published)
                        for point in trace[1]})  # fmt: skip
        x |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    y: dict[str, Any] = {"title": {"text": about.axis}, "type": "log" if about.log else "linear"}
    y |= {"tickvals": LOG_TICKS} if about.log else {"rangemode": "tozero"}
    empty = not any(len(trace.x) for trace in traces)
    note = [{"text": "not measured yet", "showarrow": False, "xref": "paper", "yref": "paper",
             "x": 0.5, "y": 0.5, "font": {"color": GRAY}}]  # fmt: skip
    return figure(
        traces, x, y, showlegend=False, height=270, annotations=note if empty else [],
        margin={"l": 62, "r": 12, "t": 8, "b": 44},
    )  # fmt: skip


def _rows(runs: Sequence[Point], published: Sequence[Point]) -> list[Point]:
    """Each run, and the paper's of the same model, R and k below the last of its kind."""
    rows: list[Point] = []
    for i, point in enumerate(runs):
        rows.append(point)
        same = (point.model, point.expansion, point.k)
        if same in [(other.model, other.expansion, other.k) for other in runs[i + 1 :]]:
            continue
        rows += [other for other in published if (other.model, other.expansion, other.k) == same]
    return rows


def _missing(runs: Sequence[Point]) -> list[str]:
    """Commands that fill the blanks."""
    commands = []
    for point in runs:
        if point.run and not point.run.evaluation:
            commands.append(f"python -m mlsae.evaluate {point.run.quoted}")
        if point.run and not point.run.analysis:
            commands.append(f"python -m mlsae.analyze {point.run.quoted}")
    return commands
