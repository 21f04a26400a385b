"""Show at which layers the latents of an MLSAE are active: over many tokens, and for one.

    python -m mlsae.analyze runs/demo                          # the text of its training run
    python -m mlsae.analyze runs/70m my-text.jsonl --tokens 10000000
    python -m mlsae.analyze runs/seeds/x16-k32-s0              # which latents other seeds find, too
    python -m mlsae.analyze runs/demo --prompt "def main(argv):"      # one text, token by token

It prints a summary, and writes to the run's folder analysis.json (ratios, entropy, MMCS, …),
analysis.safetensors (numbers per latent and layer), analysis_latents.parquet (one row per latent),
analysis_examples.parquet (where each latent is active, with the surrounding text) and
analysis_prompt.json (one text, token by token). With --prompt it measures nothing else, and writes
analysis_prompt.json and prompt.html.
"""

from __future__ import annotations

import sys

from rich.console import Console

from .analysis.run import AnalyzeConfig, analyze, show_prompt
from .analysis.summary import print_analysis
from .cli import parse, run_program
from .report import redraw


def analyze_and_print(config: AnalyzeConfig) -> None:
    """Analyze, print the result, and redraw the run's report."""
    out = config.out or config.run
    if config.prompt is None:
        print_analysis(analyze(config), out, config.tokens)
    else:
        table, source = show_prompt(config, config.prompt)
        Console(highlight=False).print(
            table, source, f"plot: {out / 'prompt.html'}", sep="\n", soft_wrap=True
        )
    redraw(out)


def main() -> None:
    """Run the program."""
    config = parse(AnalyzeConfig, __doc__, sys.argv[1:], "python -m mlsae.analyze")
    run_program(lambda: analyze_and_print(config))


if __name__ == "__main__":
    main()
