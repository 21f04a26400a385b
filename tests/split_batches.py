"""Train on the same text with the batches split in ever smaller parts, and print how far gradients,
weights and metrics differ from those of whole batches.

    python tests/split_batches.py --steps 100

The built-in model and text; with dead latents, so that AuxK is at work. Differences are relative:
|a − b| / |a|, of tensors in the Euclidean norm; of a metric the largest of its lines. The last
column is what float32 itself does: the same whole batches with their rows in another order. Where
two latents are almost equally active rounding decides which is the k-th, and from such a step on
the trainings part, in whatever order the same sums are taken.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mlsae.config import SAEConfig, TrainConfig
from mlsae.source import Source
from mlsae.train import train
from mlsae.trainer import Step

BATCH_TOKENS, SEQ_LEN = 2048, 64


class Trained(NamedTuple):
    """What a training left."""

    gradients: dict[str, Tensor]
    """Of its last step."""
    weights: dict[str, Tensor]
    metrics: list[dict[str, object]]
    """The lines of metrics.jsonl, without times."""


def run(steps: int, micro_tokens: int, shuffled: bool = False) -> Trained:
    """Train `steps` steps in parts of `micro_tokens`; `shuffled`: with each batch's rows in
    another order."""
    gradients: dict[str, Tensor] = {}
    end, residuals = Step.end, Source.residuals

    def end_and_keep(step: Step, lr: float) -> object:
        for name, p in step.trainer.mlsae.sae.named_parameters():
            gradients[name] = p.grad.clone()
        return end(step, lr)

    def residuals_reordered(source: Source, input_ids: Tensor) -> Iterable[Tensor]:
        return residuals(source, input_ids.flip(0) if shuffled else input_ids)

    Step.end, Source.residuals = end_and_keep, residuals_reordered  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                sae=SAEConfig(expansion=4, k=16, dead_tokens=4 * BATCH_TOKENS),
                tokens=steps * (BATCH_TOKENS - 256),  # special tokens are not trained on
                batch_tokens=BATCH_TOKENS,
                micro_tokens=micro_tokens,
                seq_len=SEQ_LEN,
                eval_tokens=4096,
                out=Path(folder) / "run",
            )
            (mlsae,) = train(config).values()
            lines = (config.out / "metrics.jsonl").read_text().splitlines()
    finally:
        Step.end, Source.residuals = end, residuals  # type: ignore[method-assign]
    metrics = [
        {name: value for name, value in json.loads(line).items() if "second" not in name}
        for line in lines
    ]
    weights = {name: p.detach() for name, p in mlsae.sae.named_parameters()}
    return Trained(gradients, weights, metrics)


def differences(one: Trained, other: Trained) -> dict[str, float]:
    """The relative difference in each gradient, each weight, each metric."""
    found = {}
    for kind in ("gradients", "weights"):
        for name, tensor in getattr(one, kind).items():
            off = (tensor - getattr(other, kind)[name]).norm() / tensor.norm()
            found[f"{kind[:-1]} of {name}"] = off.item()
    for a, b in zip(one.metrics, other.metrics, strict=True):
        for name, value in _numbers(a).items():
            off = abs(value - _numbers(b)[name]) / max(abs(value), 1e-12)
            found[name] = max(found.get(name, 0.0), off)
    return found


def _numbers(line: dict[str, object]) -> dict[str, float]:
    """The numbers of a line; a list's under its own name, with their places."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= {f"{name} {inner}": x for inner, x in _numbers(value).items()}
        elif isinstance(value, list):
            found |= {f"{name} {i}": float(x) for i, x in enumerate(value)}
        else:
            found[name] = float(value)  # type: ignore[arg-type]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args(arguments).steps
    with contextlib.redirect_stdout(io.StringIO()):  # of the trainings
        whole = run(steps, BATCH_TOKENS)
        columns = {
            f"{parts} parts": differences(whole, run(steps, BATCH_TOKENS // parts))
            for parts in (2, 8, 32)
        }
        columns["reordered"] = differences(whole, run(steps, BATCH_TOKENS, shuffled=True))
    last = whole.metrics[-2]
    print(f"{last['steps']} steps of {BATCH_TOKENS} tokens; AuxK loss {last['aux']:.2f} at the end")
    print(f"{'relative difference':32}", *(f"{name:>10}" for name in columns))
    for name in columns["reordered"]:
        print(f"{name:32}", *(f"{column[name]:10.1e}" for column in columns.values()))


if __name__ == "__main__":
    main()
