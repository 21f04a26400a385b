"""One training step per library, and its timing. `bench.peers` runs this file in each library's
environment, so each function imports only its own library.

    python -m bench.peer_steps NAME < jobs.json > rows.json

A step is forward, loss, backward, optimizer and decoder norm, with no latent dead. It has the lines
of the library's own trainer, the library's fastest settings, and torch's fused Adam.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_topk import SparseTopKSAE, costs, keep_freed_memory, reference

from .impls import DENSE, OURS, fused_adam
from .memory import peak_bytes
from .rates import copy_bandwidth, matmul_rate, sync
from .results import Timing
from .shapes import ProblemShape

Step = Callable[[Tensor], object]
_ROUNDS = {"cpu": 7, "cuda": 30}


class Library(NamedTuple):
    """One library, and how to build its training step."""

    package: str | None
    """Its name on the package index; None for the code of this repository."""
    build: Callable[[ProblemShape, torch.dtype, torch.device], Step]
    differs: str
    """What its step does that ours does not, or the reverse."""


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def ours(shape: ProblemShape, dtype: torch.dtype, device: torch.device) -> Step:
    """This package."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, device=device)
    update = OURS.optimizer(sae)

    def step(x: Tensor) -> None:
        with _autocast(device, dtype):
            loss = (sae(x) - x).square().mean()
        loss.backward()
        update()

    return step


def dense(shape: ProblemShape, dtype: torch.dtype, device: torch.device) -> Step:
    """The same mathematics through autograd."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, device=device)
    update = DENSE.optimizer(sae)

    def step(x: Tensor) -> None:
        with _autocast(device, dtype):
            x_hat = reference.topk_sae(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
            loss = (x_hat - x).square().mean()
        loss.backward()
        update()

    return step


def sparsify(shape: ProblemShape, dtype: torch.dtype, device: torch.device) -> Step:
    """`SparseCoder` and the lines of `Trainer.fit`. On CUDA its forward turns on autocast, so its
    float32 row is computed in bfloat16 there."""
    if device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else it calls Triton kernels on a CPU too
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=shape.m, k=shape.k)
    sae = SparseCoder(shape.d, config, device=device)
    optimizer = fused_adam(sae.parameters())

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        with _autocast(device, dtype):
            loss = sae(x).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sae_lens(shape: ProblemShape, dtype: torch.dtype, device: torch.device) -> Step:
    """`TopKTrainingSAE` and the lines of `SAETrainer._train_step`. Activations are sparse only in
    float32, as its documentation advises, and not scaled by the decoder's norms, because the
    backward of that has no sparse form on a CPU."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = TopKTrainingSAEConfig(
        d_in=shape.d,
        d_sae=shape.m,
        k=shape.k,
        device=str(device),
        use_sparse_activations=dtype == torch.float32,
        rescale_acts_by_decoder_norm=False,
    )
    sae = TopKTrainingSAE(config)
    optimizer = fused_adam(sae.parameters())

    def step(x: Tensor) -> None:
        with _autocast(device, dtype):
            loss = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(shape: ProblemShape, dtype: torch.dtype, device: torch.device) -> Step:
    """The whole of `TopKTrainer.update`."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        10**6, shape.d, shape.m, shape.k, layer=0, lm_name="none", device=str(device)
    )
    trainer.optimizer = fused_adam(trainer.ae.parameters())

    def step(x: Tensor) -> None:
        with _autocast(device, dtype):
            trainer.update(1, x)

    return step


LIBRARIES = {
    "ours": Library(None, ours, ""),
    "dense": Library(None, dense, "nothing: the same mathematics through autograd"),
    "eai-sparsify": Library("eai-sparsify", sparsify, "ReLU before TopK"),
    "sae-lens": Library(
        "sae-lens",
        sae_lens,
        "clips the gradient; leaves the decoder's norms free; sparse activations in float32",
    ),
    "dictionary-learning": Library(
        "dictionary-learning",
        dictionary_learning,
        "ReLU before TopK; clips the gradient; counts dead latents; backward inside autocast",
    ),
}


def time_step(
    library: str, shape: ProblemShape, dtype: torch.dtype, axis: str | None
) -> Timing | None:
    """Time one library's step, in turn with the encoder's bare float32 matrix product. None if it
    does not fit in the GPU's memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    batches = [torch.randn(shape.n, shape.d, device=device) for _ in range(4)]
    W = torch.randn(shape.m, shape.d, device=device)
    rate, bandwidth = matmul_rate(shape, dtype, device), copy_bandwidth(device)
    steps: list[float] = []
    products: list[float] = []
    try:
        out = torch.empty(shape.n, shape.m, device=device)
        step = LIBRARIES[library].build(shape, dtype, device)
        for x in batches[:2]:  # compiles, allocates, creates the optimizer's state
            step(x)
        peak = peak_bytes(lambda: step(batches[2]), device)
        for i in range(_ROUNDS[device.type]):
            x = batches[i % 4]
            for work, times in ((lambda x: torch.mm(x, W.T, out=out), products), (step, steps)):
                sync(device)
                started = time.perf_counter()
                work(x)
                sync(device)
                times.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return None
    parts = costs.step(shape, dtype.itemsize)
    return Timing(
        "step",
        library,
        *shape,
        str(dtype).removeprefix("torch."),
        statistics.median(steps),
        min(steps),
        len(steps),
        sum(c.flop for c in parts),
        sum(c.bytes for c in parts),
        sum(c.roofline(rate, bandwidth) for c in parts),
        peak,
        axis,
        statistics.median(products),
    )


def main() -> None:
    """Read jobs of [shape, dtype, axis] from stdin, and print their timings and the version."""
    keep_freed_memory()
    name = sys.argv[1]
    rows = []
    with redirect_stdout(sys.stderr):  # libraries print to stdout
        for shape, dtype, axis in json.load(sys.stdin):
            timing = time_step(name, ProblemShape(*shape), getattr(torch, dtype), axis)
            if timing is not None:
                rows.append(asdict(timing))
    package = LIBRARIES[name].package
    print(json.dumps({"rows": rows, "version": version(package) if package else None}))


if __name__ == "__main__":
    main()
