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
from mlsae.data.config import DataConfig
from mlsae.data.stream import DataStream, Residuals, read_shape
from mlsae.training.gradients import forward_backward
from mlsae.training.init import init_stats, mlsae_config
from mlsae.training.loop import raise_if_nonfinite, train_step
from mlsae.training.state import TrainState
from mlsae.training.validation import validate

BATCH_TOKENS, SEQ_LEN = 2048, 64
_DATA = DataConfig(seq_len=SEQ_LEN, model_dtype="float32")  # so that rounding is small everywhere
CONFIG = TrainConfig(_DATA, sae=SAEConfig(expansion=8, k=8))

Measured = dict[str, Tensor]
"""Gradients and metrics of a step, by name."""


def measure(state: TrainState, n_tokens: int, parts: Iterable[Residuals]) -> Measured:
    """A step on residuals in `parts`, up to the update of the weights, which is left out."""
    state.optimizer.zero_grad()
    last_active = state.last_active.clone()
    step = state.begin_step(n_tokens)
    for x, mask in parts:
        forward_backward(state, step, x, mask)
    raise_if_nonfinite(state, step)
    grads = {f"gradient of {n}": p.grad.clone() for n, p in state.mlsae.sae.named_parameters()}
    state.optimizer.zero_grad()
    active = state.last_active == state.tokens + n_tokens
    state.last_active = last_active
    return grads | {
        "loss": step.metrics.loss,
        "fvu": step.metrics.fvu(),
        "aux": step.metrics.aux,
        "error variance": step.metrics.errors.variance(),
        "active latents": active.double(),
    }


def _split(whole: Residuals, n: int) -> list[Residuals]:
    parts = zip(whole.x.tensor_split(n, dim=1), whole.mask.tensor_split(n), strict=True)
    return [Residuals(x, mask) for x, mask in parts]


def differences(whole: Measured, split: Measured) -> dict[str, float]:
    """Relative differences by name."""
    return {
        name: ((value - split[name]).norm() / value.norm().clamp_min(1e-12)).item()
        for name, value in whole.items()
    }


def compare(steps: int, splits: Sequence[int]) -> tuple[dict[str, dict[str, float]], int]:
    """Train `steps` steps of whole batches; for each number of parts, and "reordered", the largest
    differences of all steps, and of the validation metrics at the end. And in how many of the
    steps AuxK was at work."""
    shape = read_shape(CONFIG.data)
    batch_rows = BATCH_TOKENS // SEQ_LEN
    stream = DataStream(CONFIG.data, shape, torch.device("cpu"), micro_rows=batch_rows, whole=False)
    torch.manual_seed(0)
    mlsae = MLSAE(mlsae_config(CONFIG, shape))
    state = TrainState(
        mlsae,
        schedule=lambda tokens: 1e-3,
        dead_tokens=BATCH_TOKENS // 2,
        k_aux=64,
        aux_weight=1 / 32,
    )
    with torch.no_grad():
        mlsae.sae.W_enc[: len(mlsae.sae.W_enc) // 5] *= 1e-2  # too weak to be selected: soon dead
    batches = stream.batches(batch_rows)
    ways = [f"{parts} parts" for parts in splits] + ["reordered"]
    largest: dict[str, dict[str, float]] = {way: {} for way in ways}
    with_aux = 0

    def keep_largest(way: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            largest[way][name] = max(largest[way].get(name, 0.0), value)

    for number in range(steps):
        input_ids = next(batches)
        if number == 0:
            state.initialize(*init_stats(mlsae, stream.residuals(input_ids))[:2])
        n_tokens, (whole,) = stream.count(input_ids), stream.masked_residuals(input_ids)
        parts = {f"{n} parts": _split(whole, n) for n in splits}
        parts["reordered"] = [Residuals(whole.x.flip(1), whole.mask.flip(0))]
        measured = measure(state, n_tokens, [whole])
        for way in ways:
            keep_largest(way, differences(measured, measure(state, n_tokens, parts[way])))
        with_aux += bool(measured["aux"] > 0)
        train_step([state], [whole], n_tokens)
    batches.close()

    (x,) = stream.residuals(stream.heldout(BATCH_TOKENS))
    none = x[:, :0]  # nothing is dropped
    (validation,) = validate([mlsae], [(x, none)])
    for n in splits:
        (split,) = validate([mlsae], [(part, none) for part in x.tensor_split(n, dim=1)])
        for name in ("fvu", "fvu_paper", "l0", "totals", "counts"):
            values = {f"held-out {name}": getattr(validation, name)}
            split_values = {f"held-out {name}": getattr(split, name)}
            keep_largest(f"{n} parts", differences(values, split_values))
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
