"""prompt.html: which latents are active at which layers, for each token of one text.

Legend: L layers, M latents, n latents of a token.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.offline
from torch import Tensor

from ..metrics import mean_layer
from .latent_plots import layer_heatmap

_DRAWN = 400  # latents per token, at most

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto;
padding: 0 1rem; background: #fff; color: #1c1e21; color-scheme: light; }}
p {{ color: #5b6168; max-width: 75ch; }} code {{ white-space: pre-wrap; }}</style>
<script>{plotly}</script></head><body>
<h1>{title}</h1><p><code>{prompt}</code></p>
<p>Top: the share of each latent's activation in each layer, for the token chosen with the slider:
P(layer | token, latent). Bottom: the same latents over {many}. Columns are the latents that are
active at the token, sorted by their mean layer in the bottom plot.</p>
<div id="figure"></div>
<script>const figure = {figure};
Plotly.newPlot("figure", figure.data, figure.layout, {{ responsive: true, displaylogo: false }});
</script></body></html>
"""


def prompt_page(
    reading: dict[str, Any],
    by_token: Sequence[tuple[Tensor, Tensor]],
    profile: Tensor | None,
) -> str:
    """A self-contained page: for each token, the heatmap of its latents over layers, and of the
    same latents over many tokens.

    `reading` is the content of analysis_prompt.json. `by_token` has each token's latents (n,), the
    most active first, and their h, (n, L). profile (M, L) is where latents are active over many
    tokens.
    """
    frames = []
    for latents, h in by_token:
        latents, h = latents[:_DRAWN], h[:_DRAWN]
        share = h / h.sum(1, keepdim=True)
        many = share if profile is None else profile[latents].nan_to_num()
        order = mean_layer(many).nan_to_num(0).argsort(stable=True)
        frames.append((latents[order].tolist(), share[order], many[order]))
    plot = _heatmaps(reading, frames, profile is not None)
    return _PAGE.format(
        title="Which latents are active at which layers",
        prompt=html.escape(reading["prompt"]),
        many="many tokens" if profile is not None else "this token, since nothing is analyzed yet",
        plotly=plotly.offline.get_plotlyjs(),
        figure=plot.to_json().replace("</", "<\\/"),
    )


def _heatmaps(
    reading: dict[str, Any], frames: list[tuple[list[int], Tensor, Tensor]], both: bool
) -> go.Figure:
    """One pair of heatmaps per token, of which a slider shows one pair."""
    plot = go.Figure()
    rows = [("y", "this token"), ("y2", "many tokens")][: 2 if both else 1]
    for t, (latents, *parts) in enumerate(frames):
        for (axis, name), share in zip(rows, parts, strict=False):
            trace = layer_heatmap(
                share,
                reading["layers"],
                customdata=[latents] * len(reading["layers"]),
                yaxis=axis,
                visible=t == 0,
                showscale=axis == "y",
                hovertemplate="layer %{y}<br>latent %{customdata}<br>share %{z:.2f}"
                f"<extra>{name}</extra>",
            )
            plot.add_trace(trace)
    shown = [
        [i // len(rows) == t for i in range(len(frames) * len(rows))] for t in range(len(frames))
    ]
    steps = [
        {"label": f"{t} {string!r}", "method": "update", "args": [{"visible": visible}]}
        for t, (string, visible) in enumerate(zip(reading["tokens"], shown, strict=True))
    ]
    layer = {"type": "category", "autorange": "reversed"}
    plot.update_layout(
        template="none",
        height=360 + 40 * len(reading["layers"]),
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        sliders=[{"steps": steps, "currentvalue": {"prefix": "token "}, "pad": {"t": 50}}],
        xaxis={"title": {"text": "latents"}, "showgrid": False, "anchor": "y2" if both else "y"},
        yaxis={**layer, "title": {"text": "layer"}, "domain": [0.54, 1] if both else [0, 1]},
        yaxis2={**layer, "title": {"text": "layer, many"}, "domain": [0, 0.46]},
    )
    return plot
