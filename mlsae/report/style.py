"""How every plot looks: colors that read on a light and a dark page, titles, margins.

The page's script adds the colors of text and lines, which follow the reader's mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

BLUE, ORANGE, GREEN, PURPLE, RED, GRAY = (
    "#4a90d9", "#d9822b", "#2ca58d", "#a06cd5", "#d64550", "#888d93",
)  # fmt: skip
COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#b8a038", "#4ab3c9", "#c76aa0")
LOG_TICKS = [float(f"{digit}e{power}") for power in range(-6, 3) for digit in (1, 2, 5)]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon", "triangle-down")


def plot(
    traces: Sequence[Any], x: dict[str, Any] | str, y: dict[str, Any] | str, **layout: Any
) -> go.Figure:
    """A plot of `traces`. x and y are the axes' titles, or dictionaries of all their settings."""
    axes = {
        name: {"title": {"text": axis}} if isinstance(axis, str) else axis
        for name, axis in (("xaxis", x), ("yaxis", y))
    }
    return go.Figure(
        list(traces),
        {
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 62, "r": 16, "t": 12, "b": 48},
            "height": 320,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            **axes,
            **layout,
        },
    )


def error_bars(low: Sequence[Any], value: Sequence[Any], high: Sequence[Any]) -> dict[str, Any]:
    """Error bars from `low` to `high`; no bar if either end is None."""
    ends = [(a, v, b) for a, v, b in zip(low, value, high, strict=True)]
    known = [None not in end for end in ends]
    return {
        "type": "data",
        "symmetric": False,
        "array": [b - v if ok else 0 for (_, v, b), ok in zip(ends, known, strict=True)],
        "arrayminus": [v - a if ok else 0 for (a, v, _), ok in zip(ends, known, strict=True)],
        "thickness": 1.2,
        "width": 3,
        "visible": any(known),
    }
