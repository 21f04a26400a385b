"""Plots of latents: the layers at which they are active, their distribution, the two ratios.

Legend: L layers, M latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from .style import BLUE, GRAY, ORANGE, error_bars, plot

MAX_COLUMNS = 1200  # of a heatmap: more than a screen shows, and the page stays small
BINS = 48
LABELS = {"equations": "the equations", "released": "the released code"}


def layer_shares(totals: Tensor) -> Tensor:
    """p(ℓ | latent) = totals / Σ_ℓ totals of totals (M, L), for the latents with any: (M', L)."""
    active = totals[totals.sum(1) > 0]
    return active / active.sum(1, keepdim=True)


def column_width(n_latents: int) -> int:
    """How many latents share one column of the heatmap."""
    return max(1, -(-n_latents // MAX_COLUMNS))


def layer_heatmap(share: Tensor, layers: Sequence[int], **trace: Any) -> go.Heatmap:
    """A Plotly trace of share (columns, L), in [0, 1]: layers run down, `trace` sets the rest."""
    return go.Heatmap(
        z=[[round(value, 3) for value in row] for row in share.T.tolist()],
        y=[str(layer) for layer in layers],
        colorscale="Viridis",
        zmin=0,
        zmax=1,
        colorbar={"title": {"text": "share", "side": "right"}, "thickness": 10},
        **trace,
    )


def heatmap(share: Tensor, layers: Sequence[int]) -> go.Figure:
    """share (M, L) sorted by mean layer, in columns of `column_width` neighboring latents."""
    mean = share @ torch.arange(share.shape[1], dtype=share.dtype)
    order = mean.argsort(stable=True)
    width = column_width(len(share))
    groups = share[order].split(width)
    columns = torch.stack([group.mean(0) for group in groups]) if groups[0].numel() else share
    means = [f"{group.mean().item():.2f}" for group in mean[order].split(width)]
    trace = layer_heatmap(
        columns,
        layers,
        x0=(width + 1) / 2,  # the first column is the mean of latents 1 … width
        dx=width,
        text=means,
        customdata=[means] * len(layers),
        hovertemplate="layer %{y}: share %{z:.2f}<br>place %{x:,.0f} by mean layer, "
        "which is %{customdata}<extra></extra>",
    )
    return plot(
        [trace],
        {"title": {"text": "latents, sorted by mean layer"}, "showgrid": False},
        layer_axis(),
        height=heatmap_height(len(layers)),
    )


def layer_axis() -> dict[str, Any]:
    """A vertical axis of layers, the first at the top."""
    return {"title": {"text": "layer"}, "autorange": "reversed", "type": "category"}


def heatmap_height(n_layers: int) -> int:
    """Pixels: more for more layers, within what a laptop shows at once."""
    return min(560, 130 + 34 * max(6, n_layers))


def mean_layers(mean: Tensor, n_layers: int) -> go.Figure:
    """A histogram of mean layers, in units of layers."""
    return _histogram(mean, max(1, n_layers - 1), "mean layer (position among the layers read)")


def entropies(entropy: Tensor) -> go.Figure:
    """A histogram of normalized entropies."""
    return _histogram(entropy, 1, "entropy over layers ÷ ln L (0: one layer, 1: all layers alike)")


def _histogram(values: Tensor, end: float, title: str) -> go.Figure:
    values = values[~values.isnan()]
    # Rounding may leave a value just outside [0, end].
    counts = torch.histc(values.clamp(0, end).double(), BINS, 0, end)
    width = end / BINS
    x = [(i + 0.5) * width for i in range(BINS)]
    bars = go.Bar(
        x=x,
        y=[int(count) for count in counts],
        width=0.92 * width,
        marker={"color": BLUE},
        hovertemplate="%{x:.2f}: %{y:,} latents<extra></extra>",
    )
    traces: list[Any] = [bars]
    if len(values):
        mean = values.mean().item()
        top = max(1.0, counts.max().item())
        traces.append(
            go.Scatter(
                x=[mean, mean],
                y=[0, top * 1.05],
                mode="lines+text",
                text=["", f" mean {mean:.2f}"],
                textposition="middle right" if mean < 0.75 * end else "middle left",
                line={"color": ORANGE, "width": 2, "dash": "dash"},
                hoverinfo="skip",
            )
        )
    return plot(
        traces,
        {"title": {"text": title}, "range": [0, end], "showgrid": False},
        {"title": {"text": "latents"}, "rangemode": "tozero"},
        showlegend=False,
        height=280,
    )


def ratios(estimates: dict[str, Any]) -> go.Figure:
    """Ratios A and B with intervals, by both estimators. `estimates`: "ratios" of analysis.json."""
    traces = []
    for (estimator, label), color, symbol in zip(
        LABELS.items(), (BLUE, GRAY), ("circle", "diamond-open"), strict=True
    ):
        low, value, high = (
            [estimates[estimator][name][end] for name in ("B", "A")]
            for end in ("low", "value", "high")
        )
        traces.append(
            go.Scatter(
                x=value,
                y=["ratio B", "ratio A"],
                error_x=error_bars(low, value, high),
                mode="markers+text",
                text=[f"{number:.3f}" if number is not None else "" for number in value],
                textposition="top center" if estimator == "equations" else "bottom center",
                marker={"size": 11, "color": color, "symbol": symbol},
                name=label,
                hovertemplate="%{y}: %{x:.4f}<extra>" + label + "</extra>",
            )
        )
    return plot(
        traces,
        {"title": {"text": "ratio (0 to 1)"}, "range": [-0.04, 1.04]},
        {"type": "category", "range": [-0.6, 1.6]},
        height=250,
    )


def matches(stability: dict[str, Any]) -> go.Figure:
    """Histograms of each latent's best cosine to another SAE's decoder rows, and of that of random
    directions.

    `stability`: "stability" of analysis.json.
    """
    histogram = stability["histogram"]
    edges = histogram["edges"]
    width = edges[1] - edges[0] if len(edges) > 1 else 1
    found, chance = (histogram[name] for name in ("match", "chance"))
    used = [edge for edge, *counts in zip(edges, found, chance, strict=False) if any(counts)]
    traces = [
        go.Bar(
            x=[edge + width / 2 for edge in edges[:-1]],
            y=[count / (sum(counts) or 1) for count in counts],
            width=width,
            marker={"color": color},
            opacity=opacity,
            name=label,
            hovertemplate="cosine %{x:.2f}: %{y:.1%}<extra>" + label + "</extra>",
        )
        for counts, color, opacity, label in (
            (chance, GRAY, 0.6, "random directions"),
            (found, BLUE, 0.8, "latents"),
        )
    ]
    return plot(
        traces,
        {"title": {"text": "best cosine in another SAE"}, "range": [min([0, *used]), 1]},
        {"title": {"text": "share"}, "rangemode": "tozero", "tickformat": ".0%"},
        barmode="overlay",
        height=280,
    )


def cosines(histogram: dict[str, Any]) -> go.Figure:
    """Histograms of the cosines between decoder rows, and between random directions.

    `histogram`: "cosine_histogram" of analysis.json.
    """
    edges = histogram["edges"]
    x = [(a + b) / 2 for a, b in pairwise(edges)]
    # The expected share of random directions can be as small as 1e-100. Shares far below the
    # smallest count of decoder rows would only stretch the axis, and a log axis has no 0.
    pairs = sum(histogram["decoder"]) or 1
    threshold = min((count / pairs for count in histogram["decoder"] if count), default=0) / 10
    traces = []
    for name, label, color, dash in (
        ("decoder", "decoder rows", BLUE, "solid"),
        ("random", "random directions", GRAY, "dot"),
    ):
        total = sum(histogram[name]) or 1
        shares = [count / total for count in histogram[name]]
        traces.append(
            go.Scatter(
                x=x,
                y=[share if share > threshold else None for share in shares],
                mode="lines",
                line={"color": color, "width": 2, "dash": dash, "shape": "hvh"},
                name=label,
                hovertemplate="cosine %{x:.2f}: %{y:.2e}<extra></extra>",
            )
        )
    return plot(
        traces,
        "cosine of two decoder rows",
        {"title": {"text": "share of pairs"}, "type": "log", "exponentformat": "power"},
        height=280,
    )
