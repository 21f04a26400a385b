"""The result of an evaluation, as JSON, as CSV, and as tables to print.

Legend: L layers.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table

from ..bootstrap import Interval, finite_or_none
from ..cli import empty_table
from ..data.sinks import DropRule, describe_top_share
from .provenance import Provenance


class _Column(NamedTuple):
    """A column of a printed table: a metric, its number format, whether to show its interval."""

    metric: str
    form: str
    interval: bool = False


_RESIDUAL_COLUMNS = {
    "FVU": _Column("fvu", ".4f", interval=True),
    "FVU, paper's": _Column("fvu_paper", ".4f"),
    "MSE": _Column("mse", ".3g"),
    "L0": _Column("l0", ".1f"),
    "L1": _Column("l1", ".1f"),
    "dead": _Column("dead", ".1%"),
    "explained": _Column("explained", ".1%"),
    "PCA of {k}": _Column("pca", ".1%"),
    "FVU, with left out": _Column("fvu_all", ".4f"),
    "FVU, lens's basis": _Column("fvu_lens", ".4f"),
}
_PREDICTION_COLUMNS = {
    "ΔCE": _Column("delta_ce", ".3f", interval=True),
    "KL": _Column("kl", ".3f", interval=True),
    "top-1": _Column("top1", ".1%", interval=True),
    "recovered, mean": _Column("recovered_mean", ".1%", interval=True),
    "recovered, zero": _Column("recovered_zero", ".1%", interval=True),
}
_JOINT_COLUMNS = {
    "ΔCE, this layer alone": _Column("delta_ce", ".3f"),
    "ΔCE": _Column("delta_ce_from", ".3f", interval=True),
    "KL": _Column("kl_from", ".3f", interval=True),
    "top-1": _Column("top1_from", ".1%", interval=True),
    "recovered, mean": _Column("recovered_from", ".1%", interval=True),
}


@dataclass(frozen=True)
class EvaluationResult:
    """The metrics of an MLSAE with their intervals, and where they come from."""

    provenance: Provenance
    metrics: dict[str, Interval]
    """By name, (L + 1,) each, the mean over layers last: `token_metrics.TokenMetrics`, and those
    that have no interval (see `run.evaluate`); `fvu_all` only if tokens were dropped, `fvu_lens`
    only with a lens."""
    predictions: int
    """Predictions that were measured: see `token_metrics.TokenSums`."""
    ce_true: float
    """The transformer's own cross-entropy, nats per token."""
    dead_at_every_layer: float
    """Share of latents that are dead at all of the layers."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were measured at."""
        return self.provenance.layers

    def as_dict(self) -> dict[str, Any]:
        """The content of evaluation.json, JSON-serializable: None stands for NaN."""
        figures: dict[str, Any] = {}
        for name, (value, low, high) in self.metrics.items():
            values = [finite_or_none(x) for x in value]
            intervals = [
                [finite_or_none(a), finite_or_none(b)] for a, b in zip(low, high, strict=True)
            ]
            figures[name] = {
                "mean": values[-1],
                "mean_interval": intervals[-1],
                "layers": values[:-1],
                "intervals": intervals[:-1],
            }
        return {
            **self.provenance.as_dict(),
            "predictions": self.predictions,
            "ce_true": self.ce_true,
            "dead_at_every_layer": self.dead_at_every_layer,
            "figures": figures,
        }

    def as_csv(self) -> str:
        """One row per layer, then "mean". Each metric has a column, and two for the ends of its
        interval, which are empty if it has none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ends = ("", "_low", "_high")
        writer.writerow(["layer", *(name + end for name in self.metrics for end in ends)])
        for i, layer in enumerate((*self.layers, "mean")):
            cells = (
                finite_or_none(part[i]) for interval in self.metrics.values() for part in interval
            )
            writer.writerow([layer, *("" if cell is None else cell for cell in cells)])
        return text.getvalue()

    def tables(self) -> list[Table]:
        """Tables of the residuals, of the predictions, and of those with several layers replaced,
        if that was measured. ± is half of an interval's width."""
        n_dropped = self.provenance.tokens_dropped
        dropped = f", {n_dropped:,} more left out" if n_dropped else ""
        residuals = self._table(
            f"Residuals reconstructed: {self.provenance.tokens:,} held-out tokens{dropped}",
            {
                heading: column
                for heading, column in _RESIDUAL_COLUMNS.items()
                if column.metric in self.metrics
            },
        )
        predictions = self._table(
            f"Predictions kept: {self.predictions:,} next tokens, true CE {self.ce_true:.3f} nats",
            _PREDICTION_COLUMNS,
        )
        joint = [self._joint_table()] if "delta_ce_from" in self.metrics else []
        return [residuals, predictions, *joint]

    def notes(self) -> list[str]:
        """Lines about dropped tokens, and about few vectors that make up the variance."""
        notes = []
        if rule := str(DropRule.from_dict(self.provenance.dropped)):
            notes.append(f"left out beside special tokens: {rule}")
        top_share = self.metrics["top_share"].value[:-1].tolist()
        if word := describe_top_share(top_share, self.layers):
            notes.append(word)
        if lens := self.provenance.lens:
            notes.append(
                f"in the basis of a lens ({lens['kind']}); all figures are in the model's own, but "
                "for L1 and the FVU in the lens's"
            )
        return notes

    def _joint_table(self) -> Table:
        """A row for each set of layers that was replaced at once."""
        table = empty_table(
            "Predictions kept with several layers replaced at once", ["layers", *_JOINT_COLUMNS]
        )
        top = self.layers[-1]
        for i, layer in enumerate(self.layers):
            if not math.isnan(self.metrics["delta_ce_from"].value[i]):
                cells = [_cell(self.metrics[c.metric], i, c) for c in _JOINT_COLUMNS.values()]
                table.add_row(f"{layer} … {top}" if layer < top else f"{top}", *cells)
        return table

    def _table(self, title: str, columns: dict[str, _Column]) -> Table:
        headings = [heading.format(k=self.provenance.k) for heading in columns]
        table = empty_table(title, ["layer", *headings])
        for i, layer in enumerate((*self.layers, "mean")):
            cells = [_cell(self.metrics[column.metric], i, column) for column in columns.values()]
            if layer == "mean":
                table.add_section()
            table.add_row(str(layer), *cells)
        return table


def _cell(interval: Interval, i: int, column: _Column) -> str:
    value, low, high = (part[i].item() for part in interval)
    cell = format(value, column.form)
    if column.interval and not math.isnan(low):
        cell += f" [dim]± {format((high - low) / 2, column.form)}[/dim]"
    return cell
