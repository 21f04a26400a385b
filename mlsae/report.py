"""Draw a run as one page, `report.html`: self-contained, so it opens anywhere, offline too.

    python -m mlsae.report runs/demo

Legend: L layers, M latents.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Annotated, Any

import plotly.graph_objects as go
import plotly.offline
import safetensors.torch
import torch
import tyro
from plotly.colors import sample_colorscale
from torch import Tensor

from .errors import InputError, exit_on_bad_input
from .files import write_file
from .metrics import mean_layer, normalized_entropy

_MAX_COLUMNS = 2000  # of the heatmap: more than a screen shows, and the page stays small

_FVU_TICKS = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168;
  --back: #fff; --line: #d9dce0; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e6e9; --soft: #9aa1a9; --back: #15171a; --line: #32363b; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: .25rem; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .25rem; }}
p {{ color: var(--soft); margin: .25rem 0 .5rem; max-width: 75ch; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ border-bottom: 1px solid var(--line); padding: .25rem .9rem .25rem 0; text-align: left; }}
.figure {{ width: 100%; }}
</style>
<script>{plotly}</script></head><body>
<h1>{title}</h1>
<table>{facts}</table>
{sections}
<script>
const dark = matchMedia("(prefers-color-scheme: dark)");
function ink() {{
  const style = getComputedStyle(document.documentElement);
  return [style.getPropertyValue("--ink").trim(), style.getPropertyValue("--line").trim()];
}}
function draw() {{
  const [text, line] = ink();
  for (const node of document.querySelectorAll(".figure")) {{
    const figure = JSON.parse(node.nextElementSibling.textContent);
    const layout = figure.layout;
    layout.font = {{ color: text }};
    for (const name of ["xaxis", "yaxis", "yaxis2"])
      if (layout[name]) layout[name] = {{ gridcolor: line, zerolinecolor: line, ...layout[name] }};
    Plotly.react(node, figure.data, layout, {{ responsive: true, displaylogo: false }});
  }}
}}
draw();
dark.addEventListener("change", draw);
</script>
</body></html>
"""


def write_report(folder: Path) -> None:
    """Write `report.html` from the other files of the run in `folder`.

    Raises InputError where one of them is missing or damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        totals = safetensors.torch.load_file(folder / "latents.safetensors")["totals"].double()
        measured = [line for line in lines if "heldout" in line]
        heldout = measured[-1]["heldout"]
        curve = [line for line in lines if "loss" in line]
    except (OSError, ValueError, KeyError, IndexError, safetensors.SafetensorError) as error:
        raise InputError(
            "RUN must be the folder of a finished training run, and "
            f"{folder} cannot be read: {error}"
        ) from error
    fired = totals[totals.sum(1) > 0]
    sections = [
        (
            "At which layers each latent is active",
            f"One column for each of the {len(fired):,} latents that fired on "
            f"{heldout['n_tokens']:,} held-out tokens, sorted by mean layer. The colour is the "
            "share of the latent's summed activation that falls in the layer. A latent of one "
            "layer is a single bright cell; one that runs through the model is a column of one "
            "shade." + _binning(len(fired)),
            _heatmap(fired, config["layers"]),
        ),
        (
            "Mean layer of the latents",
            f"The mean of the same distribution. Its normalised entropy is "
            f"{normalized_entropy(fired).mean():.3f} on average (0: each latent in one layer; "
            "1: all layers alike).",
            _histogram(fired, config["layers"]),
        ),
        (
            "Reconstruction of each layer",
            "Fraction of variance unexplained on held-out text, about the mean of each dimension, "
            "and as the paper computes it, about one mean of all elements, which large means of "
            "dimensions make look smaller.",
            _per_layer(heldout, config["layers"]),
        ),
        (
            "Training",
            "FVU of the training text, mean and each layer, that of held-out text, and the share "
            "of dead latents.",
            _curve(curve, measured, config["layers"]),
        ),
    ]
    facts = {
        "model": config["model"],
        "dataset": config["training"]["dataset"],
        "latents": f"{config['n_latents']:,} ({config['n_latents'] / config['d_in']:g} × d_model)",
        "k": config["k"],
        "trained on": f"{curve[-1]['tokens']:,} tokens × {len(config['layers'])} layers",
        "held-out FVU": f"{heldout['fvu']:.4f} (as in the paper: {heldout['fvu_paper']:.4f})",
        "dead latents": f"{curve[-1]['dead']:.1%}",
    }
    page = _PAGE.format(
        title=html.escape(f"Multi-layer SAE of {config['model']}"),
        plotly=plotly.offline.get_plotlyjs(),
        facts="".join(
            f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items()
        ),
        sections="\n".join(_section(*section) for section in sections),
    )
    write_file(folder / "report.html", page.encode())


def _section(title: str, text: str, figure: go.Figure) -> str:
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 60, "t": 20, "b": 50},
        modebar={"bgcolor": "rgba(0,0,0,0)"},
        height=figure.layout.height or 340,
    )
    data = figure.to_json().replace("</", "<\\/")
    return (
        f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"
        f'<div class="figure"></div><script type="application/json">{data}</script>'
    )


def _columns(n_latents: int) -> int:
    """Latents that share a column of the heatmap."""
    return -(-n_latents // _MAX_COLUMNS)


def _binning(n_latents: int) -> str:
    width = _columns(n_latents)
    return f" Each column is the mean of {width} neighbours." if width > 1 else ""


def _heatmap(totals: Tensor, layers: list[int]) -> go.Figure:
    share = totals / totals.sum(1, keepdim=True)  # (M, L)
    share = share[mean_layer(totals).argsort()]
    width = _columns(len(share))
    z = torch.stack([part.mean(0) for part in share.split(width)]).T  # (L, columns)
    return go.Figure(
        go.Heatmap(
            z=[[round(value, 4) for value in row] for row in z.tolist()],
            x0=(width + 1) / 2,  # the first column is the mean of latents 1 … width
            dx=width,
            y=[str(layer) for layer in layers],
            colorscale="Viridis",
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "share"}},
            hovertemplate="layer %{y}<br>latent %{x:.0f}<br>share %{z:.2f}<extra></extra>",
        ),
        {
            "xaxis": {"title": {"text": "latents, by mean layer"}, "showgrid": False},
            "yaxis": {"title": {"text": "layer"}, "autorange": "reversed", "type": "category"},
            "height": 120 + 40 * max(4, len(layers)),
        },
    )


def _histogram(totals: Tensor, layers: list[int]) -> go.Figure:
    return go.Figure(
        go.Histogram(
            x=[round(value, 3) for value in mean_layer(totals).tolist()],
            xbins={
                "start": 0,
                "end": max(1, len(layers) - 1),
                "size": max(1, len(layers) - 1) / 48,
            },
        ),
        {
            "xaxis": {"title": {"text": "mean layer (position among the layers read)"}},
            "yaxis": {"title": {"text": "latents"}},
            "bargap": 0.05,
        },
    )


def _per_layer(heldout: dict[str, Any], layers: list[int]) -> go.Figure:
    x = [str(layer) for layer in layers]
    return go.Figure(
        [
            go.Bar(x=x, y=heldout["fvu_layers"], name="FVU"),
            go.Bar(x=x, y=heldout["fvu_paper_layers"], name="FVU as in the paper"),
        ],
        {
            "xaxis": {"title": {"text": "layer"}, "type": "category"},
            "yaxis": {"title": {"text": "FVU"}, "rangemode": "tozero"},
            "legend": {"orientation": "h", "y": 1.12},
        },
    )


def _curve(
    curve: list[dict[str, Any]], measured: list[dict[str, Any]], layers: list[int]
) -> go.Figure:
    tokens = [line["tokens"] for line in curve]
    dead = [line["dead"] for line in curve]
    shades = sample_colorscale("Viridis", [0.2 + 0.6 * i / len(layers) for i in range(len(layers))])
    figure = go.Figure(
        layout={
            "xaxis": {"title": {"text": "tokens"}},
            "yaxis": {"title": {"text": "FVU"}, "type": "log", "tickvals": _FVU_TICKS},
            "yaxis2": {
                "title": {"text": "dead latents"},
                "overlaying": "y",
                "side": "right",
                "tickformat": ".0%",
                "tickmode": "auto",
                "range": [0, 1.1 * max(0.1, *dead)],
                "showgrid": False,
            },
            "legend": {"orientation": "h", "y": 1.15},
            "height": 420,
        }
    )
    for i, (layer, shade) in enumerate(zip(layers, shades, strict=True)):
        y = [line["fvu_layers"][i] for line in curve]
        stroke = {"width": 1.5, "color": shade}
        figure.add_scatter(x=tokens, y=y, name=f"layer {layer}", line=stroke)
    mean = [line["fvu"] for line in curve]
    figure.add_scatter(x=tokens, y=mean, name="mean", line={"width": 3, "color": "#d62728"})
    figure.add_scatter(
        x=[line["tokens"] for line in measured],
        y=[line["heldout"]["fvu"] for line in measured],
        name="mean, held-out",
        mode="markers",
        marker={"size": 9, "symbol": "diamond", "color": "#d62728"},
    )
    dash = {"dash": "dot", "color": "#7f7f7f"}
    figure.add_scatter(x=tokens, y=dead, name="dead latents", yaxis="y2", line=dash)
    return figure


def main() -> None:
    """The program."""
    folder = tyro.cli(
        Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", help="Folder of a run.")],
        description=(__doc__ or "").split("Legend:")[0],
        prog="python -m mlsae.report",
    )
    with exit_on_bad_input():
        write_report(folder)
        print(folder / "report.html")


if __name__ == "__main__":
    main()
