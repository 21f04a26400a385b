"""Figures of layers, and of training: reconstruction, predictions, residuals, curves.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from .style import BLUE, GRAY, GREEN, LOG_TICKS, ORANGE, RED, bars_between, figure

_NAMED = 8  # layers at most that are all in the key of a figure


def _by_layer(
    series: dict[str, dict[str, Any]], layers: Sequence[int], title: str, form: str
) -> go.Figure:
    """Bars of each layer; `series` has figures as evaluation.json has them, by label."""
    patterns = ("", "/")  # told apart without color too
    traces = []
    for (label, found), color, shape in zip(series.items(), (BLUE, ORANGE), patterns, strict=False):
        low, high = zip(*found["intervals"], strict=True)
        traces.append(
            go.Bar(
                x=[str(layer) for layer in layers],
                y=found["layers"],
                name=label,
                marker={"color": color, "pattern": {"shape": shape, "fillmode": "overlay"}},
                error_y=bars_between(low, found["layers"], high),
                hovertemplate="layer %{x}: %{y:" + form + "}<extra>" + label + "</extra>",
            )
        )
    return figure(
        traces,
        {"title": {"text": "layer"}, "type": "category", "showgrid": False},
        {"title": {"text": title}, "rangemode": "tozero"},
        showlegend=len(traces) > 1,
    )


def fvu(found: dict[str, dict[str, Any]], layers: Sequence[int]) -> go.Figure:
    """FVU of each layer, both definitions."""
    series = {"FVU": found["fvu"], "FVU as in the paper": found["fvu_paper"]}
    return _by_layer(series, layers, "FVU (share of variance)", ".4f")


def fvu_of_training(heldout: dict[str, Any], layers: Sequence[int]) -> go.Figure:
    """The same from the held-out line of metrics.jsonl, which has no intervals."""
    unknown = [[None, None]] * len(layers)
    found = {
        name: {"layers": heldout[f"{name}_layers"], "intervals": unknown}
        for name in ("fvu", "fvu_paper")
    }
    return fvu(found, layers)


def delta_ce(found: dict[str, dict[str, Any]], layers: Sequence[int]) -> go.Figure:
    """What substituting the reconstruction at a layer costs, nats per token."""
    return _by_layer({"ΔCE": found["delta_ce"]}, layers, "ΔCE (nats per token)", ".4f")


def adjacent(found: dict[str, Any], layers: Sequence[int]) -> go.Figure:
    """Cosine of neighboring layers' centered residuals, and their norm."""
    names = [str(layer) for layer in layers]
    pairs = [f"{a} → {b}" for a, b in pairwise(layers)]
    cosine = go.Scatter(
        x=[i + 0.5 for i in range(len(pairs))],
        y=found["cosine"],
        text=pairs,
        name="cosine to the next layer",
        mode="lines+markers",
        marker={"size": 9, "symbol": "diamond"},
        line={"color": GREEN, "width": 2},
        hovertemplate="layers %{text}: cosine %{y:.3f}<extra></extra>",
    )
    norm = go.Bar(
        x=list(range(len(names))),
        y=found["norm"],
        yaxis="y2",
        name="norm",
        width=0.55,
        opacity=0.55,
        marker={"color": GRAY},
        text=names,
        textposition="none",
        hovertemplate="layer %{text}: norm %{y:.3g}<extra></extra>",
    )
    return figure(
        [norm, cosine],
        {
            "title": {"text": "layer"},
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "showgrid": False,
        },
        {
            "title": {"text": "cosine"},
            "range": [min([0, *found["cosine"]]), 1.02],
            "tickvals": [-1, -0.5, 0, 0.25, 0.5, 0.75, 1],
            "overlaying": "y2",
        },
        yaxis2={
            "title": {"text": "mean norm (residual's units)"},
            "side": "right",
            "rangemode": "tozero",
            "showgrid": False,
        },
        margin={"l": 62, "r": 62, "t": 12, "b": 48},
        height=280,
    )


def training(
    curve: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]], layers: Sequence[int]
) -> go.Figure:
    """FVU while training: of each layer, their mean, held-out; and the share of dead latents."""
    tokens = [line["tokens"] for line in curve]
    dead = [line["dead"] for line in curve]
    shades = sample_colorscale("Viridis", [0.2 + 0.6 * i / len(layers) for i in range(len(layers))])
    traces = [
        go.Scatter(
            x=tokens,
            y=[line["fvu_layers"][i] for line in curve],
            name=f"layer {layer}",
            line={"width": 1.3, "color": shade},
            # Of many layers the key names the first and the last; pointing at a line names it.
            showlegend=len(layers) <= _NAMED or i in (0, len(layers) - 1),
        )
        for i, (layer, shade) in enumerate(zip(layers, shades, strict=True))
    ]
    mean = [line["fvu"] for line in curve]
    traces.append(go.Scatter(x=tokens, y=mean, name="mean", line={"width": 3, "color": RED}))
    traces.append(
        go.Scatter(
            x=[line["tokens"] for line in measured],
            y=[line["heldout"]["fvu"] for line in measured],
            name="mean, held-out",
            mode="markers",
            marker={"size": 10, "symbol": "diamond", "color": RED},
        )
    )
    dash = {"dash": "dot", "color": GRAY}
    traces.append(go.Scatter(x=tokens, y=dead, name="dead latents", yaxis="y2", line=dash))
    return figure(
        traces,
        "tokens trained on (each gives one vector a layer)",
        {"title": {"text": "FVU (share of variance)"}, "type": "log", "tickvals": LOG_TICKS},
        yaxis2={
            "title": {"text": "dead latents"},
            "overlaying": "y",
            "side": "right",
            "tickformat": ".0%",
            "tickmode": "auto",
            "range": [0, 1.1 * max(0.1, *dead)],
            "showgrid": False,
        },
        margin={"l": 62, "r": 62, "t": 12, "b": 48},
        height=440,
    )
