"""A sharded SAE equals the whole one: codes, reconstruction and every gradient.

Legend: N tokens, D inputs, M latents, K active latents per token, S shards.
"""

import pytest
import torch

from mlsae.distributed import Group, make_mesh
from mlsae.sharding import Selection, ShardedSAE
from sparse_topk import SparseTopKSAE
from sparse_topk import auxk as auxk_module
from sparse_topk.auxk import auxk

N, D, M, K = 37, 12, 42, 5  # M is no multiple of 4


class CountingGroup(Group):
    """A group that counts the bytes that this process sends in each kind of collective."""

    def __init__(self, group):
        self.__dict__ |= group.__dict__
        self.bytes = {"all_to_all": 0, "sum": 0}

    def all_to_all(self, blocks):
        self.bytes["all_to_all"] += blocks.nbytes
        return super().all_to_all(blocks)

    def sum_(self, tensor):
        self.bytes["sum"] += tensor.nbytes
        return super().sum_(tensor)


def mesh_of(world, shards):
    return make_mesh(world, torch.device("cpu"), shards, timeout=30)


def inputs(kind, n=N):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    if kind == "ties":
        x = x.round()
    if kind == "negative":
        x = x - 3
    return x


def make(sae_class, *group, kind="plain"):
    torch.manual_seed(0)
    sae = sae_class(D, M, K, *group, **({} if group else {"bias": False})).double()
    with torch.no_grad():
        if kind == "ties":  # so few different scores that they tie
            for weight in (sae.W_enc, sae.W_dec):
                weight.copy_((3 * weight).round())
        sae.b_dec.copy_(torch.linspace(-1, 1, D).round())
    return sae


def passes(sae, x):
    """x̂, the gradients, and the positive codes as (token, latent, value)."""
    x = x.clone().requires_grad_()
    x_hat, values, indices = sae.reconstruct(x)
    (x_hat * torch.linspace(1, 2, D, dtype=torch.float64)).square().sum().backward()
    first = getattr(sae, "rows", slice(0, M)).start
    tokens, slots = (values > 0).nonzero(as_tuple=True)
    latents = indices[tokens, slots] + first
    codes = zip(tokens.tolist(), latents.tolist(), values[tokens, slots].tolist(), strict=True)
    gradients = {"x": x.grad, "b_dec": sae.b_dec.grad}
    return x_hat.detach(), gradients, (sae.W_enc.grad, sae.W_dec.grad), list(codes)


def sharded_passes(world, shards, kind):
    mesh = mesh_of(world, shards)
    sae = make(ShardedSAE, mesh.latents, kind=kind)
    return (*passes(sae, inputs(kind)), (mesh.data.rank, mesh.latents.rank))


@pytest.mark.parametrize("kind", ["plain", "ties", "negative"])
@pytest.mark.parametrize("shards", [2, 4])
def test_codes_reconstruction_and_gradients(team, shards, kind):
    x_hat, gradients, weights, codes = passes(make(SparseTopKSAE, kind=kind), inputs(kind))
    results = team.run(sharded_passes, shards, kind)
    for shard_x_hat, shard_gradients, _, _, _ in results:
        torch.testing.assert_close(shard_x_hat, x_hat)
        for name in gradients:
            torch.testing.assert_close(shard_gradients[name], gradients[name])
    one_per_shard = [r for r in results if r[4][0] == 0]
    assert len(one_per_shard) == shards
    for i in range(2):
        torch.testing.assert_close(torch.cat([r[2][i] for r in one_per_shard]), weights[i])
    shard_codes = sorted(code for r in one_per_shard for code in r[3])
    assert [code[:2] for code in shard_codes] == [code[:2] for code in sorted(codes)]
    torch.testing.assert_close(
        torch.tensor([c[2] for c in shard_codes]), torch.tensor([c[2] for c in sorted(codes)])
    )
    if kind == "ties":
        assert len({round(code[2], 3) for code in codes}) < len(codes) / 4, "ties were not tried"


def selected(world, values):
    """`Selection.keep` of each shard's columns of `values`."""
    latents = mesh_of(world, world.size).latents
    own = values.tensor_split(world.size, dim=1)[latents.rank]
    return Selection(latents, 3).keep(own)


def test_ties_go_to_the_smaller_id_and_nan_is_kept(team):
    nan = float("nan")
    values = torch.tensor(
        [
            [1.0, 1, 1, 1, 1, 1, 1, 1],
            [0, 2, 0, 2, 1, 2, 0, 2],
            [0, 0, 0, 0, 0, 0, 0, 5],
            [9, 8, 0, 0, nan, 0, 0, nan],
            [3, 2, 0, 0, 0, 0, 2, 2],
        ]
    )
    expected = torch.tensor(
        [
            [1.0, 1, 1, 0, 0, 0, 0, 0],
            [0, 2, 0, 2, 0, 2, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 5],
            [9, 0, 0, 0, nan, 0, 0, nan],
            [3, 2, 0, 0, 0, 0, 2, 0],
        ]
    )
    kept = torch.cat(team.run(selected, values), dim=1)
    torch.testing.assert_close(kept, expected, rtol=0, atol=0, equal_nan=True)


def dead_latents(kind, sae):
    """AuxK's arguments for the dead latents among the rows of an SAE; the second of four shards has
    none."""
    rows = getattr(sae, "rows", slice(0, M))
    ids = torch.arange(M)[rows]
    dead = ((ids < 9) | (ids > 24)).nonzero()[:, 0]
    x = inputs(kind)
    weight = torch.linspace(1, 2, N, dtype=torch.float64).masked_fill(torch.arange(N) % 4 == 0, 0)
    return x, x.flip(0), weight, sae.W_enc.detach()[dead], None, sae.W_dec.detach()[dead], 7


def auxk_of_shard(world, shards, kind, few, piece_bytes):
    mesh = mesh_of(world, shards)
    arguments = dead_latents(kind, make(ShardedSAE, mesh.latents, kind=kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auxk_module, "latents_are_few", lambda *sizes: few)
        patch.setattr(auxk_module, "_PIECE_BYTES", piece_bytes)
        result = auxk(*arguments, shards=Selection(mesh.latents, 7), max_latents=21)
    return (*result, (mesh.data.rank, mesh.latents.rank))


@pytest.mark.parametrize("kind", ["plain", "ties", "negative"])
@pytest.mark.parametrize("shards", [2, 4])
def test_auxk_of_shards_equals_that_of_the_whole(team, shards, kind):
    """By dense products, in one piece or several, and by the sparse ops."""
    sq_error, *grads = auxk(*dead_latents(kind, make(SparseTopKSAE, kind=kind)))
    for few, piece_bytes in ((True, 2**20), (True, 5 * 8 * (2 * 24 + 3 * D)), (False, 0)):
        results = team.run(auxk_of_shard, shards, kind, few, piece_bytes)
        one_per_shard = [r for r in results if r[-1][0] == 0]
        for r in results:
            torch.testing.assert_close(r[0], sq_error)
        for i, whole in enumerate(grads, 1):
            if whole is None:  # there is no bias
                continue
            torch.testing.assert_close(torch.cat([r[i] for r in one_per_shard]), whole)


def traffic(world, n_latents, n):
    latents = CountingGroup(mesh_of(world, world.size).latents)
    sae = ShardedSAE(D, n_latents, K, latents).double()
    sae.reconstruct(inputs("plain", n)).x_hat.sum().backward()
    return latents.bytes


def test_the_traffic_of_a_token_does_not_grow_with_the_latents(team):
    """Per token, a process sends K candidates, a count of 4 bytes and D numbers of its partial
    reconstruction; per pass, D numbers for b_dec's gradient."""
    n, size = 64, 8  # bytes of a float64
    for n_latents in (64, 1024):
        for sent in team.run(traffic, n_latents, n):
            assert sent["all_to_all"] == n * (size * K + 4)
            assert sent["sum"] == n * size * D + size * D
