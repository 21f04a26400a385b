"""`NorMuon` against its formulas in float64, with singular value decompositions in the place of
its matrix iteration. Both backends are tested, Triton's under its interpreter if there is no GPU.

Legend: D inputs, M latents.
"""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_topk import NorMuon, SparseTopKSAE, UnitNormAdam
from sparse_topk.normuon import orthogonalize
from sparse_topk.shadows import Shadows


@pytest.fixture(params=["torch", "triton"])
def device(request, monkeypatch):
    """A device whose parameters the backend takes."""
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", request.param)
    return "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"


def by_singular_values(x):
    """The oracle: Muon's five quintics on each singular value, relative to |x|, one by one."""
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


def formulas(weight, grads, unit_norm, *, lr, betas, eps, scales=None):
    """The oracle: weight, moment and mean squares of rows after the steps, in float64."""
    w = weight.detach().double().clone()
    m, r = torch.zeros_like(w), torch.zeros_like(w[:, :1])
    for step, grad in enumerate(grads, 1):
        g = grad.double() if scales is None else grad.double() * scales[step - 1]
        if unit_norm:
            g = g - (g * w).sum(1, keepdim=True) * w
        m = betas[0] * m + (1 - betas[0]) * g
        u = by_singular_values((1 - betas[0]) * g + betas[0] * m)
        r = betas[1] * r + (1 - betas[1]) * u.square().mean(1, keepdim=True)
        w = w - 0.2 * lr * u / ((r / (1 - betas[1] ** step)).sqrt() + eps)
        if unit_norm:
            w = w / w.norm(dim=1, keepdim=True)
    return w, m, r


def matrix(m, d, unit_norm=False, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    weight = torch.randn(m, d, dtype=dtype)
    return torch.nn.functional.normalize(weight, dim=1) if unit_norm else weight


def ill_conditioned(m, d, seed):
    """A gradient whose singular values span a factor of 100, as those of an SAE do."""
    torch.manual_seed(seed)
    return torch.randn(m, d, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9), (1, 5), (5, 1)])
def test_orthogonalizing_brings_every_singular_value_near_1(shape):
    x = ill_conditioned(*shape, seed=0)
    torch.testing.assert_close(orthogonalize(x), by_singular_values(x))
    values = torch.linalg.svdvals(orthogonalize(x))[: min(shape)]
    assert ((values > 0.5) & (values < 1.25)).all()
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    polar = left @ right
    cosine = (orthogonalize(x) * polar).sum() / orthogonalize(x).norm() / polar.norm()
    assert cosine > 0.95


@given(scale=st.floats(-15, 15), seed=st.integers(0, 99))
def test_the_gradients_scale_does_not_matter(scale, seed):
    x = ill_conditioned(12, 4, seed).float()
    torch.testing.assert_close(orthogonalize(x * 10**scale), orthogonalize(x), rtol=1e-3, atol=1e-3)


def test_in_half_precision_it_is_close():
    x = ill_conditioned(200, 30, seed=0)
    error = orthogonalize(x.bfloat16()).double() - by_singular_values(x)
    assert error.norm() < 0.02 * by_singular_values(x).norm()


def test_no_gradient_is_no_update():
    assert torch.equal(orthogonalize(torch.zeros(6, 4)), torch.zeros(6, 4))
    assert orthogonalize(torch.full((6, 4), torch.nan)).isnan().all()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_a_step_is_its_formulas(device, unit_norm, max_grad_norm):
    start = matrix(20, 6, unit_norm)
    grads = [ill_conditioned(20, 6, seed) * 10.0**-seed for seed in range(5)]
    p = start.clone().to(device).requires_grad_()
    settings = {"lr": 0.3, "betas": (0.6, 0.9), "eps": 1e-3}
    optimizer = NorMuon([p], unit_norm=unit_norm, max_grad_norm=max_grad_norm, **settings)
    for grad in grads:
        p.grad = grad.clone().to(device)
        optimizer.step()
        assert torch.equal(p.grad.cpu(), grad), "the gradient must be left as it was"
    scales = [min(1.0, (max_grad_norm or 1e9) / (grad.norm().item() + 1e-6)) for grad in grads]
    state = optimizer.state[p]
    expected = formulas(start, grads, unit_norm, scales=scales, **settings)
    for actual, true in zip((p, state["exp_avg"], state["row_sq"]), expected, strict=True):
        torch.testing.assert_close(actual.detach().cpu(), true, rtol=1e-6, atol=1e-7)
    assert expected[0].sub(start).norm() > 0.1


def test_it_keeps_one_moment_and_a_number_per_row():
    sae = SparseTopKSAE(4, 16, 2)
    optimizer = NorMuon(sae.parameter_groups())
    sae(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    sizes = {name: t.numel() for name, t in optimizer.state[sae.W_dec].items() if name != "step"}
    assert sizes == {"exp_avg": 64, "row_sq": 16}


def test_vectors_and_groups_that_are_not_orthogonal_have_adam(device):
    torch.manual_seed(0)
    one = SparseTopKSAE(4, 16, 2).to(device)
    two = copy.deepcopy(one)
    x = torch.randn(8, 4, device=device)
    settings = {"lr": 0.1, "betas": (0.7, 0.95)}
    groups = [{**group, "orthogonal": False} for group in one.parameter_groups()]
    optimizers = NorMuon(groups, **settings), UnitNormAdam(two.parameter_groups(), **settings)
    for _ in range(3):
        for sae, optimizer in zip((one, two), optimizers, strict=True):
            optimizer.zero_grad()
            (sae(x) - x).square().sum().backward()
            optimizer.step()
    for name, p in one.named_parameters():
        assert torch.equal(p, two.get_parameter(name)), name


def test_rows_split_among_processes_are_as_one(device):
    """The sum over shards of x xᵀ is all that they tell one another."""
    start, grads = matrix(12, 5, unit_norm=True), [ill_conditioned(12, 5, s) for s in range(3)]
    whole = start.clone().to(device).requires_grad_()
    parts = [part.clone().requires_grad_() for part in whole.detach().split([7, 5])]
    optimizers = [NorMuon([whole], lr=0.3, unit_norm=True)]
    shared = {}

    def sum_rows(gram):
        return shared["gram"]

    optimizers += [NorMuon([p], lr=0.3, unit_norm=True, sum_rows=sum_rows) for p in parts]

    def note(gram):
        shared["gram"] = gram
        return gram

    optimizers[0].sum_rows = note
    for grad in grads:
        whole.grad = grad.to(device)
        for part, own in zip(parts, whole.grad.split([7, 5]), strict=True):
            part.grad = own.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.cat(parts), whole)


def test_it_resumes_from_its_state_to_the_same_bits(device):
    start = matrix(9, 4, unit_norm=True, dtype=torch.float32).to(device)
    grads = [ill_conditioned(9, 4, seed).float().to(device) for seed in range(6)]

    def run(p, optimizer, grads):
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()

    straight, first = (start.clone().requires_grad_() for _ in range(2))
    run(straight, NorMuon([straight], lr=0.1, unit_norm=True), grads)
    stopped = NorMuon([first], lr=0.1, unit_norm=True)
    run(first, stopped, grads[:3])
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    second = first.detach().clone().requires_grad_()
    resumed = NorMuon([second], lr=0.7, unit_norm=True)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    run(second, resumed, grads[3:])
    assert torch.equal(second, straight)


def test_a_row_of_zeros_stays_until_it_has_a_gradient(device):
    """A pruned latent, also where another row's gradient is not zero."""
    p = matrix(6, 4, unit_norm=True).to(device)
    p[2] = 0
    p.requires_grad_()
    optimizer = NorMuon([p], lr=0.1, unit_norm=True)
    for seed in range(4):
        p.grad = ill_conditioned(6, 4, seed).to(device)
        if seed < 3:
            p.grad[2] = 0
        optimizer.step()
        torch.testing.assert_close(p[2].norm().item(), float(seed == 3))
        torch.testing.assert_close(p[[0, 1, 3, 4, 5]].norm(dim=1).cpu(), torch.ones(5).double())


def test_a_nan_reaches_the_weights_and_is_not_swallowed(device):
    """So that whoever checks weights sees it."""
    p = matrix(6, 4).to(device).requires_grad_()
    p.grad = ill_conditioned(6, 4, 0).to(device)
    p.grad[1, 2] = torch.nan
    NorMuon([p]).step()
    assert p.isnan().all()


def test_a_shadow_is_the_weight_rounded(device):
    shadows = Shadows(torch.float16)
    p = matrix(6, 300, dtype=torch.float32).to(device).requires_grad_()
    memory = shadows.of(p).data_ptr()
    optimizer = NorMuon([p], lr=0.1, shadows=shadows)
    p.grad = ill_conditioned(6, 300, 0).float().to(device)
    optimizer.step()
    assert torch.equal(shadows.to_write(p), p.half())
    assert shadows.of(p).data_ptr() == memory


def test_a_backward_after_the_step_is_refused(device):
    sae = SparseTopKSAE(4, 16, 2).to(device)
    optimizer = NorMuon(sae.parameter_groups())
    x = torch.randn(3, 4, device=device)
    early, late = sae(x).sum(), sae(x).sum()
    early.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_every_tensor_that_is_written_says_so(device):
    """Torch counts what is written in place; a kernel must count its own."""
    p = matrix(6, 4).to(device).requires_grad_()
    optimizer = NorMuon([p])
    versions = []
    for seed in range(2):
        p.grad = ill_conditioned(6, 4, seed).to(device)
        optimizer.step()
        state = optimizer.state[p]
        versions.append([p._version, state["exp_avg"]._version, state["row_sq"]._version])
    assert all(late > early for early, late in zip(*versions, strict=True))


def test_nothing_to_update_is_no_error(device):
    empty = torch.zeros(0, 3, device=device, requires_grad=True)
    empty.grad = torch.zeros_like(empty)
    NorMuon([empty], unit_norm=True, max_grad_norm=1.0).step()


@pytest.mark.parametrize("unit_norm", [True, False])
def test_the_gradient_may_have_any_strides(device, unit_norm):
    start, grad = matrix(6, 4, unit_norm), ill_conditioned(6, 4, 0)
    one, two = (start.clone().to(device).requires_grad_() for _ in range(2))
    one.grad, two.grad = grad.to(device), grad.T.contiguous().T.to(device)
    for p in (one, two):
        NorMuon([p], unit_norm=unit_norm, lr=0.1).step()
    torch.testing.assert_close(one, two)


def test_a_copy_sums_and_multiplies_as_the_first():
    p = torch.ones(3, 3, requires_grad=True)
    copied = copy.deepcopy(NorMuon([p], dtype=torch.bfloat16, sum_rows=torch.neg))
    assert (copied.dtype, copied.sum_rows) == (torch.bfloat16, torch.neg)
