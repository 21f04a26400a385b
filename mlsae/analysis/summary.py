"""What an analysis prints: the spread over layers by both estimators, the layers, the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..bootstrap import Interval
from ..cli import empty_table
from ..data.sinks import DropRule
from .layer_spread import RATIOS
from .result import AnalysisResult

_LABELS = {
    "var_layer": "Var(L)",
    "var_given_latent": "E[Var(L | J)]",
    "var_given_latent_token": "E[Var(L | J, T)]",
    "A": "ratio A",
    "B": "ratio B",
}


def print_analysis(result: AnalysisResult, out: Path, asked_tokens: int) -> None:
    """Print the result of an analysis of `asked_tokens` tokens, and the files in `out`."""
    console = Console(highlight=False)
    about = result.provenance
    n_tokens = about.rows * about.seq_len
    if n_tokens < asked_tokens // about.seq_len * about.seq_len:
        console.print(f"the held-out text has only {n_tokens:,} tokens")
    directions: dict[str, Any] = result.directions.as_dict()
    cosines = {
        name: directions["embeddings"][side] for name, side in (("input", "in"), ("output", "out"))
    }
    console.print(_spread_table(result), _layer_table(result), sep="\n")
    if rule := str(DropRule.from_dict(about.dropped)):
        console.print(f"left out beside special tokens: {rule} ({about.tokens_dropped:,} tokens)")
    console.print(
        "L is the layer, J a latent, T a token. A = E[Var(L | J)] / Var(L): the spread left within "
        "a latent; B = E[Var(L | J, T)] / E[Var(L | J)]: the part of it left for one token; beside "
        "them 95% bootstrap intervals",
        f"{result.active_latents:,} of {about.n_latents:,} latents active; largest cosine to "
        f"another latent {directions['mmcs']['value']:.3f} on average (MMCS), of random directions "
        f"{directions['mmcs']['random']:.3f}",
        "largest cosine to a token's embedding, on average: "
        + ", ".join(
            f"{name} {cosine:.3f}" if cosine is not None else f"{name}: of another width"
            for name, cosine in cosines.items()
        ),
        *_flow_lines(result),
        *_stability_lines(result),
        f"analyzed in {about.seconds:.0f} s, {result.pass_seconds:.0f} s of it over the text "
        f"({about.tokens / result.pass_seconds:,.0f} tokens/s)",
        f"peak memory: {about.peak_bytes / 1e9:.2f} GB",
        f"{result.examples:,} examples: {out / 'analysis_examples.parquet'}",
        f"latents: {out / 'analysis_latents.parquet'}",
        f"metrics: {out / 'analysis.json'}, {out / 'analysis.safetensors'}",
        sep="\n",
        soft_wrap=True,
    )


def _spread_table(result: AnalysisResult) -> Table:
    """The spread over layers by both estimators; only ratios and entropies have intervals."""
    spread = empty_table(
        f"Spread over layers: {result.provenance.tokens:,} held-out tokens",
        ["", "paper's equations", "its released code"],
        left=[""],
    )
    for name in RATIOS:
        cell = _with_ends if name in ("A", "B") else _value
        spread.add_row(_LABELS[name], cell(result.spread[name]), cell(result.released[name]))
    spread.add_section()
    spread.add_row("entropy / ln L", _with_ends(result.spread["entropy"]), "")
    spread.add_row("of summed activation", _with_ends(result.spread["entropy_totals"]), "")
    return spread


def _stability_lines(result: AnalysisResult) -> list[str]:
    """How many latents other SAEs have, too; none without others."""
    if result.stability is None:
        return []
    found = result.stability.as_dict()
    names = ", ".join(Path(name).name for name in found["others"])
    if not found["pairs"]:
        return [f"beside {names}: no latent was active on both sides"]
    above = ", ".join(
        f"{share:.1%} with a mutual match above {least}"
        for least, share in sorted(found["mutual_above"].items(), reverse=True)
    )
    return [
        f"beside {names}: the best cosine of decoder rows is {found['median']:.3f} (median over "
        f"latents); {above}; by chance it is {found['chance']['median']:.3f}, and 99% are below "
        f"{found['chance']['upper']:.3f}"
    ]


def _flow_lines(result: AnalysisResult) -> list[str]:
    """How many latents go on from layer to layer, and the strongest pair of which one follows the
    other; none with a single layer."""
    if result.flow is None:
        return []
    flow = result.flow.as_dict()
    active, ended = sum(flow["active"][:-1]), sum(flow["ended"][:-1])
    lines = [
        f"of the latents active at a token and layer, {1 - ended / active:.1%} are active at the "
        "next layer, too"
        if active
        else "no latent was active below the last layer"
    ]
    if flow["pairs"]:
        first = flow["pairs"][0]
        lines.append(
            f"what ends at one layer and what begins at the next: the strongest pair is latent "
            f"{first['ended']} and then {first['began']}, at {first['share']:.1%} of the former's "
            f"ends ({first['chance']:.1%} by chance)"
        )
    return lines


def _layer_table(result: AnalysisResult) -> Table:
    """Norms of the centered residuals, and cosines of neighboring layers'."""
    layers = empty_table("Residuals, about their mean", ["layer", "norm", "cosine with the next"])
    adjacent = result.adjacent.as_dict()
    cosines = [*(f"{cosine:.3f}" for cosine in adjacent["cosine"]), ""]
    for layer, norm, cosine in zip(
        result.provenance.layers, adjacent["norm"], cosines, strict=True
    ):
        layers.add_row(str(layer), f"{norm:.2f}", cosine)
    return layers


def _value(interval: Interval) -> str:
    value = interval.as_dict()["value"]
    return "–" if value is None else f"{value:.4f}"


def _with_ends(interval: Interval) -> str:
    """A metric, and the ends of its interval if it has one."""
    _, low, high = interval.as_dict().values()
    ends = "" if low is None or high is None else f" [dim]{low:.4f} … {high:.4f}[/dim]"
    return _value(interval) + ends
