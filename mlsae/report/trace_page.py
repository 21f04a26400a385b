"""trace.html: what a prediction or a latent rests on, as a picture of tokens and layers.

Legend: L layers, T tokens.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from .pack import pack_plots, packed_plotly, render
from .style import BLUE, GRAY, ORANGE, plot

_FLOWS = 40  # drawn
_EDGES = 20  # in the table
_TOKENS = 40  # in a heatmap
_SLOT = 27  # pixels of a flow
_LARGEST = 20  # pixels of a node


def trace_page(trace: dict[str, Any], run: str) -> bytes:
    """A self-contained page. `trace` is what `Trace.as_dict` gives, of the run named `run`."""
    plots, shown = trace_plots(trace), _strongest_tokens(trace)
    target = trace["target"]
    tokens = [_visible(token) for token in trace["tokens"]]
    facts = {
        "run": run,
        "model": trace["model"],
        "target": f"{target['name']} = {target['value']:.3f}",
        "tokens": f"{len(tokens):,}",
        "active latents with a part in it": f"{trace['n_nodes']:,}",
    }
    return render(
        "trace.html",
        ("packed.js", "page.js"),
        {"plotly": packed_plotly(), "plots": pack_plots(plots)},
        title=f"What the {target['name']} rests on",
        plots=plots,
        facts=facts,
        tokens=tokens,
        n_flows=len(drawn_flows(trace)),
        n_shown=len(shown),
        map_width=110 + 12 * len(shown),
        flows_width=flows_width(trace),
        checks=trace["checks"],
        correlation=trace["correlation"],
        edges=trace["edges"][:_EDGES],
        nodes=trace["nodes"],
    )


def trace_plots(trace: dict[str, Any]) -> dict[str, go.Figure]:
    """The plots by name: flows, latents, errors, and checks if there are any."""
    shown = _strongest_tokens(trace)
    plots = {
        "flows": _flows(trace, drawn_flows(trace)),
        "latents": _heatmap(trace, "latents", shown),
        "errors": _heatmap(trace, "errors", shown),
    }
    if trace["checks"]:
        plots["checks"] = _checks(trace["checks"], trace["tokens"])
    return plots


def drawn_flows(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The strongest flows, those of a token side by side: a column of the plot each."""
    return sorted(trace["flows"][:_FLOWS], key=lambda flow: flow["token"])  # keeps their order


def flows_width(trace: dict[str, Any]) -> int:
    """Pixels that the plot of flows needs."""
    return max(320, 110 + _SLOT * len(drawn_flows(trace)))


def _flows(trace: dict[str, Any], flows: Sequence[dict[str, Any]]) -> go.Figure:
    """A column for each flow, those of a token side by side; a circle at each of its layers."""
    layers, tokens = trace["layers"], trace["tokens"]
    largest = max((abs(x) for flow in flows for x in flow["attribution"]), default=1.0)
    line_x: list[Any] = []
    line_y: list[Any] = []
    signs: dict[bool, dict[str, list[Any]]] = {
        sign: {"x": [], "y": [], "size": [], "data": []} for sign in (True, False)
    }
    for x, flow in enumerate(flows):
        columns = (flow["layers"], flow["attribution"], flow["activation"])
        for layer, effect, h in zip(*columns, strict=True):
            own = signs[effect > 0]
            own["x"].append(x)
            own["y"].append(layers.index(layer))
            own["size"].append(3 + (_LARGEST - 3) * (abs(effect) / largest) ** 0.5)
            token = f"{flow['token']} {_escaped(tokens[flow['token']])}"
            own["data"].append([flow["latent"], layer, token, f"{effect:+.4f}", f"{h:.3g}"])
        line_x += [x] * len(flow["layers"]) + [None]
        line_y += [layers.index(layer) for layer in flow["layers"]] + [None]
    traces = [go.Scatter(x=line_x, y=line_y, mode="lines", line={"color": GRAY, "width": 1.5},
                         hoverinfo="skip", showlegend=False)]  # fmt: skip
    for sign, label, color in ((True, "raises the target", BLUE), (False, "lowers it", ORANGE)):
        own = signs[sign]
        traces.append(
            go.Scatter(
                x=own["x"], y=own["y"], mode="markers", name=label, customdata=own["data"],
                marker={"color": color, "size": own["size"], "opacity": 0.9, "line": {"width": 0},
                        "symbol": "circle" if sign else "diamond"},
                hovertemplate="latent %{customdata[0]}, layer %{customdata[1]}, token "
                "%{customdata[2]}<br>attribution %{customdata[3]}, activation %{customdata[4]}"
                "<extra></extra>",
            )
        )  # fmt: skip
    groups = [
        (token, [x for x, _ in own])
        for token, own in groupby(enumerate(flows), key=lambda pair: pair[1]["token"])
    ]
    return plot(
        traces,
        {
            "tickvals": list(range(len(flows))),
            "ticktext": [str(flow["latent"]) for flow in flows],
            "title": {"text": "latent"},
            "showgrid": False, "zeroline": False, "range": [-0.6, max(1, len(flows)) - 0.4],
            "tickangle": 90,
        },
        _layer_axis(layers),
        annotations=[_token_name(token, tokens[token], at) for token, at in groups],
        shapes=[_border(at[-1] + 0.5) for _, at in groups[:-1]],
        height=180 + 24 * len(layers),
        margin={"l": 50, "r": 10, "t": 76, "b": 60},
        legend={"orientation": "h", "y": 1.16, "yanchor": "bottom", "x": 0,
                "itemsizing": "constant"},
        hovermode="closest",
    )  # fmt: skip


def _token_name(token: int, text: str, at: Sequence[int]) -> dict[str, Any]:
    """The name above the columns `at`; it is cut where they are narrow."""
    room = max(3, len(at) * _SLOT // 7)
    return {
        "x": (at[0] + at[-1]) / 2, "y": 1, "xref": "x", "yref": "paper", "yanchor": "bottom",
        "text": html.escape(_cut(f"{token} {_visible(text)}", room)), "showarrow": False,
        "hovertext": _escaped(text), "font": {"size": 11},
    }  # fmt: skip


def _border(x: float) -> dict[str, Any]:
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1.06, "yref": "paper",
            "line": {"color": GRAY, "width": 1, "dash": "dot"}}  # fmt: skip


def _strongest_tokens(trace: dict[str, Any]) -> list[int]:
    """The positions that a heatmap has room for: those with the largest sums, in their order."""
    rows = [*trace["latents"], *trace["errors"]]
    largest = [max(map(abs, column)) for column in zip(*rows, strict=True)]
    strongest = sorted(range(len(largest)), key=lambda t: -largest[t])
    return sorted(strongest[:_TOKENS])


def _heatmap(trace: dict[str, Any], name: str, shown: Sequence[int]) -> go.Figure:
    """Attributions (L, T) of all latents, or of the errors, at some tokens; both with the same
    colors."""
    tokens, layers = trace["tokens"], trace["layers"]
    sizes = [abs(x) for part in ("latents", "errors") for row in trace[part] for x in row]
    largest = max(sizes, default=0.0) or 1.0
    labels = [f"{t} {_escaped(tokens[t])}" for t in shown]
    heatmap = go.Heatmap(
        z=[[float(f"{row[t]:.4g}") for t in shown] for row in trace[name]],
        zmin=-largest, zmax=largest,
        colorscale=[[0, ORANGE], [0.5, "rgba(136,141,147,0.08)"], [1, BLUE]],
        customdata=[[[label, layer] for label in labels] for layer in layers],
        hovertemplate="layer %{customdata[1]}, token %{customdata[0]}<br>attribution %{z:+.4f}"
        "<extra></extra>",
        colorbar={"thickness": 10, "len": 1, "tickfont": {"size": 10}},
        xgap=1, ygap=1,
    )  # fmt: skip
    names = [_escaped(_cut(tokens[t], 10)) for t in shown]
    if len(shown) < len(tokens):  # then positions say what is next to what
        names = [f"{t} {name}" for t, name in zip(shown, names, strict=True)]
    return plot(
        [heatmap],
        {
            "tickvals": list(range(len(shown))), "ticktext": names, "tickangle": 90,
            "tickfont": {"size": 10},
            "showgrid": False, "zeroline": False,
        },
        {**_layer_axis(layers), "showgrid": False},
        height=170 + 20 * len(layers),
        margin={"l": 50, "r": 10, "t": 8, "b": 60},
    )  # fmt: skip


def _checks(checks: Sequence[dict[str, Any]], tokens: Sequence[str]) -> go.Figure:
    """Ablation against attribution, and where both are equal."""
    numbers = [check[name] for check in checks for name in ("attribution", "ablation")]
    ends = [min(0.0, *numbers), max(0.0, *numbers)]
    traces = [go.Scatter(x=ends, y=ends, mode="lines", line={"color": GRAY, "dash": "dot"},
                         name="equal", hoverinfo="skip")]  # fmt: skip
    for errors, label, color, symbol in (
        (False, "latent", BLUE, "circle"), (True, "error", ORANGE, "diamond"),
    ):  # fmt: skip
        own = [check for check in checks if (check["latent"] is None) == errors]
        names = [
            f"{label}{'' if errors else ' ' + str(check['latent'])}, layer {check['layer']}, token "
            f"{check['token']} {_escaped(tokens[check['token']])}"
            for check in own
        ]
        traces.append(
            go.Scatter(
                x=[check["attribution"] for check in own], y=[check["ablation"] for check in own],
                mode="markers", marker={"color": color, "symbol": symbol, "size": 9},
                name=label + "s", customdata=names,
                hovertemplate="%{customdata}<br>attribution %{x:+.4f}, ablation %{y:+.4f}"
                "<extra></extra>",
            )
        )  # fmt: skip
    return plot(traces, "attribution", "ablation", height=340)


def _layer_axis(layers: Sequence[int]) -> dict[str, Any]:
    step = -(-len(layers) // 16)
    return {
        "title": {"text": "layer"}, "zeroline": False,
        "tickvals": list(range(0, len(layers), step)),
        "ticktext": [str(layer) for layer in layers[::step]],
        "range": [-0.6, len(layers) - 0.4],
    }  # fmt: skip


def _visible(token: str) -> str:
    """A token with its spaces, line ends and tabs to be seen, as page.js shows them."""
    for hidden, sign in ((" ", "·"), ("\r\n", "⏎"), ("\n", "⏎"), ("\t", "⇥")):
        token = token.replace(hidden, sign)
    return token or "∅"


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def _escaped(token: str) -> str:
    """The same for plotly, which reads some HTML."""
    return html.escape(_visible(token))
