"""The training steps that are compared, each by its own library, and their timing. Run by
`bench.peers` in each library's environment, so it imports a library only in its function.

    python -m bench.peer_steps NAME < jobs.json > rows.json

A step is forward, loss, backward, the optimizer and the decoder's norm, no latent dead: each
library's own trainer's lines, with its fastest settings and torch's fused Adam.

Legend: N tokens, D inputs, M latents, K active latents a token.
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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_topk import SparseTopKSAE, UnitNormAdam, keep_freed_memory, reference

from . import costs
from .limits import copy_bandwidth, matmul_rate, sync
from .memory import peak_bytes
from .results import Row
from .shapes import Shape

Step = Callable[[Tensor], object]
_ROUNDS = {"cpu": 7, "cuda": 30}


class Side(NamedTuple):
    """One library."""

    package: str | None
    """Its name on the package index; None for what is in this repository."""
    build: Callable[[Shape, torch.dtype, torch.device], Step]
    differs: str
    """What its step does more or less than ours."""


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def _fused_adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=1e-4, eps=6.25e-10, fused=True)


def ours(shape: Shape, dtype: torch.dtype, device: torch.device) -> Step:
    """This package."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, device=device)
    optimizer = UnitNormAdam(sae.parameter_groups())

    def step(x: Tensor) -> None:
        with _autocast(device, dtype):
            loss = (sae(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense(shape: Shape, dtype: torch.dtype, device: torch.device) -> Step:
    """The same mathematics through autograd."""
    sae = SparseTopKSAE(shape.d, shape.m, shape.k, device=device)
    optimizer = _fused_adam(sae.parameters())

    def step(x: Tensor) -> None:
        with _autocast(device, dtype):
            x_hat = reference.topk_sae(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
            loss = (x_hat - x).square().mean()
        loss.backward()
        with torch.no_grad():
            grad = sae.W_dec.grad
            assert grad is not None
            grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            optimizer.step()
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        optimizer.zero_grad()

    return step


def sparsify(shape: Shape, dtype: torch.dtype, device: torch.device) -> Step:
    """`SparseCoder` and the lines of `Trainer.fit`. Its forward turns autocast on by itself on
    CUDA, so its float32 row there is computed in bfloat16 too."""
    if device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else it calls its kernels there too
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=shape.m, k=shape.k)
    sae = SparseCoder(shape.d, config, device=device)
    optimizer = _fused_adam(sae.parameters())

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        with _autocast(device, dtype):
            loss = sae(x).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sae_lens(shape: Shape, dtype: torch.dtype, device: torch.device) -> Step:
    """`TopKTrainingSAE` and the lines of `SAETrainer._train_step`; sparse activations in float32,
    where its documentation says that they pay, and no scaling by the decoder's norms, whose
    backward has no sparse form on a CPU."""
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
    optimizer = _fused_adam(sae.parameters())

    def step(x: Tensor) -> None:
        with _autocast(device, dtype):
            loss = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(shape: Shape, dtype: torch.dtype, device: torch.device) -> Step:
    """`TopKTrainer.update`, whole."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        10**6, shape.d, shape.m, shape.k, layer=0, lm_name="none", device=str(device)
    )
    trainer.optimizer = _fused_adam(trainer.ae.parameters())

    def step(x: Tensor) -> None:
        with _autocast(device, dtype):
            trainer.update(1, x)

    return step


SIDES = {
    "ours": Side(None, ours, ""),
    "dense": Side(None, dense, "nothing: the same mathematics through autograd"),
    "eai-sparsify": Side("eai-sparsify", sparsify, "ReLU before TopK"),
    "sae-lens": Side(
        "sae-lens",
        sae_lens,
        "clips the gradient; leaves the decoder's norms free; sparse activations in float32",
    ),
    "dictionary-learning": Side(
        "dictionary-learning",
        dictionary_learning,
        "ReLU before TopK; clips the gradient; counts dead latents; backward inside autocast",
    ),
}


def time_step(side: str, shape: Shape, dtype: torch.dtype, axis: str | None) -> Row | None:
    """The row of one step, timed in turn with the encoder's bare float32 product; None where it
    does not fit in the GPU's memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    some = [torch.randn(shape.n, shape.d, device=device) for _ in range(4)]
    W = torch.randn(shape.m, shape.d, device=device)
    rate, bandwidth = matmul_rate(shape, dtype, device), copy_bandwidth(device)
    steps: list[float] = []
    products: list[float] = []
    try:
        out = torch.empty(shape.n, shape.m, device=device)
        step = SIDES[side].build(shape, dtype, device)
        for x in some[:2]:  # compiles, allocates, makes the optimizer's state
            step(x)
        peak = peak_bytes(lambda: step(some[2]), device)
        for i in range(_ROUNDS[device.type]):
            x = some[i % 4]
            for work, times in ((lambda x: torch.mm(x, W.T, out=out), products), (step, steps)):
                sync(device)
                started = time.perf_counter()
                work(x)
                sync(device)
                times.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return None
    parts = costs.step(shape, dtype.itemsize)
    return Row(
        "step",
        side,
        *shape,
        str(dtype).removeprefix("torch."),
        statistics.median(steps),
        min(steps),
        len(steps),
        sum(c.flop for c in parts),
        sum(c.bytes for c in parts),
        sum(c.floor(rate, bandwidth) for c in parts),
        peak,
        axis,
        statistics.median(products),
    )


def main() -> None:
    """Time the jobs, [shape, dtype, axis] each, that come in, and print rows and version."""
    keep_freed_memory()
    name = sys.argv[1]
    rows = []
    with redirect_stdout(sys.stderr):  # libraries print
        for shape, dtype, axis in json.load(sys.stdin):
            row = time_step(name, Shape(*shape), getattr(torch, dtype), axis)
            rows += [] if row is None else [asdict(row)]
    package = SIDES[name].package
    print(json.dumps({"rows": rows, "version": version(package) if package else None}))


if __name__ == "__main__":
    main()
