"""Measure an MLSAE on held-out text: what it reconstructs, and what the model then predicts.

    python -m mlsae.evaluate runs/demo                     # the text of its training run
    python -m mlsae.evaluate runs/70m my-text.jsonl --tokens 1000000
    python -m mlsae.evaluate runs/one-layer --layers 0 1 2 3 4 5 --out runs/one-layer-elsewhere

It prints two tables, and writes evaluation.csv (one row per layer and one of means) and
evaluation.json, with 95 % intervals, to the run's folder.
"""

from __future__ import annotations

import sys

from rich.console import Console

from .cli import parse, run_program
from .evaluation.run import EvaluateConfig, evaluate
from .report import redraw


def evaluate_and_print(config: EvaluateConfig) -> None:
    """Evaluate, print the metrics, and redraw the run's report."""
    result, out = evaluate(config), config.out or config.run
    about = result.provenance
    console = Console(highlight=False)
    console.print(*result.tables(), sep="\n")
    console.print(
        "CE and KL in nats per token; ± half the width of a 95% bootstrap interval over "
        f"{about.rows:,} rows",
        *result.notes(),
        f"{result.dead_at_every_layer:.1%} of {about.n_latents:,} latents dead at all of these "
        "layers",
        f"measured in {about.seconds:.0f} s",
        f"peak memory: {about.peak_bytes / 1e9:.2f} GB",
        f"metrics: {out / 'evaluation.csv'}, {out / 'evaluation.json'}",
        sep="\n",
        soft_wrap=True,
    )
    redraw(out)


def main() -> None:
    """Run the program."""
    config = parse(EvaluateConfig, __doc__, sys.argv[1:], "python -m mlsae.evaluate")
    run_program(lambda: evaluate_and_print(config))


if __name__ == "__main__":
    main()
