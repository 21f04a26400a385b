"""Train one SAE on random vectors in several processes, for the tests that compare layouts.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

import copy
from unittest import mock

import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.distributed import ALONE, make_mesh, splits
from mlsae.training import init
from mlsae.training.init import init_stats
from mlsae.training.loop import train_step
from mlsae.training.optimizers import Optimizers
from mlsae.training.state import TrainState
from mlsae.training.validation import validate
from tests.helpers.parts import unmasked

L, N, D, M, K = 2, 61, 8, 49, 4
SHARDS = [1, 2, 4]  # of the latents, on 4 processes


def make(mesh, optimizer="adam", k_max=None):
    """A trainer with the same initial weights on every mesh."""
    torch.manual_seed(0)
    mlsae = MLSAE(MLSAEConfig(D, M, K, (0, 3), k_max=k_max), shards=mesh.latents).double()
    state = TrainState(
        mlsae, schedule=lambda tokens: 1e-2, dead_tokens=100, k_aux=6, aux_weight=1 / 32,
        optimizers=Optimizers(optimizer, optimizer, max_grad_norm=1.0),
        data=mesh.data, dtype=torch.float64,
    )  # fmt: skip
    with mock.patch.object(init, "_MEDIAN_VECTORS", L * 40):  # of L · 61
        state.initialize(*init_stats(mlsae, mine(residuals(99), mesh), mesh.data)[:2])
    return state


def residuals(seed, n=N):
    """Random x (L, n, D), layers of different scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, n, D, generator=generator, dtype=torch.float64)
    return x * torch.tensor([1.0, 9.0])[:, None, None] + 2


def mine(x, mesh):
    """This process's tokens of x (L, N, D), in parts of at most 20."""
    own = splits(x.shape[1], mesh.data.size)[mesh.data.rank]
    return [part for part in x[:, own].split(20, dim=1) if part.shape[1]]


def train(state, mesh, seeds):
    """Metrics of the last step; one of the steps has fewer tokens than processes."""
    for seed in seeds:
        x = residuals(seed, 3 if seed % 10 == 7 else N)
        (metrics,) = train_step([state], map(unmasked, mine(x, mesh)), x.shape[1])
    return {
        "fvu": metrics.fvu(), "loss": metrics.loss, "aux": metrics.aux,
        "dead": torch.tensor(state.dead_share()),
    }  # fmt: skip


def flat(state, prefix=""):
    """Copies of the tensors of a nested dict, by path."""
    tensors = {}
    for name, value in state.items():
        if isinstance(value, dict):
            tensors |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor):
            tensors[prefix + name] = value.detach().clone()
    return tensors


def run(world, shards, seeds, saved=None, optimizer="adam"):
    """Train, from a saved state if given: rank 0's state, and every process's metrics."""
    mesh = make_mesh(world, torch.device("cpu"), shards, timeout=30) if world.size > 1 else ALONE
    state = make(mesh, optimizer)
    if saved:
        state.load_state_dict(copy.deepcopy(saved))  # processes share what is sent to them
    metrics = train(state, mesh, seeds)
    parts = [(x, x[:, :0]) for x in mine(residuals(500), mesh)]  # nothing is dropped
    (validation,) = validate([state.mlsae], parts, mesh.data)
    metrics |= {"heldout": validation.fvu, "l0": validation.l0}
    whole = state.state_dict() if mesh.data.rank == 0 else None
    is_rank0 = mesh.world.rank == 0
    own = [p.detach().clone() for p in state.mlsae.parameters()]
    counts = validation.counts if is_rank0 else None
    return metrics, whole if is_rank0 else None, counts, (mesh.latents.rank, own)


def batchtopk(world, k_max, seeds):
    """Train with BatchTopK, each process on its own part of the tokens; one process on the parts
    of four. The threshold, the share of capped vectors and the parameters."""
    mesh = make_mesh(world, torch.device("cpu"), 1, timeout=30) if world.size > 1 else ALONE
    state = make(mesh, k_max=k_max)
    for seed in seeds:
        x = residuals(seed)
        parts = mine(x, mesh) if world.size > 1 else [x[:, own] for own in splits(N, 4)]
        train_step([state], map(unmasked, parts), N)
    told = state.threshold.value(), state.window.capped_share
    return *told, [p.detach().clone() for p in state.mlsae.parameters()]
