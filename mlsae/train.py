"""Train a multi-layer SAE on the residual stream of every layer of a transformer.

    python -m mlsae.train                                    # built-in model and corpus, offline
    python -m mlsae.train EleutherAI/pythia-70m-deduped monology/pile-uncopyrighted \\
        --sae.expansion 64 --sae.k 32 --tokens 1000000000 --batch_tokens 131072 --out runs/70m
    python -m mlsae.train … --out runs/70m --resume          # resume after a stop, to the same bits
    python -m mlsae.train --sae.k 16 32 64 --sae.expansion 8 16 --out runs/grid      # six at once
    python -m mlsae.train --seeds 0 1 2 --out runs/seeds         # the same from three random starts
    torchrun --nproc_per_node 8 -m mlsae.train …             # the same run on eight GPUs

It leaves a folder that stands alone: config.json, model.safetensors, latents.safetensors,
metrics.jsonl, report.html and README.md, a model card. `MLSAE.from_pretrained(FOLDER)` loads it.
Several SAEs train side by side on the same residuals, so that the transformer runs once for all of
them; each ends as it would alone, in a folder of its own in OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import cli
from .config import PRESETS, TrainArguments, TrainConfig
from .errors import NonFiniteError
from .training.init_sizes import sized_as_init


def parse(arguments: Sequence[str]) -> list[TrainConfig]:
    """The settings of each SAE that a command line asks for. Raises InputError if they
    contradict one another."""
    default = TrainArguments.defaults(cli.preset(arguments, PRESETS))
    default = sized_as_init(default, arguments)
    prog = "python -m mlsae.train"
    return cli.parse(TrainArguments, __doc__, arguments, prog, default).configs()


def main() -> None:
    """Run the program."""
    cli.run_program(lambda: _train(parse(sys.argv[1:])), NonFiniteError)


def _train(configs: Sequence[TrainConfig]) -> None:
    # Imported here, so that --help and a wrong argument do not wait for torch and transformers.
    from sparse_topk import keep_freed_memory

    from .training.run import train

    cli.silence_transformers()
    keep_freed_memory()
    train(*configs)


if __name__ == "__main__":
    main()
