"""Adam in Triton against its formulas in float64.

Legend: D inputs, M latents.
"""

import math

import pytest
import torch

from sparse_topk import torch_ops
from sparse_topk.triton_ops import adam as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {"lr": 0.03, "betas": (0.9, 0.999), "eps": 6.25e-10}
STEPS = 4


def start(shape, unit_norm=False, dtype=torch.float32, seed=0):
    """Weight and the gradients of a few steps, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if unit_norm:
        weight /= weight.norm(dim=1, keepdim=True)
    return weight.to(dtype), [
        torch.randn(shape, generator=generator).to(dtype) for _ in range(STEPS)
    ]


def formulas(weight, grads, unit_norm, scale=1.0, *, lr, betas, eps):
    """The oracle: weight, exp_avg and exp_avg_sq after the steps, in float64."""
    w = weight.double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step, grad in enumerate(grads, 1):
        g = grad.double() * scale
        if unit_norm:
            g = g - (g * w).sum(1, keepdim=True) * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        w = w - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        if unit_norm:
            w = w / w.norm(dim=1, keepdim=True)
    return w, m, v


def run(module, weight, grads, unit_norm, device=DEVICE, scale=None, shadow=None, **settings):
    """Weight, exp_avg and exp_avg_sq after the steps, by the module's op, on the CPU."""
    w = weight.clone().to(device)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    grad_scale = None if scale is None else torch.tensor(scale, device=device)
    for step, grad in enumerate(grads, 1):
        g = grad.to(device)
        module.adam_unit_norm_(
            w, g, m, v, step, unit_norm=unit_norm, grad_scale=grad_scale, shadow=shadow, **settings
        )
        assert torch.equal(g.cpu().nan_to_num(), grad.nan_to_num()), "the gradient was written to"
    return w.cpu(), m.cpu(), v.cpu()


def assert_errs_as_torch(weight, grads, unit_norm, scale=None, **settings):
    settings = SETTINGS | settings
    truth = formulas(weight, grads, unit_norm, 1.0 if scale is None else scale, **settings)
    ours = run(ops, weight, grads, unit_norm, scale=scale, **settings)
    plain = run(torch_ops, weight, grads, unit_norm, "cpu", scale=scale, **settings)
    for actual, torchs, true in zip(ours, plain, truth, strict=True):
        due = (torchs.double() - true).norm() + torch.finfo(weight.dtype).eps * true.norm()
        assert (actual.double() - true).norm() <= 3 * due
    if unit_norm:
        torch.testing.assert_close(ours[0].norm(dim=1), torch.ones(len(weight)))


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 1), (2, 256), (2, 300), (0, 3)])
def test_on_the_sphere(shape, scale):
    """D a power of two or not, one row, one column, no row."""
    assert_errs_as_torch(*start(shape, unit_norm=True), unit_norm=True, scale=scale)


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (1500,), (1024,), (0,)])
def test_off_the_sphere(shape, scale):
    """Any shape: within one block, exactly one block, and more than one."""
    assert_errs_as_torch(*start(shape), unit_norm=False, scale=scale)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter: 0 / 0
@pytest.mark.parametrize("unit_norm", [True, False])
def test_other_settings(unit_norm):
    weight, grads = start((3, 6), unit_norm)
    assert_errs_as_torch(weight, grads, unit_norm, lr=0.5, betas=(0.0, 0.5), eps=0.1)
    assert_errs_as_torch(weight, grads, unit_norm, eps=0.0)


@pytest.mark.parametrize("unit_norm", [True, False])
def test_late_steps_are_hardly_corrected(unit_norm):
    """At step 10 000 both bias corrections are nearly 1: lr · m / (√v + eps)."""
    weight, (grad, *_) = start((2, 6), unit_norm)
    w, m, v = weight.clone().to(DEVICE), torch.zeros(2, 6), torch.ones(2, 6)
    m, v = m.to(DEVICE), v.to(DEVICE)
    ops.adam_unit_norm_(w, grad.to(DEVICE), m, v, 10_000, unit_norm=unit_norm, **SETTINGS)
    g = grad - (grad * weight).sum(1, keepdim=True) * weight if unit_norm else grad
    expected = weight - 0.03 * 0.1 * g / (0.999 + 0.001 * g**2).sqrt() / (1 - 0.999**1e4) ** -0.5
    if unit_norm:
        expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(w.cpu(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_the_shadow_is_the_weight_rounded(unit_norm, dtype):
    weight, grads = start((3, 300), unit_norm)
    shadow = torch.full((3, 300), math.nan, dtype=dtype, device=DEVICE)
    ours = run(ops, weight, grads, unit_norm, shadow=shadow, **SETTINGS)
    assert torch.equal(shadow.cpu(), ours[0].to(dtype))
    alone = run(ops, weight, grads, unit_norm, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_low_precision_rounds_once_a_step(unit_norm, dtype):
    """Weight, gradient and moments are in half precision, the arithmetic between in float32."""
    weight, grads = start((3, 40), unit_norm, dtype)
    settings = SETTINGS | {"eps": 1e-2}
    ours = run(ops, weight, grads[:1], unit_norm, **settings)
    for actual, true in zip(ours, formulas(weight, grads[:1], unit_norm, **settings), strict=True):
        bound = torch.finfo(dtype).eps * true.abs() + 1e-6
        assert ((actual.double() - true).abs() <= bound).all()


def test_a_nan_stays_in_its_row():
    weight, (grad, *_) = start((3, 6), unit_norm=True)
    grad[1, 2] = math.nan
    ours = run(ops, weight, [grad], True, **SETTINGS)[0]
    assert ours.isnan().all(1).tolist() == [False, True, False]
    assert ours.isnan().any(1).tolist() == [False, True, False]


def test_a_gradient_that_is_not_contiguous():
    weight, (grad, *_) = start((3, 6), unit_norm=True)
    transposed = grad.T.contiguous().T
    assert not transposed.is_contiguous()
    for unit_norm in (True, False):
        expected = run(ops, weight, [grad], unit_norm, **SETTINGS)
        actual = run(ops, weight, [transposed], unit_norm, **SETTINGS)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_tensor_that_cannot_be_written_is_named():
    good = torch.zeros(3, 6, device=DEVICE)
    bad = torch.zeros(6, 3, device=DEVICE).T
    for i, name in ((0, "weight"), (2, "exp_avg"), (3, "exp_avg_sq"), (4, "shadow")):
        tensors = [good.clone() for _ in range(5)]
        tensors[i] = bad
        with pytest.raises(
            ValueError, match=rf"{name} must be contiguous, got the strides \(1, 3\)"
        ):
            ops.adam_unit_norm_(*tensors[:4], 1, unit_norm=True, shadow=tensors[4], **SETTINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [512, 770, 2048, 16384])
def test_real_sizes(d):
    weight, grads = start((64, d), unit_norm=True)
    assert_errs_as_torch(weight, grads, unit_norm=True)
    assert_errs_as_torch(weight, grads, unit_norm=False)
    once, twice = (run(ops, weight, grads, True, **SETTINGS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
