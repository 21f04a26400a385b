"""A run on one page, `report.html`.

Legend: L layers, M latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from ..card import how_many_active, layer_range
from ..data.sinks import DropRule, describe_top_share
from ..files import write_file
from ..metrics import mean_layer, normalized_entropy
from . import latent_plots, layer_plots
from .browser import BrowserData, browser_data
from .pack import MAX_PAGE_BYTES, pack_json, pack_plots, packed_plotly, render, rounded
from .run_data import Analysis, RunData, read_run_data

_MARGIN = 20_000  # bytes: the sentences about the browser, whose length is not known beforehand


def write_report(folder: Path, out: Path | None = None) -> None:
    """Write the page of the run in `folder` to `out`, or to report.html in `folder`.

    Raises InputError if the folder holds no run, or one of its files is damaged.
    """
    run = read_run_data(folder)
    plots = _plots(run)
    packed = {"plotly": packed_plotly(), "plots": pack_plots(plots)}
    scripts: tuple[str, ...] = ("packed.js", "page.js")
    if run.analysis:
        packed["prompt"] = pack_json(_prompt(run.analysis))
        scripts += ("token.js", "prompt.js", "written.js", "list.js", "detail.js", "browser.js")
    page = _render(run, plots, scripts, packed, None)
    if run.analysis:
        room = MAX_PAGE_BYTES - len(page) - _MARGIN
        browser = browser_data(run.analysis, run.labels, room)
        page = _render(run, plots, scripts, packed | browser.packed, browser)
    write_file(out or folder / "report.html", page)


def _render(
    run: RunData,
    plots: dict[str, go.Figure],
    scripts: tuple[str, ...],
    packed: dict[str, str],
    browser: BrowserData | None,
) -> bytes:
    return render(
        "page.html",
        scripts,
        packed,
        title=f"Multi-layer SAE of {run.config.get('model') or run.folder.name}",
        run=run,
        plots=plots,
        facts=_facts(run),
        headline=_headline(run),
        column_note=_column_note(run),
        tokens_note=_tokens_note(run),
        analysis=run.analysis.summary if run.analysis else None,
        prompt=run.analysis.prompt if run.analysis else None,
        evaluation=run.evaluation,
        browser=browser,
    )


def _plots(run: RunData) -> dict[str, go.Figure]:
    """The plots of all that has been measured."""
    plots: dict[str, go.Figure] = {}
    if run.analysis:
        summary = run.analysis.summary
        layers = summary["layers"]
        share = latent_plots.layer_shares(run.analysis.profile.nan_to_num())
        totals = latent_plots.layer_shares(run.analysis.totals)
        plots["heatmap"] = latent_plots.heatmap(share, layers)
        plots["heatmap-totals"] = latent_plots.heatmap(totals, layers)
        plots["mean-layers"] = latent_plots.mean_layers(mean_layer(share), len(layers))
        plots["entropies"] = latent_plots.entropies(normalized_entropy(share))
        plots["ratios"] = latent_plots.ratios(summary["ratios"])
        plots["cosines"] = latent_plots.cosines(summary["cosine_histogram"])
        if "stability" in summary:
            plots["matches"] = latent_plots.matches(summary["stability"])
        if "flow" in summary:
            plots["flow"] = layer_plots.flow(summary["flow"], layers)
        plots["adjacent"] = layer_plots.adjacent(summary["adjacent"], layers)
    elif run.totals is not None:
        share = latent_plots.layer_shares(run.totals)
        plots["heatmap-totals"] = latent_plots.heatmap(share, run.layers)
        plots["mean-layers"] = latent_plots.mean_layers(mean_layer(share), len(run.layers))
        plots["entropies"] = latent_plots.entropies(normalized_entropy(share))
    if run.evaluation:
        metrics, layers = run.evaluation["figures"], run.evaluation["layers"]
        plots["fvu"] = layer_plots.fvu(metrics, layers)
        plots["delta-ce"] = layer_plots.delta_ce(metrics, layers)
    elif run.validation:
        plots["fvu"] = layer_plots.fvu_of_training(run.validation[-1]["heldout"], run.layers)
    if run.training:
        plots["training"] = layer_plots.training(run.training, run.validation, run.layers)
    return plots


def _column_note(run: RunData) -> str:
    """What one column of the heatmap over all text shows."""
    totals = run.analysis.totals if run.analysis else run.totals
    n_latents = int((totals.sum(1) > 0).sum()) if totals is not None else 0
    width = latent_plots.column_width(n_latents)
    column = f"the mean of {width} neighboring latents" if width > 1 else "one latent"
    return f"Each column is {column}, of the {n_latents:,} that were active"


def _facts(run: RunData) -> dict[str, str]:
    config = run.config
    number, more = how_many_active(config)
    facts = {
        "model": run.model,
        "layers": layer_range(run.layers) or "not named",  # in the files of some libraries
        "latents": f"{config['n_latents']:,} ({run.expansion:g} × d_model)",
        "k": f"{number} active per token and layer{more}",
    }
    if lens := config.get("lens"):
        facts["basis"] = f"the last layer's, by a lens ({lens.get('kind')}); the curves of training"
        facts["basis"] += " and “FVU, lens's” are in it, all else in the model's own"
    if run.dataset:
        facts["text"] = run.dataset
    if run.dropped:
        facts["left out"] = run.dropped
    if run.training:
        facts["trained on"] = f"{run.training[-1]['tokens']:,} tokens × {len(run.layers)} layers"
    return facts


def _headline(run: RunData) -> list[tuple[str, str, str]]:
    """The main metrics: label, value, and the unit or what the value is a share of."""
    headline: list[tuple[str, str, str]] = []
    if run.evaluation:
        metrics = run.evaluation["figures"]
        fvu, delta_ce = (_decimals(metrics[name]["mean"]) for name in ("fvu", "delta_ce"))
        headline.append(("FVU", fvu, _of_fvu(metrics.get("fvu_all", {}).get("mean"))))
        headline.append(("ΔCE", delta_ce, "nats per token"))
    elif run.validation:
        heldout = run.validation[-1]["heldout"]
        headline.append(("FVU", _decimals(heldout["fvu"]), _of_fvu(heldout.get("fvu_all"))))
    if run.analysis:
        ratios = run.analysis.summary["ratios"]["equations"]
        for name, of in (
            ("A", "spread left, given the latent"),
            ("B", "of that, left at one token"),
        ):
            headline.append((f"ratio {name}", _decimals(ratios[name]["value"]), of))
    totals = run.analysis.profile.nan_to_num() if run.analysis else run.totals
    if totals is not None and (totals.sum(1) > 0).any():
        entropy = normalized_entropy(latent_plots.layer_shares(totals)).mean()
        headline.append(("entropy", f"{entropy:.3f}", "of ln L, mean over latents"))
    if run.training:
        headline.append(("dead", f"{run.training[-1]['dead']:.1%}", "of latents, end of training"))
    return headline


def _of_fvu(fvu_all: float | None) -> str:
    """What FVU is a mean of, and its value with the tokens that were left out, if any were."""
    of = "mean over layers, held-out text"
    return of if fvu_all is None else f"{of}; {fvu_all:.3f} with the tokens left out"


def _tokens_note(run: RunData) -> str:
    """Which tokens the metrics of the reconstruction leave out, and whether few vectors make up the
    variance; "" if neither."""
    if run.evaluation:
        rule = str(DropRule.from_dict(run.evaluation.get("dropped", {})))
        shares = run.evaluation["figures"].get("top_share", {}).get("layers", [])
        layers = run.evaluation["layers"]
    else:
        heldout = run.validation[-1]["heldout"] if run.validation else {}
        rule, shares, layers = run.dropped, heldout.get("top_share_layers", []), run.layers
    notes = [f"Left out of these metrics beside special tokens: {rule}"] if rule else []
    known = [(share, layer) for share, layer in zip(shares, layers, strict=False) if share]
    if word := describe_top_share(*zip(*known, strict=True)) if known else "":
        notes.append(word)
    return "".join(f"{note}. " for note in notes)


def _decimals(value: float | None) -> str:
    """A number with three decimals; a dash for None, which stands for one that is not finite."""
    return "–" if value is None else f"{value:.3f}"


def _prompt(analysis: Analysis) -> dict[str, Any]:
    """The prompt, with its activations rounded to four digits."""
    entries = analysis.prompt["entries"]
    return {
        **analysis.prompt,
        "entries": {**entries, "value": [rounded(value) for value in entries["value"]]},
    }
