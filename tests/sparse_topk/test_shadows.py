"""Copies of weights in another dtype are never stale, whoever changes the weight, and the optimizer
writes them with it.

Legend: D inputs, M latents.
"""

import copy
import gc
import pickle

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sparse_topk import SparseTopKSAE, UnitNormAdam
from sparse_topk.shadows import Shadows

D, M, K = 12, 20, 3
BF16 = torch.bfloat16
GPU_BF16 = pytest.param(BF16, marks=pytest.mark.gpu)  # the interpreter does not round
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def sae():
    torch.manual_seed(0)
    return SparseTopKSAE(D, M, K, device=DEVICE)


def load(sae):
    sae.load_state_dict({name: p + 1 for name, p in sae.state_dict().items()})


def load_by_assignment(sae):
    sae.load_state_dict({name: p + 1 for name, p in sae.state_dict().items()}, assign=True)


def edit(sae):
    with torch.no_grad():
        sae.W_dec += 1


def edit_one_row(sae):
    with torch.no_grad():
        sae.W_dec[3].zero_()


def swap(sae):
    sae.W_dec.data = sae.W_dec.data + 1


def swap_twice(sae):
    """The second memory may be where the first was."""
    sae.W_dec.data = torch.zeros_like(sae.W_dec)
    sae.W_dec.data = torch.ones_like(sae.W_dec)


def swap_for_another_shape(sae):
    sae.W_dec.data = sae.W_dec.data[: M // 2]


def convert(sae):
    sae.double().W_dec.data.mul_(2)


def torch_adam(sae):
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    sae.W_dec.grad = torch.ones_like(sae.W_dec)
    optimizer.step()


def own_adam(sae):
    optimizer = UnitNormAdam(sae.parameters(), lr=0.1)
    sae.W_dec.grad = torch.ones_like(sae.W_dec)
    optimizer.step()


CHANGES = [
    load, load_by_assignment, edit, edit_one_row, swap, swap_twice, swap_for_another_shape, convert,
    torch_adam, own_adam,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_a_weight_gets_a_fresh_copy(sae, change):
    shadows = Shadows(BF16)
    before = shadows.of(sae.W_dec).clone()
    change(sae)
    after = shadows.of(sae.W_dec)
    assert after.shape != before.shape or not torch.equal(after, before)
    assert torch.equal(after, sae.W_dec.to(BF16))
    assert after.dtype == BF16
    assert not after.requires_grad


def test_an_unchanged_weight_is_not_copied_again(sae):
    shadows = Shadows(BF16)
    first = shadows.of(sae.W_dec)
    version = first._version
    assert shadows.of(sae.W_dec) is first
    assert first._version == version
    assert shadows.of(sae.W_enc) is not first


def test_a_changed_weight_is_copied_to_the_same_memory(sae):
    """A CUDA graph reads it there."""
    shadows = Shadows(BF16)
    first = shadows.of(sae.W_dec)
    for change in (edit, swap):
        change(sae)
        assert shadows.of(sae.W_dec) is first


def test_a_weight_of_the_dtype_is_its_own_copy(sae):
    assert Shadows(torch.float32).of(sae.W_dec) is sae.W_dec


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [GPU_BF16, torch.float16])
def test_the_optimizers_step_writes_the_copies(monkeypatch, sae, backend, dtype):
    """Both kinds of groups, with the updates that it makes without them; nobody copies after it."""
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", backend)
    twin = copy.deepcopy(sae)
    shadows = Shadows(dtype)
    with_shadows = UnitNormAdam(sae.parameter_groups(), lr=0.1, shadows=shadows)
    without = UnitNormAdam(twin.parameter_groups(), lr=0.1)
    copies = {name: shadows.of(getattr(sae, name)) for name in ("W_enc", "W_dec")}
    for _ in range(2):
        for p, q in zip(sae.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad = torch.randn_like(p)
        with_shadows.step()
        without.step()
        for name, written in copies.items():
            weight = getattr(sae, name)
            torch.testing.assert_close(weight, getattr(twin, name))
            assert torch.equal(written, weight.to(dtype))
            version = written._version
            assert shadows.of(weight) is written
            assert written._version == version


def test_the_step_writes_a_copy_that_was_stale(sae):
    shadows = Shadows(BF16)
    optimizer = UnitNormAdam(sae.parameter_groups(), lr=0.1, shadows=shadows)
    shadows.of(sae.W_enc)
    for change in (edit, swap, lambda sae: None):
        change(sae)
        with torch.no_grad():
            sae.W_enc.mul_(2)
        sae.W_enc.grad = torch.ones_like(sae.W_enc)
        optimizer.step()
        assert torch.equal(shadows.of(sae.W_enc), sae.W_enc.to(BF16))


def test_a_weight_that_the_step_leaves_keeps_its_copy(sae):
    shadows = Shadows(BF16)
    optimizer = UnitNormAdam(sae.parameter_groups(), shadows=shadows)
    first = shadows.of(sae.W_dec)
    optimizer.step()  # no gradients
    assert shadows.of(sae.W_dec) is first
    assert torch.equal(first, sae.W_dec.to(BF16))


def test_copies_are_in_no_state_and_in_no_pickle(sae):
    shadows = Shadows(BF16)
    optimizer = UnitNormAdam(sae.parameter_groups(), shadows=shadows)
    before = optimizer.state_dict()
    shadows.of(sae.W_dec)
    assert optimizer.state_dict() == before
    assert sae.state_dict().keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert twin.shadows.dtype == BF16
        weight = twin.param_groups[1]["params"][0]
        assert torch.equal(twin.shadows.of(weight), weight.to(BF16))
        assert twin.shadows.of(weight) is not shadows.of(sae.W_dec)


def test_a_copy_dies_with_its_weight():
    shadows, weight = Shadows(BF16), torch.zeros(3)
    freed = torch.multiprocessing.reductions.StorageWeakRef(shadows.of(weight).untyped_storage())
    del weight
    gc.collect()
    assert freed.expired()


def test_an_edit_that_torch_does_not_see_needs_clear(sae):
    shadows = Shadows(BF16)
    shadows.of(sae.W_dec)
    sae.W_dec.data.mul_(2)
    shadows.clear()
    assert torch.equal(shadows.of(sae.W_dec), sae.W_dec.to(BF16))


def test_tensors_without_a_version_are_cast_each_time():
    shadows = Shadows(BF16)
    with torch.inference_mode():
        weight = torch.ones(3)
        assert torch.equal(shadows.of(weight), weight.to(BF16))
        weight += 1
        assert torch.equal(shadows.of(weight), weight.to(BF16))


def test_fake_weights_have_fake_copies():
    """So that a step can be traced without data."""
    shadows = Shadows(BF16)
    with FakeTensorMode():
        weight = torch.empty(3, 4)
        first = shadows.of(weight)
        assert first.shape == (3, 4)
        assert shadows.of(weight) is first
