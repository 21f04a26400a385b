"""Find a lens: maps that carry every layer's residuals into the last layer's basis.

    python -m mlsae.lens                                  # built-in model and corpus, offline
    python -m mlsae.lens EleutherAI/pythia-70m-deduped monology/pile-uncopyrighted \\
        --tokens 65000000 --batch_tokens 262144 --out runs/lens-70m
    python -m mlsae.lens --kind affine --out runs/affine  # in closed form, in seconds
    python -m mlsae.train --lens runs/lens                # an MLSAE in that basis

It prints the KL of the lens's predictions to the model's, layer by layer, beside that of the logit
lens, which has no maps; and leaves lens.safetensors in OUT. Lenses of the tuned-lens package need
no program: give their folder, with config.json and params.pt, to --lens.
"""

from __future__ import annotations

import sys

from rich.console import Console

from ..cli import parse, run_program
from ..formats import LENS
from .run import LensConfig, find_lens


def find_and_print(config: LensConfig) -> None:
    """Find the lens, and print how well it predicts."""
    found = find_lens(config)
    Console(highlight=False).print(
        found.table(),
        f"found in {found.seconds:.0f} s",
        f"lens: {config.out / LENS}",
        f"next: python -m mlsae.train --lens {config.out}",
        sep="\n",
        soft_wrap=True,
    )


def main() -> None:
    """Run the program."""
    config = parse(LensConfig, __doc__, sys.argv[1:], "python -m mlsae.lens")
    run_program(lambda: find_and_print(config))


if __name__ == "__main__":
    main()
