"""`UnitNormAdam` against torch's own Adam with the projection and the norm written out.

Both backends are tested, Triton's under its interpreter if there is no GPU.
"""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_topk import SparseTopKSAE, UnitNormAdam, torch_ops, torch_optim, triton_ops


@pytest.fixture(params=["torch", "triton"])
def device(request, monkeypatch):
    """A device whose parameters the backend takes."""
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", request.param)
    return "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"


def gradients(shape, steps=5, seed=1, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    grads = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps))
    return [grad.to(device) for grad in grads]


@pytest.mark.parametrize("block_bytes", [1, 200, 2**20])
def test_blocks_of_any_size_are_the_same(monkeypatch, block_bytes):
    monkeypatch.setattr(torch_optim, "_BLOCK_BYTES", block_bytes)
    test_on_the_sphere_it_is_project_adam_normalize("cpu")


def test_on_the_sphere_it_is_project_adam_normalize(device):
    start = torch.nn.functional.normalize(torch.randn(11, 7, dtype=torch.float64), dim=1).to(device)
    ours, truth = (start.clone().requires_grad_() for _ in range(2))
    optimizer = UnitNormAdam([ours], lr=0.1, unit_norm=True)
    adam = torch.optim.Adam([truth], lr=0.1, eps=6.25e-10)
    for grad in gradients(start.shape, device=device):
        ours.grad = grad.clone()
        optimizer.step()
        truth.grad = grad - (grad * truth.detach()).sum(1, keepdim=True) * truth.detach()
        adam.step()
        with torch.no_grad():
            truth /= truth.norm(dim=1, keepdim=True)
        assert torch.equal(ours.grad, grad), "the gradient must be left as it was"
        torch.testing.assert_close(ours.norm(dim=1), torch.ones_like(ours[:, 0]))
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_off_the_sphere_it_is_adam(shape, device):
    start = torch.randn(shape, dtype=torch.float64, device=device)
    ours, truth = (start.clone().requires_grad_() for _ in range(2))
    optimizer = UnitNormAdam([ours], lr=0.1, betas=(0.8, 0.95), eps=1e-3)
    adam = torch.optim.Adam([truth], lr=0.1, betas=(0.8, 0.95), eps=1e-3)
    for grad in gradients(shape, device=device):
        ours.grad, truth.grad = grad.clone(), grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_it_resumes_from_its_state_to_the_same_bits(device, max_grad_norm):
    start = torch.nn.functional.normalize(torch.randn(4, 3), dim=1).to(device)
    grads = [g.float() for g in gradients((4, 3), 6, device=device)]

    def run(p, optimizer, grads):
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()

    def fresh(p, lr=0.1):
        return UnitNormAdam([p], lr=lr, unit_norm=True, max_grad_norm=max_grad_norm)

    straight = start.clone().requires_grad_()
    run(straight, fresh(straight), grads)
    first = start.clone().requires_grad_()
    optimizer = fresh(first)
    run(first, optimizer, grads[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = first.detach().clone().requires_grad_()
    resumed = fresh(second, lr=0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(second, resumed, grads[3:])
    assert torch.equal(second, straight)


@pytest.mark.parametrize("max_grad_norm", [0.5, 100.0])
def test_it_clips_as_torch_does(device, max_grad_norm):
    """All groups share one norm. Each of these gradients exceeds 0.5, and none exceeds 100. A
    parameter without a gradient does not count."""

    def parameters():
        generator = torch.Generator().manual_seed(0)
        sphere = torch.nn.functional.normalize(torch.randn(4, 3, generator=generator), dim=1)
        flat, idle = torch.randn(2, 5, generator=generator)
        return [t.double().to(device).requires_grad_() for t in (sphere, flat, idle)]

    def optimizer(parameters, **more):
        groups = [{"params": parameters[:1], "unit_norm": True}, {"params": parameters[1:]}]
        return UnitNormAdam(groups, lr=0.1, **more)

    ours, truth = parameters(), parameters()
    clipping, plain = optimizer(ours, max_grad_norm=max_grad_norm), optimizer(truth)
    for grads in zip(gradients((4, 3), device=device), gradients(5, device=device), strict=True):
        for p, true_p, grad in zip(ours, truth, grads, strict=False):
            p.grad, true_p.grad = grad.clone(), grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(truth, max_grad_norm)
        assert 0.5 < norm < 100
        clipping.step()
        plain.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, grads, strict=False))
    for p, true_p in zip(ours, truth, strict=True):
        torch.testing.assert_close(p, true_p)
    torch.testing.assert_close(ours[0].norm(dim=1), torch.ones_like(ours[0][:, 0]))


def test_a_backward_after_the_step_is_refused(device):
    """It would compute gradients at weights that the forward pass did not use."""
    sae = SparseTopKSAE(4, 16, 2).to(device)
    optimizer = UnitNormAdam(sae.parameter_groups())
    x = torch.randn(3, 4, device=device)
    early, late = sae(x).sum(), sae(x).sum()
    early.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_a_copy_clips_too():
    p = torch.ones(3, requires_grad=True)
    assert copy.deepcopy(UnitNormAdam([p], max_grad_norm=0.5)).max_grad_norm == 0.5


def test_nothing_to_update_is_no_error(device):
    empty = torch.zeros(0, 3, device=device, requires_grad=True)
    idle = torch.zeros(2, 3, device=device, requires_grad=True)
    empty.grad = torch.zeros_like(empty)
    for parameters in ([empty], [idle]):
        UnitNormAdam(parameters, unit_norm=True, max_grad_norm=1.0).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_zeros_stays_until_it_has_a_gradient(device, dtype):
    """A pruned latent. Other rows are as they are without it."""
    torch.manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(4, 6, dtype=dtype), dim=1).to(device)
    start[1] = 0
    grads = [g.to(dtype) for g in gradients((4, 6), 6, device=device)]
    others = [0, 2, 3]
    pruned = start.clone().requires_grad_()
    rest = start[others].requires_grad_()
    one, two = (UnitNormAdam([p], lr=1e-2, unit_norm=True) for p in (pruned, rest))
    for step, grad in enumerate(grads):
        pruned.grad = grad.clone()
        if step < 3:
            pruned.grad[1] = 0
        rest.grad = grad[others]
        one.step()
        two.step()
        torch.testing.assert_close(pruned[others], rest)
        torch.testing.assert_close(pruned[1].norm().item(), float(step >= 3))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("backend", [torch_ops, triton_ops])
@given(
    row=st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3),
    exponent=st.integers(-149, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_finite_row_becomes_a_unit_row_or_stays_zero(backend, row, exponent, dtype):
    """From the smallest denormal to numbers whose squares overflow. Without a gradient Adam leaves
    the row as it is. A unit row beside it keeps its bits."""
    device = "cuda" if backend is triton_ops and torch.cuda.is_available() else "cpu"
    row = torch.tensor([row, [1.0, 0.0, 0.0]], dtype=dtype, device=device)
    row[0] *= 2.0**exponent
    weight, grad = row.clone(), torch.zeros_like(row)
    moments = torch.zeros_like(row), torch.zeros_like(row)
    settings = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "unit_norm": True}
    backend.adam_unit_norm_(weight, grad, *moments, 1, **settings)
    largest = row[0].double().abs().max()
    expected = row[0].double() if largest == 0 else row[0].double() / largest
    expected = expected / (expected.norm() or 1)
    torch.testing.assert_close(weight[0].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(weight[1], row[1])


def rows_of_norm(*norms):
    rows = torch.nn.functional.normalize(torch.randn(len(norms), 5), dim=1)
    return (rows * torch.tensor(norms)[:, None]).requires_grad_()


@pytest.mark.parametrize("norm", [0.5, 1.02, 1e-30, 1e30, math.inf, math.nan])
def test_rows_that_are_no_unit_rows_are_refused(norm):
    """Normalizing them at the first step would change what the SAE computes."""
    told = r"norm 1 within 0.01, .* got 1 of 3 others, the first row 1 of norm .*fold_norms_"
    with pytest.raises(ValueError, match=told):
        UnitNormAdam([rows_of_norm(1.0, norm, 1.0)], unit_norm=True)
    p = rows_of_norm(1.0, norm, 1.0)
    UnitNormAdam([p])  # as they are
    late = torch.nn.functional.normalize(torch.ones(3, 5), dim=1).requires_grad_()
    optimizer = UnitNormAdam([late], unit_norm=True)
    late.data.copy_(p.data)  # loaded after the optimizer was made
    before, late.grad = late.detach().clone(), torch.ones(3, 5)
    with pytest.raises(ValueError, match=told):
        optimizer.step()
    torch.testing.assert_close(late.detach(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_unit_rows_but_for_rounding_are_taken(dtype):
    """Those of other libraries, 1e-3 off, and rounded to half precision."""
    p = rows_of_norm(0.999, 1.001, 1.0, 0.0).detach().to(dtype).requires_grad_()
    UnitNormAdam([p], unit_norm=True)
    UnitNormAdam([torch.nn.Parameter(torch.empty(3, 5, device="meta"))], unit_norm=True)


def test_bad_arguments_are_named():
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        UnitNormAdam([p], lr=-1)
    with pytest.raises(ValueError, match="betas"):
        UnitNormAdam([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="max_grad_norm must be above 0, got 0"):
        UnitNormAdam([p], max_grad_norm=0)
    with pytest.raises(ValueError, match="matrix"):
        UnitNormAdam([p], unit_norm=True)
