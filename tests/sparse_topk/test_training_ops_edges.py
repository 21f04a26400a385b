"""`standardize` and `decode_error` on both backends where tokens are masked, values are not finite,
or there is next to nothing to sum.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token.
"""

import math

import pytest
import torch

from sparse_topk import training_ops
from tests.helpers.residual_ops import (
    DEVICE,
    EPS,
    D,
    K,
    L,
    N,
    assert_standardizes,
    codes,
    residuals,
    run_all,
)

pytestmark = pytest.mark.usefixtures("poison", "backend", "small_blocks")


@pytest.mark.parametrize("eps", [EPS, None])
def test_what_is_masked_does_not_matter(eps):
    """Whatever it is, the results are the same bits; all other tokens' are those without it."""
    x, center, mask = residuals()
    due = run_all(x, center, mask, eps)
    x[:, ~mask] = math.nan
    x[0, ~mask, 2:] = math.inf
    for ours, expected in zip(run_all(x, center, mask, eps), due, strict=True):
        assert torch.equal(ours, expected)
    *code, b = codes(L * N)
    kept = [t.view(L, N, K)[:, mask].flatten(0, 1) for t in code[:2]]
    dropped = run_all(x[:, mask], center, None, eps, (*kept, code[2], b))
    for ours, expected in zip(due, dropped, strict=True):
        if ours.shape[:1] == (L * N,):
            assert torch.equal(ours.view(L, N, -1)[:, mask].flatten(), expected.flatten())
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter: ∞ − ∞
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 9])
def test_what_is_kept_and_not_finite_shows(poison, place):
    """In its own row and in what is summed over tokens, wherever in a block it is; in no other."""
    x, center, mask = residuals()
    mask[place] = True
    good = run_all(x, center, mask)
    x[1, place, 3] = poison
    centered, mean, std, _, x_mean, x_sq_dev, error, sq_error, _, e_mean, e_sq_dev = run_all(
        x, center, mask
    )
    row = N + place  # of (L·N)
    assert centered[row].isnan().all()
    assert error[row].isnan().all()
    assert std[row].isnan()
    assert not mean[row].isfinite()
    for ours, expected in ((centered, good[0]), (error, good[6])):
        others = torch.arange(L * N, device=DEVICE) != row
        assert torch.equal(ours[others], expected[others])
    assert sq_error.isfinite().tolist() == [True, False]
    assert x_sq_dev.isnan().nonzero().tolist() == [[1, 3]]
    assert (~x_mean.isfinite()).nonzero().tolist() == [[1, 3]]
    for of_error in (e_mean, e_sq_dev):
        assert (~of_error.isfinite()).nonzero().tolist() == [[1, d] for d in range(D)]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("which", ["values", "W", "b"])
def test_codes_that_are_not_finite_show(which):
    x, center, mask = residuals()
    mask[4], mask[5] = False, True
    values, indices, W, b = codes(L * N)
    indices[:, 0] = torch.arange(L * N, device=DEVICE) % N
    {"values": values[4], "W": W[5], "b": b}[which][0] = math.nan
    *_, error, sq_error, _, e_mean, _ = run_all(x, center, mask, code=(values, indices, W, b))
    error = error.view(L, N, D)
    assert not error[:, ~mask].any()
    if which == "values":  # of a masked token
        assert error.isfinite().all()
        assert sq_error.isfinite().all()
    else:
        assert sq_error.isnan().all()
        assert e_mean[:, 0].isnan().all()
        assert e_mean[:, 1:].isfinite().all()


@pytest.mark.parametrize("n", [0, 1, 8])
@pytest.mark.parametrize("kept", [True, False])
def test_no_token_and_one_token(n, kept):
    x, center, _ = residuals((L, n, D))
    mask = torch.full((n,), kept, device=DEVICE)
    assert_standardizes(x, center, mask)
    results = run_all(x, center, mask)
    assert all(t.isfinite().all() for t in results)
    if n == 0 or not kept:
        centered, _, _, n_tokens, *others = results
        assert not n_tokens
        assert not centered.any()
        assert not any(t.any() for t in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("d", [12, 100, 128])
def test_a_constant_vector_is_exact(d, dtype):
    """σ = 0, so it becomes −center, and x̂ is the constant. The constants are no round numbers."""
    x, center, _ = residuals((1, 10, d), dtype=dtype)
    x[:] = x[:, :, :1] / 3
    centered, mean, std, _ = training_ops.standardize(x, center, None, torch.float32, EPS)
    assert torch.equal(mean.to(dtype), x[0, :, 0])
    assert not std.any()
    assert (centered == -center).all()
    error, sq_error, _ = training_ops.decode_error(*codes(10, d), x, mean, std, None, EPS)
    assert not error.any()
    assert not sq_error.any()


def test_equal_tokens_have_no_spread():
    """Not even a negative one, of a rounding."""
    x, center, mask = residuals((1, N, D), offset=1e4)
    x[:] = x[:, :1] / 3
    *_, found = training_ops.standardize(x, center, mask, torch.float32, EPS)
    assert (found.sq_dev >= 0).all()
    assert (found.sq_dev <= 1e-12 * x.double().square().sum(1)).all()


def test_a_first_token_far_from_the_others_costs_little():
    """Moments are summed about it: the bound grows with the tokens in a block, not with how far."""
    x, center, _ = residuals()
    x[:, ::8] *= 1e6
    *_, found = training_ops.standardize(x, center, None, torch.float32, EPS)
    x = x.double()
    truth = (x - x.mean(1, keepdim=True)).square().sum(1)
    assert ((found.sq_dev / truth - 1).abs() <= 8 * 2**-23).all()
