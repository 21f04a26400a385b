"""The sparse products in Triton against dense float64 mathematics.

Without a GPU the kernels run under Triton's interpreter: sizes are tiny, and tests of bfloat16, in
which the interpreter cannot calculate, are skipped.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_topk import torch_ops
from sparse_topk.triton_ops import sparse as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("poison")


def random_case(n, d, m, k, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator).to(DEVICE, dtype)
    W = torch.randn(m, d, generator=generator).to(DEVICE, dtype)
    values = torch.randn(n, k, generator=generator).to(DEVICE, dtype)
    indices = torch.rand(n, m, generator=generator).topk(k).indices.sort(1).values
    return x, W, values, indices.to(DEVICE)


def dense(values, indices, n_latents):
    """The codes as a float64 (N, M); values of a latent that a token chose twice are summed."""
    zeros = torch.zeros(len(values), n_latents, dtype=torch.float64)
    return zeros.scatter_add(1, indices.cpu(), values.cpu().double())


def assert_rounds_only(ours, truth, magnitude, terms):
    """|ours − truth| is at most what rounding can do: once to the result's dtype, and once per term
    in the dtype of the sum. `magnitude` is the sum of the terms' absolute values."""
    inner = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    bound = torch.finfo(ours.dtype).eps * truth.abs() + (terms + 2) * inner * magnitude
    if ours.dtype == torch.float16:
        bound += 2**-24  # its smallest step, where it is subnormal
    error = (ours.cpu().double() - truth).abs()
    assert (error <= bound).all(), f"{error.max()} where {bound.flatten()[error.argmax()]} is due"


def assert_equal_dense(x, W, values, indices):
    """All three products against their dense equivalents in float64."""
    n, k = indices.shape
    m, d = W.shape
    codes, rows, tokens = dense(values, indices, m), W.cpu().double(), x.cpu().double()
    sizes = dense(values.abs(), indices, m)
    summed = ops.gather_sum(values, indices, W)
    assert summed.shape == (n, d)
    assert summed.dtype == W.dtype
    assert_rounds_only(summed, codes @ rows, sizes @ rows.abs(), k)
    dots = ops.gather_dot(x, indices, W)
    assert dots.shape == (n, k)
    assert dots.dtype == x.dtype
    truth, magnitude = tokens @ rows.T, tokens.abs() @ rows.abs().T
    assert_rounds_only(dots, truth.gather(1, indices.cpu()), magnitude.gather(1, indices.cpu()), d)
    outer = ops.scatter_outer(values, ops.csc_by_latent(indices, m), x)
    assert outer.shape == (m, d)
    assert outer.dtype == x.dtype
    assert_rounds_only(outer, codes.T @ tokens, sizes.T @ tokens.abs(), n)


@given(n=st.integers(0, 4), d=st.integers(1, 20), m=st.integers(1, 20), seed=st.integers(0, 2**20))
@settings(deadline=None, max_examples=15)
def test_products_equal_dense_ones(n, d, m, seed):
    k = 1 + seed % m
    assert_equal_dense(*random_case(n, d, m, k, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("d", [256, 300, 513])
def test_several_blocks_of_columns(d, dtype):
    """A block is 64, 128, 256, … columns: D is a multiple of one, or not."""
    assert_equal_dense(*random_case(3, d, 12, 5, dtype=dtype))


@pytest.mark.parametrize("k", [1, 7, 8, 9, 17, 40])
def test_any_k(k):
    """One latent, all latents, and numbers that ROWS divides or does not."""
    assert_equal_dense(*random_case(2, 8, 40, k))


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("shape", [(40, 1, 2), (40, 3, 8), (7, 5, 30)])
def test_latents_of_many_tokens_are_summed_in_chunks(monkeypatch, chunk, shape):
    """Latent 1 is chosen by all tokens, and begins and ends within a chunk; most by none."""
    monkeypatch.setattr(ops, "CHUNK", chunk)
    n, k, m = shape
    x, W, values, indices = random_case(n, 8, m, k)
    indices[:, 0] = 1
    indices[: n // 4, -1] = 0
    counts = indices.flatten().bincount(minlength=m)
    assert counts.max() >= 7
    assert_equal_dense(x, W, values, indices)
    outer = ops.scatter_outer(values, ops.csc_by_latent(indices, m), x)
    assert (outer[counts == 0] == 0).all()


@given(
    choices=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    chunk=st.sampled_from([1, 2, 4, 8]),
)
@settings(deadline=None, max_examples=25)
def test_any_runs_in_any_chunks(choices, chunk):
    """Every selection is counted once, whatever the runs. Integers, so that every sum is exact."""
    indices = torch.tensor(choices, device=DEVICE)[:, None]
    n = len(choices)
    x = torch.arange(1.0, n + 1, device=DEVICE)[:, None]
    values = 2 * torch.ones(n, 1, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "CHUNK", chunk)
        ours = ops.scatter_outer(values, ops.csc_by_latent(indices, 7), x)
    assert torch.equal(ours.cpu().double(), dense(values, indices, 7).T @ x.cpu().double())


def test_a_chunk_of_the_default_length():
    x, W, values, indices = random_case(3 * ops.CHUNK, 4, 3, 2)
    assert_equal_dense(x, W, values, indices)


def test_many_selections_make_longer_chunks_not_more_memory():
    assert ops.chunk_length(65536 * 32, 2048) == ops.CHUNK
    for selections, d in ((65536 * 1024, 2048), (2**24, 5000)):
        chunk = ops.chunk_length(selections, d)
        assert chunk.bit_count() == 1
        assert selections // chunk * d * 4 <= 256 * 2**20 < selections // (chunk // 2) * d * 4
    assert ops.chunk_length(0, 8) == ops.CHUNK


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter: ∞ · 0
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_values_that_are_not_finite_stay_in_their_rows(k, poison):
    """Lanes beyond K and beyond a run load latent 0 and token 0, which must not leak."""
    x, W, values, indices = random_case(6, 5, 9, k)
    indices = indices % 8 + 1
    indices[4, 0] = 0
    W[0, 2] = poison
    summed, dots = ops.gather_sum(values, indices, W), ops.gather_dot(x, indices, W)
    assert (~summed.isfinite()).nonzero().tolist() == [[4, 2]]
    assert (~dots.isfinite()).nonzero().tolist() == [[4, 0]]
    x[0, 1] = poison
    outer = ops.scatter_outer(values, ops.csc_by_latent(indices, 9), x)
    chosen = indices[0].unique().tolist()
    assert (~outer.isfinite()).nonzero().tolist() == [[m, 1] for m in chosen]
    values[5] = poison
    assert (~ops.gather_sum(values, indices, W)[5].isfinite()).all()


@pytest.mark.parametrize(
    "low", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_two_dtypes_at_once(low):
    """float32 values with a low-precision weight, and the reverse; the sum is in float32."""
    x, W, values, indices = random_case(4, 40, 30, 6)
    assert_equal_dense(x, W.to(low), values, indices)
    assert_equal_dense(x.to(low), W, values.to(low), indices)


def test_views_that_are_not_contiguous():
    x, W, values, indices = random_case(6, 4, 9, 3)
    wide = W.T.contiguous().T
    tall = x.T.contiguous().T
    strided_values = values.repeat_interleave(2, dim=1)[:, ::2]
    strided_indices = indices.repeat_interleave(2, dim=1)[:, ::2]
    assert not any(t.is_contiguous() for t in (wide, tall, strided_values, strided_indices))
    assert_equal_dense(tall, wide, strided_values, strided_indices)
    assert_equal_dense(torch.ones((), device=DEVICE).expand(6, 4), W, values, indices)


def test_rows_far_beyond_two_to_the_31(monkeypatch):
    """The last rows of a weight of 2³¹ + 4096 elements, of which a CPU holds only these."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    W = torch.empty(2**20 + 2, 2048, dtype=torch.float16, device=DEVICE)
    W[-1], W[-2] = 3, 4
    indices = torch.tensor([[2**20, 2**20 + 1]], device=DEVICE)
    values = torch.tensor([[1.0, 2.0]], device=DEVICE)
    assert (ops.gather_sum(values, indices, W) == 10).all()
    x = torch.ones(1, 2048, device=DEVICE)
    assert ops.gather_dot(x, indices, W).tolist() == [[4 * 2048.0, 3 * 2048.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [512, 770, 2048])
def test_real_sizes_err_no_more_than_torch(dtype, d):
    """Against plain torch on the same device; and the same bits every time."""
    x, W, values, indices = random_case(2048, d, 8192, 32, dtype=dtype)
    indices[: 2048 // 3, 0] = 0
    csc = ops.csc_by_latent(indices, 8192)
    codes, rows, tokens = dense(values, indices, 8192), W.cpu().double(), x.cpu().double()
    dots = (tokens @ rows.T).gather(1, indices.cpu())
    for op, arguments, truth in (
        ("gather_sum", (values, indices, W), codes @ rows),
        ("gather_dot", (x, indices, W), dots),
        ("scatter_outer", (values, csc, x), codes.T @ tokens),
    ):
        ours = getattr(ops, op)(*arguments)
        plain = getattr(torch_ops, op)(*arguments)
        error, due = ((t.cpu().double() - truth).norm() for t in (ours, plain))
        assert error <= 2 * due, op
        assert torch.equal(getattr(ops, op)(*arguments), ours), op


@pytest.mark.gpu
def test_gradients_far_beyond_two_to_the_31():
    """dW has 2³¹ + 4096 elements: the last latent's row is in place, all others are zero."""
    x = torch.ones(3, 2048, dtype=torch.bfloat16, device=DEVICE)
    indices = torch.full((3, 1), 2**20 + 1, device=DEVICE)
    outer = ops.scatter_outer(x[:, :1], ops.csc_by_latent(indices, 2**20 + 2), x)
    assert (outer[-1] == 3).all()
    assert not outer[:-1].any()
