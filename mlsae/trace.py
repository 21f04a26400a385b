"""Trace a prediction to the latents that it rests on, at every token and layer.

    python -m mlsae.trace runs/demo --prompt "def main("
    python -m mlsae.trace runs/demo --prompt "import os.pa" --target "th" --against "ck"
    python -m mlsae.trace runs/demo --prompt "def main(" --latent 876 --at_layer 4 --at_token -1
    python -m mlsae.trace runs/demo --prompt "def main(" --page trace.html --save trace.json

The target is the logit of a next token, minus another's or the mean of all, or a latent's
activation. One backward pass attributes it to every active latent at every token and layer, h times
the target's gradient in h, and to what the MLSAE does not reconstruct (errors). An attribution
estimates by how much the target falls if the node is ablated; the strongest are ablated, and both
numbers are shown. A latent that is active at several layers is one line along them; layers are not
to be summed, since the stream carries the same latent on. docs/tracing.md tells more.
"""

from __future__ import annotations

import sys

from rich.console import Console

from .attribution.command_line import TraceConfig, trace_run
from .attribution.show import shown
from .cli import parse, run_program


def trace_and_print(config: TraceConfig) -> None:
    """Trace, and print what is found."""
    console = Console(highlight=False)
    result = trace_run(config, lambda line: console.print(line, soft_wrap=True))
    for part in shown(result, config.show):
        console.print(part)
    for path in (config.save, config.page):
        if path is not None:
            console.print(f"saved: {path}", soft_wrap=True)


def main() -> None:
    """Run the program."""
    config = parse(TraceConfig, __doc__, sys.argv[1:], "python -m mlsae.trace")
    run_program(lambda: trace_and_print(config))


if __name__ == "__main__":
    main()
