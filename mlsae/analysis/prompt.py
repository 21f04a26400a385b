"""One text, token by token: which latents are active at which layers; beside it, where they are
active over many tokens.

Legend: L layers, T tokens of the text, M latents, K active latents a token.
"""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go
import plotly.offline
import torch
from rich.table import Table
from torch import Tensor

from ..data.stream import DataStream
from ..data.tokens import not_special
from ..errors import InputError
from ..metrics import mean_layer
from ..model import MLSAE

_SHADES = " ▁▂▃▄▅▆▇█"
_LISTED = 3  # latents a token in the table
_DRAWN = 400  # latents a token that are drawn at most

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto;
padding: 0 1rem; background: #fff; color: #1c1e21; color-scheme: light; }}
p {{ color: #5b6168; max-width: 75ch; }} code {{ white-space: pre-wrap; }}</style>
<script>{plotly}</script></head><body>
<h1>{title}</h1><p><code>{prompt}</code></p>
<p>Above, the share of each latent's activation that falls in each layer, for the token that the
slider names: P(layer | token, latent). Below, the same latents over {many}. Columns are the latents
that are active at the token, sorted by the mean layer of the lower picture.</p>
<div id="figure"></div>
<script>const figure = {figure};
Plotly.newPlot("figure", figure.data, figure.layout, {{ responsive: true, displaylogo: false }});
</script></body></html>
"""


def tokenize(stream: DataStream, prompt: str) -> Tensor:
    """The token ids (T,) of a text, as the model begins one. Raises InputError if there are
    none to show, or more than the model's rows have."""
    ids = torch.tensor(stream.tokenizer(prompt)["input_ids"], dtype=torch.int64)
    if len(ids) > stream.seq_len:
        raise InputError(
            f"--prompt must have at most {stream.seq_len} tokens (a row; see --seq_len), got "
            f"{len(ids)}"
        )
    if not len(ids) or not not_special(ids, stream.tokenizer).any():
        raise InputError(
            f"--prompt must have a token that is not special, got {prompt!r}; give some text"
        )
    return ids


@torch.inference_mode()
def read_prompt(
    mlsae: MLSAE, stream: DataStream, ids: Tensor, strings: list[str]
) -> dict[str, Any]:
    """What analysis_prompt.json holds of the token ids (T,): every (token, layer, latent) that is
    active, with h. Layers are positions in `layers`. Special tokens have none."""
    x = stream.reader(ids[None].to(stream.device))[:, 0]
    values, indices = (part.cpu() for part in mlsae.encode(x))  # (L, T, K)
    active = (values > 0) & not_special(ids, stream.tokenizer)[:, None]
    layer, token, rank = active.nonzero(as_tuple=True)
    order = torch.argsort(token, stable=True)
    layer, token, rank = layer[order], token[order], rank[order]
    return {
        "prompt": "".join(strings[i] for i in ids.tolist()),
        "tokens": [strings[i] for i in ids.tolist()],
        "layers": list(stream.reader.layers),
        "entries": {
            "token": token.tolist(),
            "layer": layer.tolist(),
            "latent": indices[layer, token, rank].tolist(),
            "value": values[layer, token, rank].float().tolist(),
        },
    }


def by_token(picture: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Of each token, its latents (n,), the most active first, and their h at each layer (n, L)."""
    token, layer, latent = (
        torch.tensor(picture["entries"][name], dtype=torch.int64)
        for name in ("token", "layer", "latent")
    )
    value = torch.tensor(picture["entries"]["value"], dtype=torch.float64)
    found = []
    for t in range(len(picture["tokens"])):
        here = token == t
        latents, row = latent[here].unique(return_inverse=True)
        h = torch.zeros(len(latents), len(picture["layers"]), dtype=torch.float64)
        h[row, layer[here]] = value[here]
        order = h.sum(1).argsort(descending=True)
        found.append((latents[order], h[order]))
    return found


def prompt_table(picture: dict[str, Any], profile: Tensor | None) -> Table:
    """To print: the most active latents of each token, a bar a layer. profile (M, L) is where
    latents are active over many tokens."""
    layers = picture["layers"]
    table = Table(title=f"Token by token, layers {layers[0]} … {layers[-1]}")
    for heading in ("token", "active", "latent", "Σ h", "at this token", "mean layer"):
        table.add_column(heading, justify="right" if heading in ("active", "Σ h") else "left")
    if profile is not None:
        table.add_column("over many")
        table.add_column("mean layer")
    for string, (latents, h) in zip(picture["tokens"], by_token(picture), strict=True):
        table.add_section()
        means = mean_layer(h)
        for i in range(min(_LISTED, len(latents))):
            first = (repr(string)[1:-1], f"{len(latents)}") if i == 0 else ("", "")
            j = int(latents[i])
            cells = [str(j), f"{h[i].sum():.1f}", bars(h[i]), f"{means[i]:.2f}"]
            if profile is not None:
                many = profile[j]
                mean = mean_layer(many)
                cells += [bars(many), f"{mean:.2f}"] if mean.isfinite() else ["never", ""]
            table.add_row(*first, *cells, style=None if i == 0 else "dim")
        if not len(latents):
            table.add_row(repr(string)[1:-1], "special")
    return table


def bars(values: Tensor) -> str:
    """A character a value (L,), from nothing to the largest of them."""
    steps = (values / values.max() * (len(_SHADES) - 1)).ceil().long().tolist()
    return "".join(_SHADES[step] for step in steps)


def prompt_page(picture: dict[str, Any], profile: Tensor | None) -> str:
    """A page, complete in itself: for each token, the heatmap of its latents over layers, and of
    the same latents over many tokens."""
    frames = []
    for latents, h in by_token(picture):
        latents, h = latents[:_DRAWN], h[:_DRAWN]
        share = h / h.sum(1, keepdim=True)
        many = share if profile is None else profile[latents].nan_to_num()
        order = mean_layer(many).nan_to_num(0).argsort(stable=True)
        frames.append((latents[order].tolist(), share[order], many[order]))
    figure = _figure(picture, frames, profile is not None)
    return _PAGE.format(
        title="Which latents are active at which layers",
        prompt=html.escape(picture["prompt"]),
        many="many tokens" if profile is not None else "this token, since nothing is analyzed yet",
        plotly=plotly.offline.get_plotlyjs(),
        figure=figure.to_json().replace("</", "<\\/"),
    )


def _figure(
    picture: dict[str, Any], frames: list[tuple[list[int], Tensor, Tensor]], both: bool
) -> go.Figure:
    """One pair of heatmaps a token, of which a slider shows one."""
    figure = go.Figure()
    rows = [("y", "this token"), ("y2", "many tokens")][: 2 if both else 1]
    for t, (latents, *parts) in enumerate(frames):
        for (axis, name), share in zip(rows, parts, strict=False):
            figure.add_heatmap(
                z=[[round(value, 3) for value in row] for row in share.T.tolist()],
                customdata=[latents] * len(picture["layers"]),
                y=[str(layer) for layer in picture["layers"]],
                yaxis=axis,
                visible=t == 0,
                colorscale="Viridis",
                zmin=0,
                zmax=1,
                showscale=axis == "y",
                hovertemplate="layer %{y}<br>latent %{customdata}<br>share %{z:.2f}"
                f"<extra>{name}</extra>",
            )
    shown = [
        [i // len(rows) == t for i in range(len(frames) * len(rows))] for t in range(len(frames))
    ]
    steps = [
        {"label": f"{t} {string!r}", "method": "update", "args": [{"visible": visible}]}
        for t, (string, visible) in enumerate(zip(picture["tokens"], shown, strict=True))
    ]
    layer = {"type": "category", "autorange": "reversed"}
    figure.update_layout(
        template="none",
        height=360 + 40 * len(picture["layers"]),
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        sliders=[{"steps": steps, "currentvalue": {"prefix": "token "}, "pad": {"t": 50}}],
        xaxis={"title": {"text": "latents"}, "showgrid": False, "anchor": "y2" if both else "y"},
        yaxis={**layer, "title": {"text": "layer"}, "domain": [0.54, 1] if both else [0, 1]},
        yaxis2={**layer, "title": {"text": "layer, many"}, "domain": [0, 0.46]},
    )
    return figure
