"""What a training says at its end: held-out figures, where the time went, peak memory."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..files import write_file
from ..memory import peak
from .loop import Fit
from .validation import Evaluation

_COLUMNS = ("run", "n_latents", "k", "fvu", "fvu_paper", "l0", "dead")


def print_summary(fit: Fit, evaluations: Sequence[Evaluation], encoding: float) -> None:
    """Print it: a table of the layers of a single run, or a row for each of several. `encoding`
    is how many seconds of the training went into it."""
    console = Console(highlight=False)
    single = len(fit.runs) == 1
    if single:
        console.print(evaluations[0].table(fit.stream.reader.layers))
    else:
        console.print(_table(fit, evaluations))
    stages = fit.watch.seconds()
    total = sum(stages.values())
    stages["encode"] = min(stages.pop("SAE"), encoding)
    stages["rest of the SAE"] = total - sum(stages.values())
    shares = sorted(stages.items(), key=lambda stage: -stage[1])
    sizes = [f"{run.trainer.mlsae.config.n_latents:,}" for run in fit.runs]
    dead = [f"{run.dead:.1%}" for run in fit.runs]
    out, processes = fit.config.out, fit.mesh.world.size
    console.print(
        f"trained on {fit.tokens:,} tokens in {fit.seconds:.0f} s "
        f"({fit.tokens / fit.seconds:,.0f} tokens/s)"
        + (f"; {dead[0]} of {sizes[0]} latents dead" if single else ""),
        "where the time went: "
        + ", ".join(f"{name} {spent / total:.1%}" for name, spent in shares)
        + f"; tokenizing, beside it, {fit.batches.seconds:.1f} s",
        f"peak memory: {peak(fit.stream.device) / 1e9:.2f} GB"
        + (f" in the first of {processes} processes" if processes > 1 else ""),
        f"run: {out}" if single else f"runs: in {out}, a folder each",
        f"report: {out / 'report.html'}" if single else f"this table: {out / 'runs.csv'}",
        sep="\n",
        soft_wrap=True,
    )


def write_csv(path: Path, fit: Fit, evaluations: Sequence[Evaluation]) -> None:
    """Write a row for each run, with its held-out figures: means over layers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_rows(fit, evaluations))
    write_file(path, text.getvalue().encode())


def _table(fit: Fit, evaluations: Sequence[Evaluation]) -> Table:
    table = Table(title=f"Held-out figures, {evaluations[0].n_tokens:,} tokens, means over layers")
    headings = ("run", "latents", "k", "FVU", "FVU as in the paper", "L0", "dead")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "run" else "right")
    forms = ("", ",", "", ".4f", ".4f", ".1f", ".1%")
    for row in _rows(fit, evaluations):
        table.add_row(*(format(value, form) for value, form in zip(row, forms, strict=True)))
    return table


def _rows(fit: Fit, evaluations: Sequence[Evaluation]) -> list[tuple[str | float, ...]]:
    """A row of `_COLUMNS` for each run."""
    return [
        (
            run.name,
            run.trainer.mlsae.config.n_latents,
            run.trainer.mlsae.config.k,
            found.fvu.mean().item(),
            found.fvu_paper.mean().item(),
            found.l0.mean().item(),
            run.dead,
        )
        for run, found in zip(fit.runs, evaluations, strict=True)
    ]
