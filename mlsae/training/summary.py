"""What a training prints at its end: validation metrics, where the time went, peak memory. And what
it prints when it is extended: its learning rates."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..config import learning_rate
from ..data.sinks import describe_top_share
from ..distributed import log_rank0
from ..files import write_file
from ..memory import peak
from .loop import TrainLoop
from .validation import Validation

_COLUMNS = ("run", "n_latents", "k", "seed", "fvu", "fvu_paper", "l0", "fvu_all", "dead")


def print_summary(
    loop: TrainLoop, validations: Sequence[Validation], dead: Sequence[float]
) -> None:
    """Print the table of a single SAE's layers, or a row for each of several; then where the time
    went. `dead` are the shares of dead latents."""
    console = Console(highlight=False)
    single = len(loop.configs) == 1
    if single:
        console.print(validations[0].table(loop.stream.reader.layers))
    else:
        console.print(_table(loop, validations, dead))
    layers = loop.stream.reader.layers
    if word := describe_top_share(validations[0].top_share.tolist(), layers):
        console.print(word, soft_wrap=True)
    for run_dir in loop.run_dirs:
        if word := run_dir.describe_cap():
            console.print(word, soft_wrap=True)
    stages = loop.timer.seconds()
    total = sum(stages.values())
    sorted_stages = sorted(stages.items(), key=lambda stage: -stage[1])
    n_latents = loop.states[0].mlsae.config.n_latents
    out, processes = loop.out, loop.mesh.world.size
    console.print(
        f"trained on {loop.tokens:,} tokens in {loop.seconds:.0f} s "
        f"({loop.tokens / loop.seconds:,.0f} tokens/s)"
        + (f"; {dead[0]:.1%} of {n_latents:,} latents dead" if single else "")
        + (f"; in {loop.passes} passes over the text" if loop.passes > 1 else ""),
        "where the time went: "
        + ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in sorted_stages)
        + f"; tokenizing, beside it, {loop.batches.seconds:.1f} s",
        f"peak memory: {peak(loop.stream.device) / 1e9:.2f} GB"
        + (f" on rank 0 of {processes} processes" if processes > 1 else ""),
        f"run: {out}" if single else f"runs: in {out}, one folder each",
        f"report: {out / 'report.html'}" if single else f"this table: {out / 'runs.csv'}",
        sep="\n",
        soft_wrap=True,
    )


def write_csv(
    path: Path, loop: TrainLoop, validations: Sequence[Validation], dead: Sequence[float]
) -> None:
    """Write a row for each SAE with its validation metrics, means over layers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_rows(loop, validations, dead))
    write_file(path, text.getvalue().encode())


def _table(loop: TrainLoop, validations: Sequence[Validation], dead: Sequence[float]) -> Table:
    table = Table(title=f"{validations[0].title()}, means over layers")
    columns = {
        "run": "", "latents": ",", "k": "", "seed": "", "FVU": ".4f", "FVU as in the paper": ".4f",
        "L0": ".1f", "FVU with tokens left out": ".4f", "dead": ".1%",
    }  # fmt: skip
    apt = {
        "seed": any(config.sae.seed is not None for config in loop.configs),
        "FVU with tokens left out": validations[0].n_dropped > 0,
    }
    shown = [apt.get(heading, True) for heading in columns]
    for heading in compress(columns, shown):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for row in _rows(loop, validations, dead):
        table.add_row(*compress(map(format, row, columns.values()), shown))
    return table


def _rows(
    loop: TrainLoop, validations: Sequence[Validation], dead: Sequence[float]
) -> list[tuple[str | float, ...]]:
    """A row of `_COLUMNS` for each SAE."""
    return [
        (
            config.sae.name,
            state.mlsae.config.n_latents,
            state.mlsae.config.k,
            config.weights_seed,
            validation.fvu.mean().item(),
            validation.fvu_paper.mean().item(),
            validation.l0.mean().item(),
            validation.fvu_all.mean().item(),
            dead_share,
        )
        for config, state, validation, dead_share in zip(
            loop.configs, loop.states, validations, dead, strict=True
        )
    ]


def log_extension(loop: TrainLoop) -> None:
    """Say what the learning rates of an extended run are."""
    config, extension = loop.config, loop.history.extensions[-1]
    log_rank0(
        f"extending the run from {extension['from']:,} to {extension['to']:,} tokens: its peak "
        f"learning rate and warm-up stay those of {loop.history.first_tokens(config):,} tokens; "
        f"the rate falls over the last {config.decay:.0%} of {extension['to']:,}"
    )
    for each, state in zip(loop.configs, loop.states, strict=True):
        n_latents, first = state.mlsae.config.n_latents, loop.history.first_tokens(each)
        shorter = replace(each, tokens=extension["from"])
        before, now = (
            learning_rate(config, n_latents, state.tokens, first) for config in (shorter, each)
        )
        log_rank0(f"learning rate of {each.sae.name}: {before:.2e} until here, {now:.2e} from here")
