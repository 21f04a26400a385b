"""Measure an MLSAE on held-out text: what it reconstructs, and what the model then predicts.

    python -m mlsae.evaluate runs/demo                     # the text it was trained beside
    python -m mlsae.evaluate runs/70m my-text.jsonl --tokens 1000000
    python -m mlsae.evaluate runs/one-layer --layers 0 1 2 3 4 5 --out runs/one-layer-elsewhere

It prints two tables, and leaves evaluation.csv (a row a layer and one of means) and
evaluation.json, with 95 % intervals, in the run's folder.

Legend: L layers, R rows, T positions.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

from .data.tokens import not_special
from .distributed import choose_device
from .errors import exit_on_bad_input
from .evaluation.faithfulness import Measured, measure_faithfulness
from .evaluation.heldout import HeldoutConfig, open_run
from .evaluation.patching import check_substitution
from .evaluation.token_metrics import Interval, with_intervals
from .files import write_file
from .memory import peak
from .report import redraw

_CHECKED_POSITIONS = 32  # of one row: enough to see whether a model can be substituted in


@dataclass(frozen=True)
class EvaluateConfig(HeldoutConfig):
    """What to measure, and on what: it leaves evaluation.csv and evaluation.json."""


@dataclass(frozen=True)
class Result:
    """What an evaluation found: figures with intervals, and where and how they were measured."""

    layers: tuple[int, ...]
    figures: dict[str, Interval]
    """See `figures.Figures`; and `dead`, `pca`, which have no interval."""
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: NaN is null."""
        found: dict[str, Any] = {}
        for name, (value, low, high) in self.figures.items():
            found[name] = {
                "mean": _number(value[-1]),
                "mean_interval": [_number(low[-1]), _number(high[-1])],
                "layers": [_number(x) for x in value[:-1]],
                "intervals": [
                    [_number(a), _number(b)] for a, b in zip(low[:-1], high[:-1], strict=True)
                ],
            }
        return {**self.about, "layers": list(self.layers), "figures": found}

    def as_csv(self) -> str:
        """A row a layer, then "mean"; a column a figure, and two for the ends of its interval
        (empty where it has none)."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ends = ("", "_low", "_high")
        writer.writerow(["layer", *(name + end for name in self.figures for end in ends)])
        for i, layer in enumerate((*self.layers, "mean")):
            cells = (_number(column[i]) for figure in self.figures.values() for column in figure)
            writer.writerow([layer, *("" if cell is None else cell for cell in cells)])
        return text.getvalue()

    def tables(self) -> tuple[Table, Table]:
        """To print: of the residuals, and of the predictions. ± is half an interval's width."""
        n_tokens, n_predictions = self.about["tokens"], self.about["predictions"]
        k = self.about["k"]
        residuals = self._table(
            f"Residuals reconstructed: {n_tokens:,} held-out tokens",
            {
                "FVU": ("fvu", ".4f", True),
                "FVU, paper's": ("fvu_paper", ".4f", False),
                "MSE": ("mse", ".3g", False),
                "L0": ("l0", ".1f", False),
                "L1": ("l1", ".1f", False),
                "dead": ("dead", ".1%", False),
                "explained": ("explained", ".1%", False),
                f"PCA of {k}": ("pca", ".1%", False),
            },
        )
        predictions = self._table(
            f"Predictions kept: {n_predictions:,} next tokens, "
            f"true CE {self.about['ce_true']:.3f} nats",
            {
                "ΔCE": ("delta_ce", ".3f", True),
                "KL": ("kl", ".3f", True),
                "top-1": ("top1", ".1%", True),
                "recovered, mean": ("recovered_mean", ".1%", True),
                "recovered, zero": ("recovered_zero", ".1%", True),
            },
        )
        return residuals, predictions

    def _table(self, title: str, columns: dict[str, tuple[str, str, bool]]) -> Table:
        table = Table(title=title)
        for heading in ("layer", *columns):
            table.add_column(heading, justify="right")
        for i, layer in enumerate((*self.layers, "mean")):
            cells = []
            for name, form, spread in columns.values():
                value, low, high = (column[i].item() for column in self.figures[name])
                cell = format(value, form)
                if spread and not math.isnan(low):
                    cell += f" [dim]± {format((high - low) / 2, form)}[/dim]"
                cells.append(cell)
            if layer == "mean":
                table.add_section()
            table.add_row(str(layer), *cells)
        return table


def evaluate(config: EvaluateConfig) -> Result:
    """Measure as `config` says, and write evaluation.csv and evaluation.json.

    Raises InputError for bad input, before anything is measured.
    """
    started = time.perf_counter()
    device, out = choose_device(config.device), config.out or config.run
    mlsae, stream = open_run(config, device)
    settings = stream.config
    out.mkdir(parents=True, exist_ok=True)
    input_ids = stream.heldout(config.tokens)
    token_mask = not_special(input_ids, stream.tokenizer)
    check_substitution(stream.reader, input_ids[:1, :_CHECKED_POSITIONS].to(device))
    measured = measure_faithfulness(mlsae, stream.reader, input_ids, token_mask, stream.micro_rows)
    result = Result(
        stream.reader.layers,
        _figures(measured, config.resamples, stream.seed),
        {
            "run": str(config.run),
            "model": settings.model,
            "dataset": settings.dataset,
            "tokens": int(measured.rows.tokens.sum()),
            "predictions": int(measured.rows.predictions.sum()),
            "rows": len(input_ids),
            "seq_len": stream.seq_len,
            "n_latents": mlsae.config.n_latents,
            "k": mlsae.config.k,
            "trained_on_layers": list(mlsae.config.layers),
            "ce_true": (measured.rows.ce_true.sum() / measured.rows.predictions.sum()).item(),
            "dead_at_every_layer": (~measured.active.any(1)).double().mean().item(),
            "interval": f"95 %, {config.resamples} bootstrap resamples of the rows",
            "seed": stream.seed,
            "seconds": time.perf_counter() - started,
            "peak_bytes": peak(device),
            "device": str(device),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    )
    write_file(out / "evaluation.csv", result.as_csv().encode())
    write_file(out / "evaluation.json", json.dumps(result.as_dict(), indent=2).encode())
    return result


def _figures(measured: Measured, resamples: int, seed: int) -> dict[str, Interval]:
    """All figures; those that are no mean over tokens have no interval.

    dead: the share of latents with h > 1e-3 (`model.ACTIVE`) at no measured token of the layer.
    pca: `metrics.pca_explained` by k components, each layer's own.
    """
    found = with_intervals(measured.rows, resamples, seed)
    for name, layers in (("dead", (~measured.active).double().mean(0)), ("pca", measured.pca)):
        value = torch.cat([layers, layers.mean(0, keepdim=True)]).cpu()
        found[name] = Interval(value, *2 * [torch.full_like(value, math.nan)])
    return found


def _number(value: torch.Tensor) -> float | None:
    """A number, or None for NaN and infinity, which JSON has not."""
    number = value.item()
    return number if math.isfinite(number) else None


def parse(arguments: Sequence[str]) -> EvaluateConfig:
    """The settings of a command line."""
    return tyro.cli(
        EvaluateConfig,
        args=arguments,
        description=(__doc__ or "").split("Legend:")[0],
        use_underscores=True,
        prog="python -m mlsae.evaluate",
    )


def main() -> None:
    """The program."""
    config = parse(sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False)
    with exit_on_bad_input():
        result = evaluate(config)
        about, out = result.about, config.out or config.run
        redraw(out)
        console.print(*result.tables(), sep="\n")
        console.print(
            "CE, KL in nats per token; ± half the width of a 95% bootstrap interval over "
            f"{about['rows']:,} rows",
            f"{about['dead_at_every_layer']:.1%} of {about['n_latents']:,} latents dead at all of "
            "these layers",
            f"measured in {about['seconds']:.0f} s",
            f"peak memory: {about['peak_bytes'] / 1e9:.2f} GB",
            f"figures: {out / 'evaluation.csv'}, {out / 'evaluation.json'}",
            sep="\n",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
