"""Train in one, two and four processes, kill some, and print the largest differences.

    python -m scripts.many_processes --steps 200 --kills 4

1. Trainers in float64, on random vectors: weights, moments, counters, figures after many steps.
2. The program under torchrun, in float32: held-out FVU. Beside it, what it changes in one process
   to hold another number of tokens at a time, which only rounds otherwise: Adam's first steps, all
   of the same length, make much of that.
3. Two processes, of which one is killed again and again: the bits of the run never stopped.

It exits 1 where the first differences exceed 1e-6 or the last ones are any.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from mlsae.distributed import ALONE
from scripts.kill_and_resume import differences, newest
from tests.helpers import parallel, torchrun
from tests.helpers.team import Team

SIZES = {"L": 2, "N": 256, "D": 64, "M": 1024, "K": 16}
LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # processes, shards of the latents


def in_float64(world, shards, steps):
    """Sums, state and counts after `steps` steps."""
    torch.set_num_threads(1)
    for name, size in SIZES.items():
        setattr(parallel, name, size)
    sums, state, counts, _ = parallel.run(world, shards, range(steps))
    return sums, state, counts


def compare_trainers(steps):
    """The largest difference of all."""
    sums, state, _ = in_float64(ALONE.world, 1, steps)
    dead, aux = sums["dead"], sums["aux"]
    print(f"{steps} steps in float64, {SIZES}; at the end {dead:.0%} dead, AuxK {aux:.3f}")
    print(f"{'processes':>9} {'shards':>6} {'weights':>9} {'Adam':>9} {'ages':>5} {'figures':>9}")
    worst = 0.0
    for processes, shards in LAYOUTS:
        with Team(processes, patience=900) as team:
            others, other, _ = team.run(in_float64, shards, steps)[0]
        one, two = parallel.flat(state), parallel.flat(other)
        off = {name: (one[name].double() - two[name].double()).abs().max().item() for name in one}
        weights = max(value for name, value in off.items() if name.startswith("weights"))
        adam = max(value for name, value in off.items() if name.startswith("optimizer"))
        figures = max((sums[n].double() - others[n].double()).abs().max().item() for n in sums)
        ages = off["inactive_tokens"]
        print(f"{processes:9} {shards:6} {weights:9.1e} {adam:9.1e} {ages:5.0f} {figures:9.1e}")
        worst = max(worst, weights, adam, ages, figures)
    return worst


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


def compare_programs(folder):
    """Print held-out FVU of the layouts, less that of one process."""

    def fvu(name, *arguments, processes=1):
        finish(torchrun.torchrun(folder / name, *arguments, processes=processes))
        return torch.tensor(torchrun.metrics(folder / name)[-1]["heldout"]["fvu_layers"])

    base = fvu("one")
    print(f"\nthe program, {torchrun.SETTINGS['tokens']} tokens: held-out FVU {base.mean():.4f}")
    off = (fvu("parts", "--micro_tokens", 64) / base - 1).abs().max()
    print(f"one process, a quarter of the tokens at a time: differs by {off:.1e} of it")
    for processes, shards in LAYOUTS:
        name = f"{processes}-{shards}"
        off = (fvu(name, "--shard_latents", shards, processes=processes) / base - 1).abs().max()
        print(f"{processes} processes, {shards} shards: differs by {off:.1e} of it")


def compare_killed(folder, kills):
    """What differs at the end; how long the others outlived the one that was killed."""
    generator = random.Random(0)
    finish(torchrun.torchrun(folder / "straight", "--resume"))
    out, longest, hits = folder / "killed", 0.0, 0
    while hits < kills:
        before = newest(out)
        process = torchrun.torchrun(out, "--resume")
        while process.poll() is None and newest(out) == before:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        if process.poll() is not None:
            break  # it came to its end
        rank = generator.randrange(2)
        os.kill(torchrun.process_of(process, rank), signal.SIGKILL)
        started = time.monotonic()
        output, _ = process.communicate(timeout=60)
        longest = max(longest, time.monotonic() - started)
        assert f"rank      : {rank}" in output.split("Root Cause")[1], output
        hits += 1
    finish(torchrun.torchrun(out, "--resume"))
    wrong = differences(folder / "straight", out)
    print(f"\n{hits} times a rank was killed; all had ended {longest:.1f} s later, at most")
    print("different from the run never stopped: " + (", ".join(wrong) or "nothing"))
    return wrong


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=4)
    arguments = parser.parse_args()
    worst = compare_trainers(arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        compare_programs(Path(folder))
        wrong = compare_killed(Path(folder), arguments.kills)
    sys.exit(worst > 1e-6 or bool(wrong))


if __name__ == "__main__":
    main()
