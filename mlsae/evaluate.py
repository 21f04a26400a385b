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
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

from .activations import choose_device
from .config import SAEConfig, TrainConfig
from .data import not_special
from .errors import InputError, exit_on_bad_input
from .faithfulness import Measured, measure_faithfulness
from .figures import Interval, with_intervals
from .files import write_file
from .memory import peak
from .model import MLSAE
from .source import Source
from .substitution import check_substitution

_DEFAULT_MICRO_TOKENS = 2048
_CHECKED_POSITIONS = 32  # of one row: enough to see whether a model can be substituted in


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and on what."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a trained MLSAE, or its name on the Hugging Face hub."""
    dataset: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DATASET]")] = None
    """Text: "builtin", a dataset on the hub (streamed), or a local file or folder; its held-out
    rows are used. None: the run's own."""
    tokens: int = 65_536
    """Held-out tokens to measure on, special ones among them; fewer where the text has fewer."""
    layers: tuple[int, ...] | None = None
    """Layers to measure at, others too. None: those it was trained on, or all if not known."""
    model: str | None = None
    """The transformer. None: the one it was trained on."""
    column: str | None = None
    """The dataset's column of text. None: as in the run, or "text"."""
    seq_len: int | None = None
    """Tokens a row. None: as in the run."""
    micro_tokens: int | None = None
    """Tokens held in memory at a time, with two copies of their logits; changes nothing else.
    None: 2,048, or a row where that is longer."""
    resamples: int = 1000
    """Bootstrap resamples of the rows, for the intervals."""
    seed: int | None = None
    """Seed of the order of rows, and of the resamples. None: the run's, which gives the held-out
    rows of its training."""
    device: str = "auto"
    """auto: CUDA where there is one, else the CPU."""
    out: Path | None = None
    """Folder for evaluation.csv and evaluation.json. None: the run's, which has to be here then."""


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
    for name in ("tokens", "resamples", "seq_len", "micro_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    device, out = choose_device(config.device), config.out or config.run
    mlsae = MLSAE.from_pretrained(config.run, device).requires_grad_(False)
    if not out.exists() and config.out is None:
        raise InputError(f"--out must be given where RUN is on the hub, as {config.run}, got none")
    settings = _settings(config, mlsae)
    source = Source(settings, device)
    if source.d_in != mlsae.config.d_in:
        raise InputError(
            f"MODEL must have a residual stream of width {mlsae.config.d_in}, as the MLSAE in "
            f"{config.run}, and {settings.model} has {source.d_in}; give its own with --model"
        )
    out.mkdir(parents=True, exist_ok=True)
    input_ids = source.heldout()
    wanted = not_special(input_ids, source.tokenizer)
    check_substitution(source.reader, input_ids[:1, :_CHECKED_POSITIONS].to(device))
    measured = measure_faithfulness(mlsae, source.reader, input_ids, wanted, source.micro_rows)
    result = Result(
        source.reader.layers,
        _figures(measured, config.resamples, settings.seed),
        {
            "run": str(config.run),
            "model": settings.model,
            "dataset": settings.dataset,
            "tokens": int(measured.rows.tokens.sum()),
            "predictions": int(measured.rows.predictions.sum()),
            "rows": len(input_ids),
            "seq_len": source.seq_len,
            "n_latents": mlsae.config.n_latents,
            "k": mlsae.config.k,
            "trained_on_layers": list(mlsae.config.layers),
            "ce_true": (measured.rows.ce_true.sum() / measured.rows.predictions.sum()).item(),
            "dead_at_every_layer": (~measured.active.any(1)).double().mean().item(),
            "interval": f"95 %, {config.resamples} bootstrap resamples of the rows",
            "seed": settings.seed,
            "seconds": time.perf_counter() - started,
            "peak_bytes": peak(device),
            "device": str(device),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    )
    write_file(out / "evaluation.csv", result.as_csv().encode())
    write_file(out / "evaluation.json", json.dumps(result.as_dict(), indent=2).encode())
    return result


def _settings(config: EvaluateConfig, mlsae: MLSAE) -> TrainConfig:
    """The settings of a training run that read the text and the layers to measure at."""
    trained = mlsae.about.get("training", {})
    dataset = config.dataset or trained.get("dataset")
    model = config.model or mlsae.config.model
    for name, value in (("DATASET", dataset), ("--model", model)):
        if not value:
            raise InputError(
                f"{name} must be given, since config.json in {config.run} names none, got none"
            )
    seq_len = config.seq_len or trained.get("seq_len")
    micro_tokens = config.micro_tokens or max(_DEFAULT_MICRO_TOKENS, seq_len or 0)
    return TrainConfig(
        model,
        dataset,
        SAEConfig(n_latents=mlsae.config.n_latents, k=mlsae.config.k),
        layers=config.layers or mlsae.config.layers or None,
        batch_tokens=micro_tokens,
        micro_tokens=micro_tokens,
        seq_len=seq_len,
        model_dtype=trained.get("model_dtype", "auto"),
        model_device_map=trained.get("model_device_map"),
        model_quantize=trained.get("model_quantize"),
        column=config.column or trained.get("column", "text"),
        eval_tokens=config.tokens,
        seed=config.seed if config.seed is not None else trained.get("seed", 0),
    )


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
        console.print(*result.tables(), sep="\n")
        about, out = result.about, config.out or config.run
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
