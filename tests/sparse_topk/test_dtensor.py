"""`UnitNormAdam` and `NorMuon` on DTensors equal one process: under FSDP2, with given gradients in
any placement that they take, and through torch's distributed checkpoint. Four gloo processes, in
float64.

Legend: D inputs, M latents.
"""

import itertools

import pytest
import torch

from sparse_topk import UnitNormAdam
from tests.helpers import sharded_adam
from tests.helpers.sharded_adam import ZERO_ROW, D, M


@pytest.mark.parametrize("name", ["adam", "normuon"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_under_fully_shard_it_trains_as_one_process(team, shape, max_grad_norm, name):
    """The mesh of two dimensions holds two replicas of two shards."""
    expected = sharded_adam.alone(5, max_grad_norm, name)
    for weights in team.run(sharded_adam.fsdp, shape, 5, max_grad_norm, name):
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, msg=lambda m, n=name: f"{n}: {m}")
        assert (weights["W_dec"][ZERO_ROW] == 0).all()


@pytest.mark.parametrize("name", ["adam", "normuon"])
def test_it_goes_on_from_a_distributed_checkpoint(team, tmp_path, name):
    expected = sharded_adam.alone(6, None, name)
    for weights in team.run(sharded_adam.fsdp_through_a_checkpoint, tmp_path, 6, name):
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize(
    ("name", "placed"),
    [
        *itertools.product(["adam", "normuon"], ["rows", "replicated", "replicas of rows"]),
        ("adam", "columns"),
    ],
)
def test_every_placement_is_the_same(team, placed, max_grad_norm, name):
    """Rows of zeros without and with a gradient, too."""
    torch.manual_seed(0)
    gradients = list(torch.randn(5, M, D, dtype=torch.float64))
    for gradient in gradients[1:3]:
        gradient[ZERO_ROW] = 0
    for n in (3, 5):
        expected = sharded_adam.given_gradients(None, None, gradients[:n], max_grad_norm, name)
        assert (expected[0][ZERO_ROW].norm() == 0) == (n == 3)
        given = (placed, gradients[:n], max_grad_norm, name)
        for results in team.run(sharded_adam.given_gradients, *given):
            for actual, truth in zip(results, expected, strict=True):
                torch.testing.assert_close(actual, truth)


@pytest.mark.parametrize("placed", ["columns of replicas", "rows and columns"])
def test_other_placements_are_refused_by_name(team, placed):
    for said in team.run(sharded_adam.refusal, placed):
        assert f"parameter 0 of group 0, ({M}, {D})," in said
        assert "on a mesh of shape (2, 2); shard it by rows" in said
    assert team.run(sharded_adam.refusal, "rows") == [""] * 4


def test_orthogonalizing_split_rows_is_refused(team):
    for said in team.run(sharded_adam.refusal, "columns", "normuon"):
        assert said.startswith(f"NorMuon needs whole rows, and a parameter of shape ({M}, {D}) has")


def test_rows_of_other_norms_are_refused_in_all_processes(team):
    assert all(team.run(sharded_adam.refuses_other_rows_everywhere))


class Wrapped(torch.Tensor):
    """A tensor that stands for another, as quantized ones do."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*[torch.ones(3) if isinstance(a, cls) else a for a in args])


class Named(torch.nn.Parameter):
    """A subclass with memory of its own."""


def test_a_tensor_that_stands_for_another_is_refused():
    with pytest.raises(ValueError, match=r"parameter 0 of group 0, \(3,\), is a Wrapped"):
        UnitNormAdam([Wrapped(torch.ones(3))])
    p = Named(torch.ones(3))
    p.grad = torch.ones(3)
    UnitNormAdam([p], lr=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))
