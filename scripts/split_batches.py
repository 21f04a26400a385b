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

Tensors = dict[str, Tensor]
"""Gradients and metrics of one step, by name."""


def one_step(trainer: Trainer, n_tokens: int, parts: Iterable[Tensor]) -> tuple[Step, Tensors]:
    """One step on residuals in `parts`, up to the optimizer's update: its gradients and metrics."""
    trainer.optimizer.zero_grad()
    step = Step(trainer, n_tokens)
    for x in parts:
        step.add(x)
    step.check()
    grads = {f"gradient of {n}": p.grad.clone() for n, p in trainer.mlsae.sae.named_parameters()}
    sums = step.sums
    return step, grads | {
        "loss": sums.loss,
        "fvu": sums.fvu(),
        "aux": sums.aux,
        "error variance": step.errors.variance(),
        "active latents": step._active.double(),
    }


def relative_differences(whole: Tensors, split: Tensors) -> dict[str, float]:
    """|whole − split| / |whole| for each name."""
    return {
        name: ((value - split[name]).norm() / value.norm().clamp_min(1e-12)).item()
        for name, value in whole.items()
    }


def compare(steps: int, splits: Sequence[int]) -> tuple[dict[str, dict[str, float]], int]:
    """Train `steps` steps on whole batches. Return, for each number of parts in `splits` and for
    "reordered", the largest differences of all steps and of the validation metrics at the end; and
    the number of steps in which AuxK was at work."""
    stream = DataStream(CONFIG, torch.device("cpu"), whole=False)
    torch.manual_seed(0)
    mlsae = MLSAE(read_shape(CONFIG).mlsae_config(CONFIG))
    trainer = Trainer(mlsae, dead_tokens=BATCH_TOKENS // 2, k_aux=64, aux_weight=1 / 32)
    n_weak = mlsae.config.n_latents // 5
    with torch.no_grad():
        mlsae.sae.W_enc[:n_weak] *= 1e-2  # too weak to be selected, so soon dead
    batches = stream.batches()
    ways = [f"{parts} parts" for parts in splits] + ["reordered"]
    largest: dict[str, dict[str, float]] = {way: {} for way in ways}
    with_aux = 0

    def record(way: str, differences: dict[str, float]) -> None:
        for name, value in differences.items():
            largest[way][name] = max(largest[way].get(name, 0.0), value)

    for step_number in range(steps):
        input_ids = next(batches)
        (x,) = stream.residuals(input_ids)
        if step_number == 0:
            trainer.initialize(*survey(mlsae, [x]))
        parts_of = {f"{n} parts": x.tensor_split(n, dim=1) for n in splits}
        parts_of["reordered"] = (x.flip(1),)
        results = {way: one_step(trainer, x.shape[1], parts_of[way])[1] for way in ways}
        step, whole = one_step(trainer, x.shape[1], [x])
        for way in ways:
            record(way, relative_differences(whole, results[way]))
        with_aux += bool(whole["aux"] > 0)
        step.end(lr=1e-3)
    batches.close()

    (x,) = stream.residuals(stream.heldout())
    (metrics,) = evaluate([mlsae], [x])
    for n in splits:
        (split_metrics,) = evaluate([mlsae], x.tensor_split(n, dim=1))
        for name in ("fvu", "fvu_paper", "l0", "totals", "counts"):
            whole = {f"held-out {name}": getattr(metrics, name)}
            split = {f"held-out {name}": getattr(split_metrics, name)}
            record(f"{n} parts", relative_differences(whole, split))
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
