"""Figures of latents: at which layers they are active, how that is distributed, the two ratios.

Legend: L layers, M latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from .style import BLUE, GRAY, ORANGE, bars_between, figure

MAX_COLUMNS = 1200  # of the heatmap: more than a screen shows, and the page stays small
BINS = 48
LABELS = {"equations": "the equations", "released": "the released code"}


def shares(totals: Tensor) -> Tensor:
    """Rows with something in them, each divided by its sum; NaN rows are left out. (M', L)."""
    fired = totals[totals.sum(1) > 0]
    return fired / fired.sum(1, keepdim=True)


def columns_of(n_latents: int) -> int:
    """Latents that share a column of the heatmap."""
    return max(1, -(-n_latents // MAX_COLUMNS))


def heatmap(share: Tensor, layers: Sequence[int]) -> go.Figure:
    """share (M, L), in the order of mean layer: a column a latent or group of neighbors."""
    mean = share @ torch.arange(share.shape[1], dtype=share.dtype)
    order = mean.argsort(stable=True)
    width = columns_of(len(share))
    groups = share[order].split(width)
    z = torch.stack([group.mean(0) for group in groups]).T if groups[0].numel() else share.T
    means = [group.mean().item() for group in mean[order].split(width)]
    return figure(
        [
            go.Heatmap(
                z=[[round(value, 3) for value in row] for row in z.tolist()],
                x0=(width + 1) / 2,  # the first column is the mean of latents 1 … width
                dx=width,
                y=[str(layer) for layer in layers],
                text=[f"{value:.2f}" for value in means],
                customdata=[[f"{value:.2f}" for value in means]] * len(layers),
                colorscale="Viridis",
                zmin=0,
                zmax=1,
                colorbar={"title": {"text": "share", "side": "right"}, "thickness": 10},
                hovertemplate="layer %{y}: share %{z:.2f}<br>place %{x:,.0f} by mean layer, "
                "which is %{customdata}<extra></extra>",
            )
        ],
        {"title": {"text": "latents, in the order of their mean layer"}, "showgrid": False},
        layer_axis(),
        height=heatmap_height(len(layers)),
    )


def layer_axis() -> dict[str, Any]:
    """Layers from the first, at the top, down."""
    return {"title": {"text": "layer"}, "autorange": "reversed", "type": "category"}


def heatmap_height(n_layers: int) -> int:
    """Pixels: a few for every layer, within what a laptop shows at once."""
    return min(560, 130 + 34 * max(6, n_layers))


def mean_layers(mean: Tensor, n_layers: int) -> go.Figure:
    """A histogram of mean layers, in units of layers."""
    return _histogram(mean, max(1, n_layers - 1), "mean layer (position among the layers read)")


def entropies(entropy: Tensor) -> go.Figure:
    """A histogram of normalized entropies."""
    return _histogram(entropy, 1, "entropy over layers ÷ ln L (0: one layer, 1: all alike)")


def _histogram(values: Tensor, end: float, title: str) -> go.Figure:
    values = values[~values.isnan()]
    # Rounding may leave a value just outside of [0, end].
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
    return figure(
        traces,
        {"title": {"text": title}, "range": [0, end], "showgrid": False},
        {"title": {"text": "latents"}, "rangemode": "tozero"},
        showlegend=False,
        height=280,
    )


def ratios(found: dict[str, Any]) -> go.Figure:
    """Ratios A and B with intervals, by both estimators: the `ratios` of analysis.json."""
    traces = []
    for (estimator, label), color, symbol in zip(
        LABELS.items(), (BLUE, GRAY), ("circle", "diamond-open"), strict=True
    ):
        low, value, high = (
            [found[estimator][name][end] for name in ("B", "A")] for end in ("low", "value", "high")
        )
        traces.append(
            go.Scatter(
                x=value,
                y=["ratio B", "ratio A"],
                error_x=bars_between(low, value, high),
                mode="markers+text",
                text=[f"{number:.3f}" if number is not None else "" for number in value],
                textposition="top center" if estimator == "equations" else "bottom center",
                marker={"size": 11, "color": color, "symbol": symbol},
                name=label,
                hovertemplate="%{y}: %{x:.4f}<extra>" + label + "</extra>",
            )
        )
    return figure(
        traces,
        {"title": {"text": "ratio (0 to 1)"}, "range": [-0.04, 1.04]},
        {"type": "category", "range": [-0.6, 1.6]},
        height=250,
    )


def cosines(found: dict[str, Any]) -> go.Figure:
    """The histogram of cosines between decoder rows, beside that of random directions."""
    edges = found["edges"]
    x = [(a + b) / 2 for a, b in pairwise(edges)]
    # What is expected of random directions may be as little as 1e-100: below what is counted at
    # the least, it would only stretch the axis. A share of 0 has no place on it at all.
    pairs = sum(found["decoder"]) or 1
    least = min((count / pairs for count in found["decoder"] if count), default=0) / 10
    traces = []
    for name, label, color, dash in (
        ("decoder", "decoder rows", BLUE, "solid"),
        ("random", "random directions", GRAY, "dot"),
    ):
        total = sum(found[name]) or 1
        traces.append(
            go.Scatter(
                x=x,
                y=[count / total if count / total > least else None for count in found[name]],
                mode="lines",
                line={"color": color, "width": 2, "dash": dash, "shape": "hvh"},
                name=label,
                hovertemplate="cosine %{x:.2f}: %{y:.2e}<extra></extra>",
            )
        )
    return figure(
        traces,
        "cosine of two decoder rows",
        {"title": {"text": "share of pairs"}, "type": "log", "exponentformat": "power"},
        height=280,
    )


def finite(value: Any) -> float | None:
    """The number, or None where it is None, NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None
