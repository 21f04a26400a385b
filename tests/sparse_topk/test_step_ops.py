"""`decode_backward`, `note_active_` and `merge_moments` on both backends, by hand.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_topk import training_ops
from sparse_topk.torch_residuals import TokenMoments
from tests.helpers.precision import low_precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L, N, D, M, K = 3, 7, 20, 30, 5
pytestmark = pytest.mark.usefixtures("poison", "backend")


def inputs(k=K, d=D, dtype=torch.float32, seed=0):
    """error, indices, W, values (some 0), std, factor."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(L * N, d, generator=generator)
    W = torch.randn(M, d, generator=generator)
    scores = torch.randn(L * N, M, generator=generator)
    values, indices = scores.topk(k)
    std = torch.rand(L * N, generator=generator) * 3
    factor = torch.rand(L, generator=generator, dtype=torch.float64) * 1e-4
    values = values.where(torch.rand(values.shape, generator=generator) > 0.3, 0).relu()
    error, W, values = (t.to(DEVICE, dtype) for t in (error, W, values))
    return error, indices.to(DEVICE), W, values, std.to(DEVICE), factor.to(DEVICE)


def by_hand(error, indices, W, values, std, factor, eps):
    """The same in float64, one token after the other."""
    d_scores = torch.zeros(indices.shape, dtype=torch.float64)
    scaled, scale = torch.zeros_like(d_scores), torch.zeros(len(error), dtype=torch.float64)
    error, W, values, std = (t.double().cpu() for t in (error, W, values, std))
    for n in range(len(error)):
        gain = std[n] * (std[n] + eps) if eps is not None else std[n]
        scale[n] = -2 * factor[n // N].cpu() * gain
        for j, m in enumerate(indices[n].tolist()):
            scaled[n, j] = scale[n] * values[n, j]
            if not values[n, j] <= 0:
                d_scores[n, j] = scale[n] * (error[n] @ W[m])
    return d_scores, scaled, scale


@pytest.mark.parametrize("eps", [1e-5, 0.5, None])
@pytest.mark.parametrize(("k", "d"), [(1, 20), (5, 33), (30, 8)])
def test_the_gradient_of_the_scores(eps, k, d):
    arguments = inputs(k, d)
    assert (arguments[3] == 0).any()
    found = training_ops.decode_backward(*arguments, eps)
    for one, expected in zip(found, by_hand(*arguments, eps), strict=True):
        torch.testing.assert_close(one.double().cpu(), expected, rtol=2e-5, atol=1e-9)
        assert one.dtype == torch.float32


@low_precision
def test_sums_are_not_in_half_precision(dtype):
    """The results are rounded once: scales of a real step are near 1e-5."""
    arguments = inputs(d=300, dtype=dtype)
    found = training_ops.decode_backward(*arguments, 1e-5)
    for one, expected in zip(found, by_hand(*arguments, 1e-5), strict=True):
        assert one.dtype == dtype
        bound = 4 * torch.finfo(dtype).eps * expected.abs().max() + 1e-7
        assert (one.double().cpu() - expected).abs().max() <= bound


def test_a_value_that_is_nan_passes_its_gradient_on():
    arguments = list(inputs())
    arguments[3][4, 2] = float("nan")
    d_scores, scaled, _ = training_ops.decode_backward(*arguments, 1e-5)
    assert d_scores[4, 2] != 0
    assert d_scores[4, 2].isfinite()
    assert scaled[4, 2].isnan()
    assert d_scores.isfinite().all()


@pytest.mark.parametrize("masked", [True, False])
@given(seed=st.integers(0, 2**31), threshold=st.sampled_from([0.0, 0.5, 1e9]))
@settings(max_examples=8, deadline=None)
def test_the_latents_above_the_threshold_are_noted(masked, seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(L * N, K, generator=generator)
    values[0, 0] = float("nan")
    indices = torch.rand(L * N, M, generator=generator).topk(K).indices
    mask = torch.rand(N, generator=generator) > 0.5 if masked else None
    last = torch.arange(M)
    expected = last.clone()
    for n in range(L * N):
        for value, m in zip(values[n].tolist(), indices[n].tolist(), strict=True):
            if value > threshold and (mask is None or mask[n % N]):
                expected[m] = 2**40
    found = last.to(DEVICE)
    on_device = None if mask is None else mask.to(DEVICE)
    arguments = values.to(DEVICE), indices.to(DEVICE), on_device, threshold, 2**40
    training_ops.note_active_(found, *arguments)
    assert torch.equal(found.cpu(), expected)


def moments_of(x):
    mean = x.mean(1) if x.shape[1] else torch.zeros(len(x), x.shape[2], dtype=x.dtype)
    sq_dev = (x - mean[:, None]).square().sum(1)
    n_tokens = torch.tensor(float(x.shape[1]), dtype=torch.float64)
    return TokenMoments(*(t.to(DEVICE) for t in (n_tokens, mean, sq_dev)))


@pytest.mark.parametrize(("n", "m"), [(5, 9), (1, 1), (0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("d", [3, 300])
def test_merged_moments_are_those_of_all_tokens(n, m, d):
    """Of a mean far from 0 too."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(L, n + m, d, generator=generator, dtype=torch.float64) + 1e6
    merged = training_ops.merge_moments(moments_of(x[:, :n]), moments_of(x[:, n:]))
    for one, expected in zip(merged, moments_of(x), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


def test_nothing_is_computed_of_fake_tensors():
    with FakeTensorMode():
        half, ids = torch.empty(L * N, K, dtype=torch.bfloat16), torch.empty(L * N, K).long()
        error, W = torch.empty(L * N, D, dtype=torch.bfloat16), torch.empty(M, D).bfloat16()
        factor, std = torch.empty(L, dtype=torch.float64), torch.empty(L * N)
        results = training_ops.decode_backward(error, ids, W, half, std, factor, 1e-5)
        assert [tuple(t.shape) for t in results] == [(L * N, K), (L * N, K), (L * N,)]
        assert {t.dtype for t in results} == {torch.bfloat16}
        training_ops.note_active_(torch.empty(M).long(), half, ids, None, 0.0, 1)
        moments = TokenMoments(factor[0], factor[:, None], factor[:, None])
        assert training_ops.merge_moments(moments, moments).mean.shape == (L, 1)
