"""Train one SAE on random vectors in several processes, for the tests that compare layouts.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

import copy
from unittest import mock

import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.distributed import ALONE, make_mesh, splits
from mlsae.training import init as survey_module
from mlsae.training.init import survey
from mlsae.training.state import Step, Trainer
from mlsae.training.validation import evaluate

L, N, D, M, K = 2, 61, 8, 49, 4
SHARDS = [1, 2, 4]  # of the latents, on 4 processes


def make(mesh):
    """A trainer with the same initial weights on every mesh."""
    torch.manual_seed(0)
    mlsae = MLSAE(MLSAEConfig(D, M, K, (0, 3)), shards=mesh.latents).double()
    trainer = Trainer(
        mlsae, dead_tokens=100, k_aux=6, aux_weight=1 / 32, max_grad_norm=1.0, data=mesh.data
    )
    with mock.patch.object(survey_module, "_MEDIAN_VECTORS", L * 40):  # of L · 61
        trainer.initialize(*survey(mlsae, mine(residuals(99), mesh), mesh.data))
    return trainer


def residuals(seed, n=N):
    """Random x (L, n, D), layers of different scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, n, D, generator=generator, dtype=torch.float64)
    return x * torch.tensor([1.0, 9.0])[:, None, None] + 2


def mine(x, mesh):
    """This process's tokens of x (L, N, D), in parts of at most 20."""
    own = splits(x.shape[1], mesh.data.size)[mesh.data.rank]
    return [part for part in x[:, own].split(20, dim=1) if part.shape[1]]


def train(trainer, mesh, seeds):
    """Sums of the last step; one of them has fewer tokens than processes."""
    for seed in seeds:
        x = residuals(seed, 3 if seed % 10 == 7 else N)
        step = Step(trainer, x.shape[1])
        for part in mine(x, mesh):
            step.add(part)
        step.check()
        sums = step.end(lr=1e-2)
    return {
        "fvu": sums.fvu(), "loss": sums.loss, "aux": sums.aux,
        "dead": torch.tensor(trainer.dead_share()),
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


def run(world, shards, seeds, state=None):
    """Train, from a state if given: the first process's state, and every process's sums."""
    mesh = make_mesh(world, torch.device("cpu"), shards, timeout=30) if world.size > 1 else ALONE
    trainer = make(mesh)
    if state:
        trainer.load_state_dict(copy.deepcopy(state))  # processes share what is sent to them
    sums = train(trainer, mesh, seeds)
    figures = evaluate([trainer.mlsae], mine(residuals(500), mesh), mesh.data)[0]
    sums |= {"heldout": figures.fvu, "l0": figures.l0}
    whole = trainer.state_dict() if mesh.data.rank == 0 else None
    first = mesh.world.rank == 0
    own = [p.detach().clone() for p in trainer.mlsae.parameters()]
    counts = figures.counts if first else None
    return sums, whole if first else None, counts, (mesh.latents.rank, own)
