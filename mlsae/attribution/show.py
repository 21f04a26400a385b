"""What `python -m mlsae.trace` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..analysis.prompt import bars
from ..cli import empty_table
from .ablation import Check, pearson, spearman
from .result import Trace


def shown(trace: Trace, n: int) -> Iterator[RenderableType]:
    """Tables of n rows and lines to print, in their order."""
    yield Text(f"{trace.name} = {trace.attribution.value:.4f}")
    yield _flows(trace, n)
    yield _layers(trace)
    kinds = (("latents", trace.of_latents()), ("errors", trace.of_errors()))
    for kind, checks in kinds:
        if checks:
            yield _checks(trace, kind, checks[:n])
            yield _correlation(kind, checks)
    if trace.attribution.edges:
        yield _edges(trace, n)


def _flows(trace: Trace, n: int) -> Table:
    ends = f"layers {trace.layers[0]} … {trace.layers[-1]}"
    headings = ["token", "", "latent", ends, "strongest at", "attribution"]
    table = empty_table("Latents along the layers", headings, {"", ends})
    for flow in trace.flows(n):
        sizes = torch.zeros(len(trace.layers), dtype=torch.float64)
        for layer, effect in zip(flow.layers, flow.attribution, strict=True):
            sizes[trace.layers.index(layer)] = abs(effect)
        at = max(range(len(flow.layers)), key=lambda i: abs(flow.attribution[i]))
        table.add_row(
            str(flow.token), _token(trace, flow.token), str(flow.latent), bars(sizes),
            str(flow.layers[at]), f"{flow.attribution[at]:+.4f}",
        )  # fmt: skip
    return table


def _layers(trace: Trace) -> Table:
    headings = ["layer", "latents", "errors", "constants", "all"]
    table = empty_table("Attributions of a layer, summed", headings)
    found = trace.attribution
    parts = [part.sum(1).tolist() for part in (found.latents, found.errors, found.constants)]
    for layer, *sums in zip(trace.layers, *parts, strict=True):
        table.add_row(str(layer), *(f"{x:+.4f}" for x in (*sums, sum(sums))))
    return table


def _checks(trace: Trace, kind: str, checks: Sequence[Check]) -> Table:
    latents = kind == "latents"
    headings = ["token", "", "layer", *(["latent"] if latents else []), "attribution", "ablation"]
    table = empty_table(f"The strongest {kind}", headings, {""})
    for check in checks:
        own = [str(check.latent)] if latents else []
        numbers = (f"{x:+.4f}" for x in (check.attribution, check.ablation))
        where = (str(check.token), _token(trace, check.token), str(check.layer))
        table.add_row(*where, *own, *numbers)
    return table


def _correlation(kind: str, checks: Sequence[Check]) -> str:
    numbers = [
        f"{name} {'–' if value is None else f'{value:.2f}'}"
        for name, value in (("Pearson", pearson(checks)), ("rank", spearman(checks)))
    ]
    return f"correlation of attribution and ablation, of {len(checks)} {kind}: {', '.join(numbers)}"


def _edges(trace: Trace, n: int) -> Table:
    headings = ["from", "at layer", "token", "to", "at layer", "token", "weight"]
    table = empty_table("What rests on what", headings)
    nodes = trace.attribution.nodes
    for edge in trace.attribution.edges[:n]:
        ends = [
            str(int(column[i]))
            for i in (edge.source, edge.sink)
            for column in (nodes.latent, nodes.layer, nodes.token)
        ]
        table.add_row(*ends, f"{edge.weight:+.4f}")
    return table


def _token(trace: Trace, token: int) -> Text:
    return Text(repr(trace.tokens[token]))
