"""`standardize` and `decode_error` on both backends against dense float64 mathematics.

Without a GPU the kernels run under Triton's interpreter: sizes are tiny, and tests of bfloat16, in
which the interpreter cannot calculate, are skipped.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_topk import torch_residuals, training_ops
from sparse_topk.triton_ops import moments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L, N, D, M, K = 2, 11, 12, 30, 5
EPS = 1e-5
low_precision = pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)


@pytest.fixture(autouse=True, scope="module")
def _poison():
    """An element that nobody writes is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1, device=DEVICE).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, params=["torch", "triton"], scope="module")
def backend(request):
    """Both, in blocks of 8 tokens, which are merged one at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_TOPK_BACKEND", request.param)
        patch.setattr(torch_residuals, "_BLOCK_BYTES", 8 * D * 4)
        patch.setattr(moments, "merge_blocks_tile", lambda: (1, 8, 1))
        yield request.param


def residuals(shape=(L, N, D), seed=0, offset=0.0, dtype=torch.float32):
    """x with a mean per layer and dimension, a center, and a mask that leaves out a third."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) + torch.randn(shape[0], 1, shape[2])
    center = torch.randn(shape[2], generator=generator).to(DEVICE)
    mask = torch.rand(shape[1], generator=generator) > 1 / 3
    return (x + offset).to(DEVICE, dtype), center, mask.to(DEVICE)


def codes(rows, d=D, k=K, seed=0, dtype=torch.float32):
    """values, indices, W, b."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, k, generator=generator).to(DEVICE, dtype)
    indices = torch.randint(M, (rows, k), generator=generator).to(DEVICE)
    W, b = torch.randn(M, d, generator=generator), torch.randn(d, generator=generator)
    return values, indices, W.to(DEVICE, dtype), b.to(DEVICE)


def doubles(*tensors):
    return tuple(None if t is None else t.cpu().double() for t in tensors)


def assert_rounds_only(ours, truth, magnitude, rounds=8):
    """|ours − truth| is at most `rounds` roundings of `magnitude` in float32 (float64 if `ours` and
    the inputs are), and one of the result."""
    error = (ours.cpu().double() - truth).abs()
    bound = rounds * magnitude + torch.finfo(ours.dtype).eps * truth.abs()
    if ours.dtype == torch.float16:
        bound = bound + 2**-24  # its smallest step, where it is subnormal
    assert (error <= bound).all(), f"{error.max()} where {bound.flatten()[error.argmax()]} is due"


def assert_moments(found, truth, per_element, eps):
    """Of vectors `truth` (L, N', D), each of whose elements may be off by `per_element`."""
    n_layers, n, d = truth.shape
    assert found.n_tokens.dtype == found.mean.dtype == found.sq_dev.dtype == torch.float64
    assert found.n_tokens.item() == n
    assert found.mean.shape == found.sq_dev.shape == (n_layers, d)
    mean = truth.sum(1) / max(n, 1)
    deviations = truth - mean[:, None]
    spread = deviations.abs().sum(1)
    assert_rounds_only(found.mean, mean, eps * spread + per_element.sum(1) / max(n, 1))
    off = (deviations.abs() * (per_element + eps * deviations.abs())).sum(1)
    # Blocks' sums are about a token of their own, which may be far from the mean.
    assert_rounds_only(found.sq_dev, deviations.square().sum(1), off + eps * spread.square())


def assert_standardizes(x, center, mask, dtype=torch.float32, eps=EPS):
    """All results, against float64."""
    centered, mean, std, found = training_ops.standardize(x, center, mask, dtype, eps)
    (n_layers, n, d), acc_dtype = x.shape, torch.promote_types(x.dtype, torch.float32)
    assert centered.shape == (n_layers * n, d)
    assert centered.dtype == dtype
    assert mean.shape == std.shape == (n_layers * n,)
    assert mean.dtype == std.dtype == acc_dtype
    x, center = doubles(x, torch.zeros(d) if center is None else center)
    keep = torch.ones(n, dtype=torch.bool) if mask is None else mask.cpu()
    ulp = torch.finfo(acc_dtype).eps
    centered, mean, std = centered.cpu().view(n_layers, n, d), mean.cpu(), std.cpu()
    mean, std = mean.view(n_layers, n), std.view(n_layers, n)
    assert not centered[:, ~keep].any()
    assert not mean[:, ~keep].any()
    assert (std[:, ~keep] == (eps is None)).all()
    kept = x[:, keep]
    true_mean = kept.mean(2, keepdim=True)
    true_std = ((kept - true_mean).square().sum(2, keepdim=True) / (d - 1)).sqrt()
    size = kept.abs().amax(2, keepdim=True)
    off = ulp * true_std + (ulp * size).square() / true_std  # it is about the rounded mean
    if eps is None:
        true_std, true_mean, off, size, eps = torch.ones_like(true_std), 0 * true_mean, 0, 0, 0
    scale = 1 / (true_std + eps)
    assert_rounds_only(mean[:, keep, None], true_mean, ulp * size, 2)
    assert_rounds_only(std[:, keep, None], true_std, off)
    standardized = (kept - true_mean) * scale
    off = ulp * (standardized.abs() + size * scale + center.abs())
    assert_rounds_only(centered[:, keep], standardized - center, off, 4)
    assert_moments(found, kept, 0 * kept, ulp)


def assert_decodes(code, x, mean, std, mask, eps=EPS):
    """All results, against float64."""
    error, sq_error, found = training_ops.decode_error(*code, x, mean, std, mask, eps)
    (n_layers, n, d), dtype = x.shape, code[2].dtype
    assert error.shape == (n_layers * n, d)
    assert error.dtype == dtype
    assert sq_error.shape == (n_layers,)
    assert sq_error.dtype == torch.float64
    values, _, W, b, x, mean, std = doubles(*code, x, mean, std)
    indices = code[1].cpu()
    b = torch.zeros(d, dtype=torch.float64) if b is None else b
    keep = torch.ones(n, dtype=torch.bool) if mask is None else mask.cpu()
    by_layer = lambda t: t.unflatten(0, (n_layers, n))[:, keep]  # noqa: E731
    mean, std = by_layer(mean[:, None]), by_layer(std[:, None])
    x_hat = by_layer((values[..., None] * W[indices]).sum(1) + b)
    size = by_layer((values[..., None] * W[indices]).abs().sum(1) + b.abs())
    missed = x[:, keep] - x_hat * std - mean
    size = (x[:, keep] - mean).abs() + size * std
    ulp = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * indices.shape[1]
    scale = 1 / (std + (eps or 0))
    error = error.cpu().view(n_layers, n, d)
    assert not error[:, ~keep].any()
    assert_rounds_only(error[:, keep], missed * scale, ulp * size * scale, 2)
    assert_rounds_only(
        sq_error, missed.square().sum((1, 2)), (ulp * size * missed.abs()).sum((1, 2))
    )
    assert_moments(found, missed * scale, ulp * size * scale, ulp)


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


def flat(results):
    return [u for t in results for u in ([t] if isinstance(t, torch.Tensor) else t)]


def run_all(x, center, mask, eps=EPS, code=None):
    """The results of both ops, one after the other."""
    code = codes(len(x) * x.shape[1], x.shape[2]) if code is None else code
    before = training_ops.standardize(x, center, mask, torch.float32, eps)
    after = training_ops.decode_error(*code, x, *before[1:3], mask, eps)
    return flat((*before, *after))


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
