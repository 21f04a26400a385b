"""Tell what a training will take before it runs: memory, disk, time, and how to shrink them.

    python -m mlsae.plan                                     # built-in model and corpus
    python -m mlsae.plan MODEL DATASET --sae.expansion 64 --tokens 1000000000 --micro_tokens 16384
    python -m mlsae.plan MODEL DATASET … --gpu a100-80gb     # for a GPU that is not here
    python -m mlsae.plan … --json > plan.json

It takes the arguments of `python -m mlsae.train`: turn one command into the other by its name. It
writes nothing to the disk, and does not look into --out. A model on the hub is downloaded, as
training would, but not with --gpu, which reads its configuration only.

Memory is computed, part by part; training checks the same numbers before it starts. Time is
measured here for about ten seconds, by the training's own steps on its own text; text on the hub is
not downloaded for that, and random token ids stand for it. With --gpu, time is the result of a
model, and each figure says what it rests on: one H100 was measured, and other GPUs are
extrapolated from their published peaks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from . import cli
from .config import PRESETS, TrainArguments
from .errors import InputError, NonFiniteError
from .training.init_sizes import sized_as_init


@dataclass(frozen=True)
class PlanArguments(TrainArguments):
    """What training would be given, and what to tell of it."""

    gpu: str | None = None
    """Plan for this GPU, which need not be here, by a model: h100, h200, b200, a100-80gb, l40s,
    rtx4090, …; a wrong name lists all. None: measure the device that is here."""
    json: bool = False
    """Print JSON: bytes, seconds, tokens."""
    probe_seconds: float = 10.0
    """Seconds to measure for, after loading and one step to warm up."""


def run(arguments: list[str]) -> None:
    """Plan what a command line asks for, and print it. Raises InputError for what is wrong."""
    default = sized_as_init(PlanArguments.defaults(cli.preset(arguments, PRESETS)), arguments)
    asked = cli.parse(PlanArguments, __doc__, arguments, "python -m mlsae.plan", default)
    assert isinstance(asked, PlanArguments)
    if not asked.probe_seconds > 0:
        raise InputError(f"--probe_seconds must be greater than 0, got {asked.probe_seconds}")
    # Imported here, so that --help and a wrong argument do not wait for torch and transformers.
    import torch

    from sparse_topk import keep_freed_memory

    from .distributed import choose_device
    from .planning.plan import make_plan
    from .planning.show import as_dict, print_plan
    from .planning.suggestions import suggestions

    cli.silence_transformers()
    keep_freed_memory()
    plan = make_plan(asked.configs(), asked.gpu, asked.probe_seconds)
    device = torch.device("cuda") if asked.gpu else choose_device(asked.device)
    found = suggestions(plan, device)
    if asked.json:
        print(json.dumps(as_dict(plan, found), indent=2))
    else:
        print_plan(plan, found)


def main() -> None:
    """Run the program."""
    cli.run_program(lambda: run(sys.argv[1:]), NonFiniteError)


if __name__ == "__main__":
    main()
