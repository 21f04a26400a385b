"""Change latents of an MLSAE while its transformer runs, and see what it says then.

    python -m mlsae.steer runs/demo --prompt "def main(" --latent 876 --layers 2 3 --add 4
    python -m mlsae.steer runs/demo --prompt "def main(" --latent 876 --ablate --positions last
    python -m mlsae.steer runs/demo --prompt "x = [" --edit "876@2,3:add=4" --edit "12@all:ablate"
    python -m mlsae.steer runs/demo --prompt "x = [" --replace          # reconstructions only

A latent's activation h becomes h + v (--add), v · h (--scale), v (--clamp) or 0 (--ablate), and
each residual vector moves along the latent's decoder row by the change times its own standard
deviation; what the MLSAE does not reconstruct stays. It prints the text that follows with and
without the changes, the next tokens that move most, KL(baseline ‖ steered) at each position, and
which other latents change at the layers above. `python -m mlsae.analyze RUN` finds latents to try.
"""

from __future__ import annotations

import sys

from rich.console import Console

from .cli import parse, run_program
from .intervention.command_line import SteerConfig
from .intervention.run import steer
from .intervention.show import shown


def steer_and_print(config: SteerConfig) -> None:
    """Steer, and print what comes of it."""
    result = steer(config)
    console = Console(highlight=False)
    for part in shown(result):
        console.print(part)
    if config.save is not None:
        console.print(f"saved: {config.save}", soft_wrap=True)


def main() -> None:
    """Run the program."""
    config = parse(SteerConfig, __doc__, sys.argv[1:], "python -m mlsae.steer")
    run_program(lambda: steer_and_print(config))


if __name__ == "__main__":
    main()
