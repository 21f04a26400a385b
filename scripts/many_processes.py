"""Train in one, two and four processes, kill some of them, and print the largest differences.

    python -m scripts.many_processes --steps 200 --kills 4

1. Trainers in float64 on random vectors: weights, moments, counters and metrics after many steps.
2. The program under torchrun, in float32: held-out FVU. For scale, the same in one process that
   holds fewer tokens at a time, which changes rounding only; Adam amplifies that, because its first
   steps have the length of the learning rate whatever the gradient.
3. Two processes, of which one is killed again and again: the bits of the finished run.

Exits with 1 if a difference of part 1 exceeds 1e-6, or if the runs of part 3 differ at all.
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
LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (processes, shards of the latents)


def train_in_float64(world, shards, steps):
    """Metrics, state and counts of active tokens after `steps` steps."""
    torch.set_num_threads(1)
    for name, size in SIZES.items():
        setattr(parallel, name, size)
    metrics, state, counts, _ = parallel.run(world, shards, range(steps))
    return metrics, state, counts


def compare_trainers(steps):
    """Print the differences of all layouts from one process, and return the largest."""
    metrics, state, _ = train_in_float64(ALONE.world, 1, steps)
    dead, aux = metrics["dead"], metrics["aux"]
    print(f"{steps} steps in float64, {SIZES}; at the end {dead:.0%} dead, AuxK {aux:.3f}")
    print(f"{'processes':>9} {'shards':>6} {'weights':>9} {'Adam':>9} {'ages':>5} {'metrics':>9}")
    largest = 0.0
    for processes, shards in LAYOUTS:
        with Team(processes, patience=900) as team:
            team_metrics, team_state, _ = team.run(train_in_float64, shards, steps)[0]
        errors = largest_errors(*(parallel.flat(s["trainer"]) for s in (team_state, state)))
        weights = max(error for name, error in errors.items() if name.startswith("weights"))
        adam = max(error for name, error in errors.items() if name.startswith("optimizer"))
        of_metrics = max(largest_errors(team_metrics, metrics).values())
        ages = errors["inactive_tokens"]
        print(f"{processes:9} {shards:6} {weights:9.1e} {adam:9.1e} {ages:5.0f} {of_metrics:9.1e}")
        largest = max(largest, weights, adam, ages, of_metrics)
    return largest


def largest_errors(tensors, expected):
    """max |a − b| for each name."""
    return {
        name: (tensors[name].double() - expected[name].double()).abs().max().item()
        for name in expected
    }


def finish(process):
    """Wait for a program that must succeed."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


def compare_programs(folder):
    """Print how far the held-out FVU of each layout is from that of one process."""

    def fvu(name, *arguments, processes=1):
        finish(torchrun.torchrun(folder / name, *arguments, processes=processes))
        return torch.tensor(torchrun.metrics(folder / name)[-1]["heldout"]["fvu_layers"])

    base = fvu("one")
    print(f"\nthe program, {torchrun.SETTINGS['tokens']} tokens: held-out FVU {base.mean():.4f}")
    error = (fvu("parts", "--micro_tokens", 64) / base - 1).abs().max()
    print(f"one process, a quarter of the tokens at a time: relative difference {error:.1e}")
    for processes, shards in LAYOUTS:
        name = f"{processes}-{shards}"
        layout_fvu = fvu(name, "--shard_latents", shards, processes=processes)
        error = (layout_fvu / base - 1).abs().max()
        print(f"{processes} processes, {shards} shards: relative difference {error:.1e}")


def compare_killed(folder, kills):
    """Kill one of two ranks `kills` times. Print how long the other one outlived it, and what
    differs from a run that was never stopped; return the differences."""
    generator = random.Random(0)
    finish(torchrun.torchrun(folder / "straight", "--resume"))
    out, longest, n_killed = folder / "killed", 0.0, 0
    while n_killed < kills:
        before = newest(out)
        process = torchrun.torchrun(out, "--resume")
        while process.poll() is None and newest(out) == before:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        if process.poll() is not None:
            break  # the run finished before the kill
        rank = generator.randrange(2)
        os.kill(torchrun.process_of(process, rank), signal.SIGKILL)
        started = time.monotonic()
        output, _ = process.communicate(timeout=60)
        longest = max(longest, time.monotonic() - started)
        assert f"rank      : {rank}" in output.split("Root Cause")[1], output
        n_killed += 1
    finish(torchrun.torchrun(out, "--resume"))
    differing = differences(folder / "straight", out)
    print(
        f"\na rank was killed {n_killed} times; all ranks had ended at most {longest:.1f} s later"
    )
    print("different from the run never stopped: " + (", ".join(differing) or "nothing"))
    return differing


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m scripts.many_processes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=200, help="of part 1 (default: 200)")
    parser.add_argument("--kills", type=int, default=4, help="in part 3 (default: 4)")
    arguments = parser.parse_args()
    largest = compare_trainers(arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        compare_programs(Path(folder))
        differing = compare_killed(Path(folder), arguments.kills)
    sys.exit(largest > 1e-6 or bool(differing))


if __name__ == "__main__":
    main()
