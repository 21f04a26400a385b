"""A SparseTopKSAE that processes train together as DTensors, and alone; for `Team.run`.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sparse_topk import NorMuon, SparseTopKSAE, UnitNormAdam

N, D, M, K = 12, 8, 33, 4  # 33 rows: no two processes of four hold equally many
ZERO_ROW = 5
PLACEMENTS = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "replicated": ((4,), [Replicate()]),
    "replicas of rows": ((2, 2), [Replicate(), Shard(0)]),
    "columns of replicas": ((2, 2), [Replicate(), Shard(1)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
}


OPTIMIZERS = {"adam": UnitNormAdam, "normuon": NorMuon}


def make():
    torch.manual_seed(0)
    sae = SparseTopKSAE(D, M, K).double()
    with torch.no_grad():
        sae.W_dec[ZERO_ROW] = sae.W_enc[ZERO_ROW] = 0
        sae.b_enc[ZERO_ROW] = -1
    return sae, torch.randn(N, D, dtype=torch.float64)


def train(sae, optimizer, x, steps):
    for _ in range(steps):
        (sae(x) - x).square().sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(steps, max_grad_norm, name="adam"):
    sae, x = make()
    optimizer = OPTIMIZERS[name](sae.parameter_groups(), lr=1e-2, max_grad_norm=max_grad_norm)
    train(sae, optimizer, x, steps)
    return weights(sae)


def weights(sae):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in sae.named_parameters()
    }


def sharded(shape):
    """An SAE under `fully_shard` on a mesh of this shape, and this process's tokens."""
    sae, x = make()
    names = ("replicas", "shards")[-len(shape) :]
    fully_shard(sae, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return sae, x.chunk(dist.get_world_size())[dist.get_rank()]


def fsdp(world, shape, steps, max_grad_norm, name):
    sae, x = sharded(shape)
    optimizer = OPTIMIZERS[name](sae.parameter_groups(), lr=1e-2, max_grad_norm=max_grad_norm)
    train(sae, optimizer, x, steps)
    return weights(sae)


def fsdp_through_a_checkpoint(world, folder, steps, name):
    """Half of the steps, a checkpoint, and the other half from what it holds."""
    first, x = sharded((4,))
    optimizer = OPTIMIZERS[name](first.parameter_groups(), lr=1e-2)
    train(first, optimizer, x, steps // 2)
    model, state = get_state_dict(first, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    second, x = sharded((4,))
    optimizer = OPTIMIZERS[name](second.parameter_groups(), lr=1e-2)
    model, state = get_state_dict(second, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(second, optimizer, model_state_dict=model, optim_state_dict=state)
    train(second, optimizer, x, steps - steps // 2)
    return weights(second)


def given_gradients(world, placed, gradients, max_grad_norm, name="adam"):
    """A matrix of unit rows, one of zeros, and a vector, after updates by given gradients; as
    DTensors if `placed`."""
    shape, placements = PLACEMENTS.get(placed, ((), []))

    def place(t):
        if not placements:
            return t.clone()
        mesh = init_device_mesh("cpu", shape)
        return distribute_tensor(t, mesh, placements if t.ndim == 2 else [Replicate()] * len(shape))

    start = torch.nn.functional.normalize(gradients[0], dim=1)
    start[ZERO_ROW] = 0
    rows, vector = (torch.nn.Parameter(place(t)) for t in (start, start[0].clone()))
    groups = [{"params": [vector]}, {"params": [rows], "unit_norm": True}]
    optimizer = OPTIMIZERS[name](groups, lr=1e-2, max_grad_norm=max_grad_norm)
    for gradient in gradients[1:]:
        rows.grad, vector.grad = place(gradient), place(gradient[1])
        optimizer.step()
    return [(t.full_tensor() if placements else t).detach() for t in (rows, vector)]


def refusal(world, placed, name="adam"):
    """What the optimizer says of a unit_norm parameter with these placements; "" if it takes it."""
    shape, placements = PLACEMENTS[placed]
    rows = torch.nn.functional.normalize(torch.ones(M, D), dim=1)
    rows = distribute_tensor(rows, init_device_mesh("cpu", shape), placements)
    try:
        OPTIMIZERS[name]([torch.nn.Parameter(rows)], unit_norm=True)
    except ValueError as error:
        return str(error)
    return ""


def refuses_other_rows_everywhere(world):
    """Whether every process refuses, though only the last one has the row that is no unit row."""
    rows = torch.nn.functional.normalize(torch.ones(M, D), dim=1)
    rows[-1] *= 2
    rows = distribute_tensor(rows, init_device_mesh("cpu", (4,)), [Shard(0)])
    try:
        UnitNormAdam([torch.nn.Parameter(rows)], unit_norm=True)
    except ValueError as error:
        return f"first row {M - 1} of norm 2" in str(error)
    return False
