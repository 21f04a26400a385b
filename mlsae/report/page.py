"""A run as one page, `report.html`.

Legend: L layers, M latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from ..files import write_file
from ..metrics import mean_layer, normalized_entropy
from . import latent_figures, layer_figures
from .latents import Browser, browser
from .pack import LIMIT, number, pack_figures, pack_json, packed_plotly, render
from .run_data import Analysis, Run, read_run_data

_MARGIN = 20_000  # bytes of the page's own text that are not known before it is rendered


def write_report(folder: Path, out: Path | None = None) -> None:
    """Write the page of the run in `folder` to `out`, or report.html in it.

    Raises InputError if the folder holds no run, or a file of it is damaged.
    """
    run = read_run_data(folder)
    figures = _figures(run)
    packed = {"plotly": packed_plotly(), "figures": pack_figures(figures)}
    scripts: tuple[str, ...] = ("page.js",)
    listed: Browser | None = None
    if run.analysis:
        packed["prompt"] = pack_json(_prompt(run.analysis))
        scripts = ("page.js", "prompt.js", "list.js", "detail.js", "browser.js")
    page = _render(run, figures, scripts, packed, listed)
    if run.analysis:
        listed = browser(run.analysis, LIMIT - len(page) - _MARGIN)
        page = _render(run, figures, scripts, packed | listed.packed, listed)
    write_file(out or folder / "report.html", page)


def _render(
    run: Run,
    figures: dict[str, go.Figure],
    scripts: tuple[str, ...],
    packed: dict[str, str],
    listed: Browser | None,
) -> bytes:
    return render(
        "page.html",
        scripts,
        packed,
        title=f"Multi-layer SAE of {run.config.get('model') or run.folder.name}",
        run=run,
        figures=figures,
        facts=_facts(run),
        headline=_headline(run),
        groups=_groups(run),
        analysis=run.analysis.about if run.analysis else None,
        prompt=run.analysis.prompt if run.analysis else None,
        evaluation=run.evaluation,
        browser=listed,
    )


def _figures(run: Run) -> dict[str, go.Figure]:
    """The figures that the run has the numbers for."""
    figures: dict[str, go.Figure] = {}
    analysis = run.analysis
    if analysis:
        layers = analysis.about["layers"]
        q = latent_figures.shares(analysis.profile.nan_to_num())
        figures["heatmap"] = latent_figures.heatmap(q, layers)
        totals = latent_figures.shares(analysis.totals)
        figures["heatmap-totals"] = latent_figures.heatmap(totals, layers)
        figures["mean-layers"] = latent_figures.mean_layers(mean_layer(q), len(layers))
        figures["entropies"] = latent_figures.entropies(normalized_entropy(q))
        figures["ratios"] = latent_figures.ratios(analysis.about["ratios"])
        figures["cosines"] = latent_figures.cosines(analysis.about["cosine_histogram"])
        figures["adjacent"] = layer_figures.adjacent(analysis.about["adjacent"], layers)
    elif run.totals is not None:
        share = latent_figures.shares(run.totals)
        figures["heatmap-totals"] = latent_figures.heatmap(share, run.layers)
        figures["mean-layers"] = latent_figures.mean_layers(mean_layer(share), len(run.layers))
        figures["entropies"] = latent_figures.entropies(normalized_entropy(share))
    if run.evaluation:
        found, layers = run.evaluation["figures"], run.evaluation["layers"]
        figures["fvu"] = layer_figures.fvu(found, layers)
        figures["delta-ce"] = layer_figures.delta_ce(found, layers)
    elif run.heldout:
        figures["fvu"] = layer_figures.fvu_of_training(run.heldout[-1]["heldout"], run.layers)
    if run.metrics:
        figures["training"] = layer_figures.training(run.metrics, run.heldout, run.layers)
    return figures


def _groups(run: Run) -> str:
    """What a column of the aggregated heatmap is, where it is not one latent."""
    totals = run.analysis.totals if run.analysis else run.totals
    n_latents = int((totals.sum(1) > 0).sum()) if totals is not None else 0
    width = latent_figures.columns_of(n_latents)
    each = f"the mean of {width} neighboring latents" if width > 1 else "one latent"
    return f"Each column is {each}, of the {n_latents:,} that were active"


def _facts(run: Run) -> dict[str, str]:
    config = run.config
    facts = {
        "model": str(config.get("model") or "not named"),
        "layers": _written(run.layers),
        "latents": f"{config['n_latents']:,} ({run.expansion:g} × d_model)",
        "k": f"{config['k']:,} active a token and layer",
    }
    if dataset := config.get("training", {}).get("dataset"):
        facts["text"] = str(dataset)
    if run.metrics:
        facts["trained on"] = f"{run.metrics[-1]['tokens']:,} tokens × {len(run.layers)} layers"
    return facts


def _written(layers: list[int]) -> str:
    """0 to 5, or 1, 3, 4."""
    first, last = layers[0], layers[-1]
    if len(layers) > 2 and layers == list(range(first, last + 1)):
        return f"{first} to {last}"
    return ", ".join(map(str, layers))


def _headline(run: Run) -> list[tuple[str, str, str]]:
    """The figures to see first: label, value, unit or what it is of."""
    found: list[tuple[str, str, str]] = []
    if run.evaluation:
        figures = run.evaluation["figures"]
        found.append(("FVU", f"{figures['fvu']['mean']:.3f}", "mean over layers, held out"))
        found.append(("ΔCE", f"{figures['delta_ce']['mean']:.3f}", "nats per token"))
    elif run.heldout:
        heldout = run.heldout[-1]["heldout"]
        found.append(("FVU", f"{heldout['fvu']:.3f}", "mean over layers, held out"))
    if run.analysis:
        ratios = run.analysis.about["ratios"]["equations"]
        for name, of in (("A", "spread left, given the latent"), ("B", "of that, at one token")):
            value = latent_figures.finite(ratios[name]["value"])
            found.append((f"ratio {name}", f"{value:.3f}" if value is not None else "–", of))
    totals = run.analysis.profile.nan_to_num() if run.analysis else run.totals
    if totals is not None and (totals.sum(1) > 0).any():
        entropy = normalized_entropy(latent_figures.shares(totals)).mean()
        found.append(("entropy", f"{entropy:.3f}", "of ln L, mean over latents"))
    if run.metrics:
        found.append(("dead", f"{run.metrics[-1]['dead']:.1%}", "of latents, end of training"))
    return found


def _prompt(analysis: Analysis) -> dict[str, Any]:
    """The prompt with its values to four digits."""
    entries = analysis.prompt["entries"]
    short = {**entries, "value": [number(value) for value in entries["value"]]}
    return {**analysis.prompt, "entries": short}
