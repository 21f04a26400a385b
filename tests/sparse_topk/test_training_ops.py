"""`standardize` and `decode_error` on both backends against dense float64 mathematics.

Without a GPU the kernels run under Triton's interpreter: sizes are tiny, and tests of bfloat16, in
which the interpreter cannot calculate, are skipped.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_topk import training_ops
from sparse_topk.triton_ops import moments
from tests.helpers.precision import low_precision
from tests.helpers.residual_ops import (
    DEVICE,
    EPS,
    L,
    N,
    assert_decodes,
    assert_standardizes,
    codes,
    flat,
    residuals,
    run_all,
)

pytestmark = pytest.mark.usefixtures("poison", "backend", "small_blocks")


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 20), st.integers(2, 20)),
    offset=st.sampled_from([0.0, 5.0, -1e4]),
    masked=st.booleans(),
    centered=st.booleans(),
    eps=st.sampled_from([EPS, 0.5, None]),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=15)
def test_standardize_equals_its_definition(shape, offset, masked, centered, eps, seed):
    """Also where means are 10⁴ times the spread."""
    x, center, mask = residuals(shape, seed, offset)
    assert_standardizes(x, center if centered else None, mask if masked else None, eps=eps)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 20), st.integers(2, 20)),
    k=st.integers(1, 19),
    offset=st.sampled_from([0.0, -1e4]),
    masked=st.booleans(),
    bias=st.booleans(),
    eps=st.sampled_from([EPS, 0.5, None]),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=15)
def test_decode_error_equals_its_definition(shape, k, offset, masked, bias, eps, seed):
    x, center, mask = residuals(shape, seed, offset)
    mask = mask if masked else None
    _, mean, std, _ = training_ops.standardize(x, center, mask, x.dtype, eps)
    *code, b = codes(shape[0] * shape[1], shape[2], k, seed)
    assert_decodes((*code, b if bias else None), x, mean, std, mask, eps)


@pytest.mark.parametrize("d", [256, 300])
def test_several_blocks_of_columns(d):
    x, center, mask = residuals((1, 4, d))
    assert_standardizes(x, center, mask)
    _, mean, std, _ = training_ops.standardize(x, center, mask, x.dtype, EPS)
    assert_decodes(codes(4, d), x, mean, std, mask)


@low_precision
def test_residuals_in_half_precision(dtype):
    x, center, mask = residuals(offset=3.0, dtype=dtype)
    assert_standardizes(x, center, mask, dtype)
    assert_standardizes(x, center, None, torch.float32)
    _, mean, std, _ = training_ops.standardize(x, center, mask, dtype, EPS)
    assert_decodes(codes(L * N, dtype=dtype), x, mean, std, mask)
    assert_decodes(codes(L * N), x, mean, std, None)


def test_residuals_in_float64():
    x, center, mask = residuals(offset=3.0, dtype=torch.float64)
    assert_standardizes(x, center, mask, torch.float64)
    assert_standardizes(x, center, mask, torch.float32)
    _, mean, std, _ = training_ops.standardize(x, center, mask, torch.float64, EPS)
    assert_decodes(codes(L * N, dtype=torch.float64), x, mean, std, mask)
    assert_decodes(codes(L * N), x, mean, std, None)


def test_a_given_x_hat_is_the_same_as_the_codes():
    x, center, mask = residuals()
    _, mean, std, _ = training_ops.standardize(x, center, mask, torch.float32, EPS)
    values, indices, W, b = codes(L * N)
    decoded = training_ops.decode_error(values, indices, W, b, x, mean, std, mask, EPS)
    x_hat = ((values[..., None] * W[indices]).double().sum(1) + b.double()).float()
    for eps in (EPS, None):
        decoded = training_ops.decode_error(values, indices, W, b, x, mean, std, mask, eps)
        given_ = training_ops.reconstruction_error(x_hat, x, mean, std, mask, eps)
        for ours, expected in zip(flat(given_), flat(decoded), strict=True):
            assert ours.dtype == expected.dtype
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time():
    x, center, mask = residuals()
    for again, first in zip(run_all(x, center, mask), run_all(x, center, mask), strict=True):
        assert torch.equal(again, first)


def test_views_that_are_not_contiguous():
    x, center, mask = residuals()
    due = run_all(x, center, mask)
    strided = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in (x, center, mask)]
    values, indices, W, b = codes(L * N)
    code = (values.T.contiguous().T, indices.T.contiguous().T, W.T.contiguous().T, b)
    assert not any(t.is_contiguous() for t in (*strided, *code[:3]))
    for ours, expected in zip(run_all(*strided, code=code), due, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@low_precision
def test_one_call_each_and_fake_tensors_of_the_right_kind(dtype):
    x, center, mask = residuals(dtype=dtype)
    code = codes(L * N)

    def results(x, center, mask, *code):
        before = training_ops.standardize(x, center, mask, torch.float16, EPS)
        after = training_ops.decode_error(*code, x, *before[1:3], mask, EPS)
        x_hat = torch.empty_like(before[0])
        given_ = training_ops.reconstruction_error(x_hat, x, *before[1:3], mask, EPS)
        return flat((*before, *after, *given_))

    with Calls() as calls:
        real = results(x, center, mask, *code)
    names = ("standardize", "decode_error", "reconstruction_error")
    ours = [name for name in calls.names if name.startswith("sparse_topk")]
    assert ours == [f"sparse_topk.{name}.default" for name in names]
    assert len(calls.names) <= 4
    with FakeTensorMode() as mode:
        fake = results(*map(mode.from_tensor, (x, center, mask, *code)))
    for pretended, computed in zip(fake, real, strict=True):
        assert pretended.shape == computed.shape
        assert pretended.dtype == computed.dtype
        assert pretended.device == computed.device
        assert pretended.stride() == computed.stride()


def test_under_torch_compile():
    x, center, mask = residuals()
    compiled = torch.compile(run_all, backend="eager", fullgraph=True)
    code = codes(L * N)
    for ours, expected in zip(
        compiled(x, center, mask, code=code), run_all(x, center, mask, code=code), strict=True
    ):
        assert torch.equal(ours, expected)


def test_blocks_of_tokens():
    """Enough of them to fill a GPU; powers of two, and between 8 and the most."""
    assert moments.block_length(0, 64) == moments.block_length(4096 * 8, 64) == 8
    assert moments.block_length(98304 * 2, 64) == 32
    assert moments.block_length(10**7, 64) == 64


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [512, 770, 2048, 8192])
def test_real_sizes(dtype, d):
    x, center, mask = residuals((2, 3000, d), offset=10.0, dtype=dtype)
    assert_standardizes(x, center, mask, dtype)
    _, mean, std, _ = training_ops.standardize(x, center, mask, dtype, EPS)
    assert_decodes(codes(6000, d, 32, dtype=dtype), x, mean, std, mask)


@pytest.mark.gpu
def test_residuals_far_beyond_two_to_the_31():
    n = 2**17 + 3
    x = torch.zeros(8, n, 2048, dtype=torch.bfloat16, device=DEVICE)
    x[-1, -1, ::2] = 2
    centered, mean, std, found = training_ops.standardize(x, None, None, x.dtype, EPS)
    assert mean[-1] == 1
    assert centered[-1, ::2].sum() == 1024
    assert not centered[:-1].any()
    assert found.mean[-1, 0] == 2 / n
    x_hat = torch.zeros_like(centered)
    error, sq_error, _ = training_ops.reconstruction_error(x_hat, x, mean, std, None, EPS)
    assert error[-1, ::2].sum() == 1024
    assert sq_error[-1] == 2048
