"""What sharing one SAE among all layers costs: an MLSAE beside an SAE for each layer, all measured
at all layers.

Legend: L layers.
"""

from __future__ import annotations

import csv
import io

import torch
from rich.table import Table
from torch import Tensor

from ..cli import empty_table
from .result import EvaluationResult

SHARED = "all"
"""The MLSAE's name among the results; a single-layer SAE's is its layer: "0", …"""

Results = dict[str, EvaluationResult]

_METRICS = ("fvu", "fvu_paper", "delta_ce", "kl", "top1")


def grid(results: Results, metric: str) -> Tensor:
    """A metric [trained on, measured at]: (1 + L, L), the MLSAE's row first, float64."""
    rows = [result.metrics[metric].value[:-1] for result in results.values()]
    return torch.stack(rows).double()


def as_csv(results: Results) -> str:
    """A row per SAE and layer; each metric has a column, and two for the ends of its interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ("", "_low", "_high")
    writer.writerow(["trained_on", "measured_at", *(m + end for m in _METRICS for end in ends)])
    for name, result in results.items():
        for i, layer in enumerate(result.layers):
            cells = (part[i].item() for m in _METRICS for part in result.metrics[m])
            writer.writerow([name, layer, *cells])
    return text.getvalue()


def table(results: Results, metric: str, title: str) -> Table:
    """A row per SAE, a column per layer that it is measured at; its own layers are bold."""
    layers = results[SHARED].layers
    filled = empty_table(title, ["trained on", *(f"at {layer}" for layer in layers)])
    for name, row in zip(results, grid(results, metric).tolist(), strict=True):
        cells = [
            f"[bold]{value:.4f}[/bold]" if name in (SHARED, str(layer)) else f"{value:.4f}"
            for layer, value in zip(layers, row, strict=True)
        ]
        filled.add_row(name, *cells)
        if name == SHARED:
            filled.add_section()
    return filled


def summary(results: Results) -> str:
    """One sentence: what sharing costs, and what a single-layer SAE is worth elsewhere."""
    fvu = grid(results, "fvu")
    n_layers = fvu.shape[1]
    own = fvu[1:].diagonal().mean().item()
    text = f"FVU, mean over layers: {fvu[0].mean():.4f} shared, {own:.4f} with an SAE per layer"
    if n_layers > 1:
        elsewhere = (fvu[1:].sum() - fvu[1:].trace()).item() / (n_layers * (n_layers - 1))
        text += f", {elsewhere:.4f} with one of another layer"
    return text
