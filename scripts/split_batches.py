"""Split training batches into ever smaller parts, and print how far the gradients and metrics of
each step differ from those of the whole batch.

    python -m scripts.split_batches --steps 100

It trains on the built-in model and text. A fifth of the latents starts dead, so that AuxK is at
work. At every step, each way of splitting starts from the same state. Differences are relative,
|a − b| / |a| in the Euclidean norm; the largest of all steps is printed. The last column shows what
float32 itself does: the whole batch with its rows in reverse order. What remains is rounding: where
two latents are almost equally active, it decides which one is the k-th. Two trainings diverge at
such a step whenever they sum in different orders.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mlsae import MLSAE
from mlsae.config import SAEConfig, TrainConfig
from mlsae.data.stream import DataStream, read_shape
from mlsae.training.init import survey
from mlsae.training.state import Step, Trainer
from mlsae.training.validation import evaluate

BATCH_TOKENS, SEQ_LEN = 2048, 64
CONFIG = TrainConfig(
    sae=SAEConfig(expansion=8, k=8), batch_tokens=BATCH_TOKENS, seq_len=SEQ_LEN, eval_tokens=2048
)

Found = dict[str, Tensor]
"""Gradients and metrics of a step, by name."""


def one_step(trainer: Trainer, n_tokens: int, parts: Iterable[Tensor]) -> tuple[Step, Found]:
    """A step on residuals in `parts`, up to its end; what it found."""
    trainer.optimizer.zero_grad()
    step = Step(trainer, n_tokens)
    for x in parts:
        step.add(x)
    step.check()
    found = {f"gradient of {n}": p.grad.clone() for n, p in trainer.mlsae.sae.named_parameters()}
    sums = step.sums
    return step, found | {
        "loss": sums.loss,
        "fvu": sums.fvu(),
        "aux": sums.aux,
        "error variance": step.errors.variance(),
        "active latents": step._active.double(),
    }


def differences(found: Found, other: Found) -> dict[str, float]:
    """Relative differences by name."""
    return {
        name: ((value - other[name]).norm() / value.norm().clamp_min(1e-12)).item()
        for name, value in found.items()
    }


def compare(steps: int, splits: Sequence[int]) -> tuple[dict[str, dict[str, float]], int]:
    """Train `steps` steps of whole batches; for each number of parts, and "reordered", the largest
    differences of all steps, and of figures on held-out text at the end. And in how many of the
    steps AuxK was at work."""
    stream = DataStream(CONFIG, torch.device("cpu"), whole=False)
    torch.manual_seed(0)
    mlsae = MLSAE(read_shape(CONFIG).mlsae_config(CONFIG))
    trainer = Trainer(mlsae, dead_tokens=BATCH_TOKENS // 2, k_aux=64, aux_weight=1 / 32)
    with torch.no_grad():
        mlsae.sae.W_enc[: len(mlsae.sae.W_enc) // 5] *= 1e-2  # too weak to be selected: soon dead
    batches = stream.batches()
    ways = [f"{parts} parts" for parts in splits] + ["reordered"]
    largest: dict[str, dict[str, float]] = {way: {} for way in ways}
    with_aux = 0

    def take(way: str, found: dict[str, float]) -> None:
        for name, value in found.items():
            largest[way][name] = max(largest[way].get(name, 0.0), value)

    for number in range(steps):
        input_ids = next(batches)
        (x,) = stream.residuals(input_ids)
        if number == 0:
            trainer.initialize(*survey(mlsae, [x]))
        others = {f"{n} parts": x.tensor_split(n, dim=1) for n in splits}
        others["reordered"] = (x.flip(1),)
        results = {way: one_step(trainer, x.shape[1], others[way])[1] for way in ways}
        step, whole = one_step(trainer, x.shape[1], [x])
        for way in ways:
            take(way, differences(whole, results[way]))
        with_aux += bool(whole["aux"] > 0)
        step.end(lr=1e-3)
    batches.close()

    (x,) = stream.residuals(stream.heldout())
    (figures,) = evaluate([mlsae], [x])
    for n in splits:
        (split,) = evaluate([mlsae], x.tensor_split(n, dim=1))
        for name in ("fvu", "fvu_paper", "l0", "totals", "counts"):
            value = {f"held-out {name}": getattr(figures, name)}
            take(f"{n} parts", differences(value, {f"held-out {name}": getattr(split, name)}))
    return largest, with_aux


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m scripts.split_batches", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=100, help="(default: 100)")
    steps = parser.parse_args().steps
    largest, with_aux = compare(steps, (2, 8, 32))
    print(f"{steps} steps of {BATCH_TOKENS} tokens, {with_aux} of them with AuxK at work")
    print(f"{'largest relative difference':28}", *(f"{way:>10}" for way in largest))
    for name in largest["2 parts"]:
        row = (f"{largest[way].get(name, 0.0):10.1e}" for way in largest)
        print(f"{name:28}", *row)


if __name__ == "__main__":
    main()
