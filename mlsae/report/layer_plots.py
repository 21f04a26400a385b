"""Plots by layer, and of training: reconstruction, predictions, residuals, curves.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from .style import BLUE, GRAY, GREEN, LOG_TICKS, ORANGE, RED, error_bars, plot

_NAMED = 8  # up to this many layers, a legend names them all


def _by_layer(
    series: dict[str, dict[str, Any]], layers: Sequence[int], title: str, form: str
) -> go.Figure:
    """Bars per layer. `series`: by label, metrics in the form of evaluation.json."""
    patterns = ("", "/")  # so that the series differ without color too
    traces = []
    for (label, metric), color, shape in zip(
        series.items(), (BLUE, ORANGE), patterns, strict=False
    ):
        low, high = zip(*metric["intervals"], strict=True)
        traces.append(
            go.Bar(
                x=[str(layer) for layer in layers],
                y=metric["layers"],
                name=label,
                marker={"color": color, "pattern": {"shape": shape, "fillmode": "overlay"}},
                error_y=error_bars(low, metric["layers"], high),
                hovertemplate="layer %{x}: %{y:" + form + "}<extra>" + label + "</extra>",
            )
        )
    return plot(
        traces,
        {"title": {"text": "layer"}, "type": "category", "showgrid": False},
        {"title": {"text": title}, "rangemode": "tozero"},
        showlegend=len(traces) > 1,
    )


def fvu(metrics: dict[str, dict[str, Any]], layers: Sequence[int]) -> go.Figure:
    """FVU per layer, by both definitions."""
    series = {"FVU": metrics["fvu"], "FVU as in the paper": metrics["fvu_paper"]}
    return _by_layer(series, layers, "FVU (share of variance)", ".4f")


def fvu_of_training(heldout: dict[str, Any], layers: Sequence[int]) -> go.Figure:
    """FVU per layer from a validation entry of metrics.jsonl, which has no intervals."""
    unknown = [[None, None]] * len(layers)
    metrics = {
        name: {"layers": heldout[f"{name}_layers"], "intervals": unknown}
        for name in ("fvu", "fvu_paper")
    }
    return fvu(metrics, layers)


def delta_ce(metrics: dict[str, dict[str, Any]], layers: Sequence[int]) -> go.Figure:
    """ΔCE per layer: what replacing the residual there by its reconstruction costs; and there and
    at all layers above, if that was measured."""
    shown = {"this layer": metrics["delta_ce"]}
    if "delta_ce_from" in metrics:
        shown["and all above"] = metrics["delta_ce_from"]
    return _by_layer(shown, layers, "ΔCE (nats per token)", ".4f")


def adjacent(statistics: dict[str, Any], layers: Sequence[int]) -> go.Figure:
    """Cosine of adjacent layers' centered residuals, and the residuals' norm.

    `statistics`: "adjacent" of analysis.json.
    """
    names = [str(layer) for layer in layers]
    pairs = [f"{a} → {b}" for a, b in pairwise(layers)]
    cosine = go.Scatter(
        x=[i + 0.5 for i in range(len(pairs))],
        y=statistics["cosine"],
        text=pairs,
        name="cosine to the next layer",
        mode="lines+markers",
        marker={"size": 9, "symbol": "diamond"},
        line={"color": GREEN, "width": 2},
        hovertemplate="layers %{text}: cosine %{y:.3f}<extra></extra>",
    )
    norm = go.Bar(
        x=list(range(len(names))),
        y=statistics["norm"],
        yaxis="y2",
        name="norm",
        width=0.55,
        opacity=0.55,
        marker={"color": GRAY},
        text=names,
        textposition="none",
        hovertemplate="layer %{text}: norm %{y:.3g}<extra></extra>",
    )
    return plot(
        [norm, cosine],
        {
            "title": {"text": "layer"},
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "showgrid": False,
        },
        {
            "title": {"text": "cosine"},
            "range": [min([0, *(cosine or 0 for cosine in statistics["cosine"])]), 1.02],
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


def flow(statistics: dict[str, Any], layers: Sequence[int]) -> go.Figure:
    """Per layer, the mean number of latents active at a token that were active at the layer before,
    and that begin; below, those that are not active at the next.

    `statistics`: "flow" of analysis.json.
    """
    active, began, ended = (statistics[name] for name in ("active", "began", "ended"))
    names = [str(layer) for layer in layers]
    went_on = [a - b for a, b in zip(active, began, strict=True)]
    # What is active at the first layer began before, and what is at the last goes on unseen.
    unknown = [began[0]] + [0.0] * (len(names) - 1)
    known_began, known_ended = [0.0, *began[1:]], [*(-e for e in ended[:-1]), 0.0]
    traces = [
        go.Bar(
            x=names,
            y=y,
            name=label,
            marker={"color": color, "pattern": {"shape": shape, "fillmode": "overlay"}},
            customdata=[abs(value) for value in y],
            hovertemplate="layer %{x}: %{customdata:.1f} latents<extra>" + label + "</extra>",
        )
        for y, label, color, shape in (
            (unknown, "active at the first layer", GRAY, ""),
            (went_on, "active at the layer before, too", BLUE, ""),
            (known_began, "begin", GREEN, "/"),
            (known_ended, "end: not active at the next", ORANGE, "\\"),
        )
    ]
    return plot(
        traces,
        {"title": {"text": "layer"}, "type": "category", "showgrid": False},
        {"title": {"text": "latents per token"}},
        barmode="relative",
        height=320,
    )


def training(
    log: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], layers: Sequence[int]
) -> go.Figure:
    """FVU during training, per layer, their mean and held-out; and the share of dead latents. With
    a lens, all of it is in the lens's basis, as the losses are.

    `log` and `validation`: entries of metrics.jsonl.
    """
    tokens = [entry["tokens"] for entry in log]
    dead = [entry["dead"] for entry in log]
    shades = sample_colorscale(
        "Viridis", [0.3 + 0.45 * i / len(layers) for i in range(len(layers))]
    )
    traces = [
        go.Scatter(
            x=tokens,
            y=[entry["fvu_layers"][i] for entry in log],
            name=f"layer {layer}",
            line={"width": 1.3, "color": shade},
            # Of many layers the legend names the first and the last; hovering names the others.
            showlegend=len(layers) <= _NAMED or i in (0, len(layers) - 1),
        )
        for i, (layer, shade) in enumerate(zip(layers, shades, strict=True))
    ]
    mean = [entry["fvu"] for entry in log]
    traces.append(go.Scatter(x=tokens, y=mean, name="mean", line={"width": 3, "color": RED}))
    traces.append(
        go.Scatter(
            x=[entry["tokens"] for entry in validation],
            y=[e["heldout"].get("fvu_lens", e["heldout"]["fvu"]) for e in validation],
            name="mean, held-out",
            mode="markers",
            marker={"size": 10, "symbol": "diamond", "color": RED},
        )
    )
    dash = {"dash": "dot", "color": GRAY}
    traces.append(go.Scatter(x=tokens, y=dead, name="dead latents", yaxis="y2", line=dash))
    return plot(
        traces,
        "tokens trained on (each gives one vector per layer)",
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
