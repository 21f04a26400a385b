"""`keep_topk_` on both backends against a stable sort.

Legend: N tokens, Q scores per token.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_topk import ops, torch_ops, triton_ops
from sparse_topk.triton_ops import keep_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NAN, INF = math.nan, math.inf


@pytest.fixture(params=["torch", "triton", "triton, by blocks"])
def keep(request, monkeypatch):
    """The op; by blocks, a program reads a row several times."""
    if request.param == "triton, by blocks":
        monkeypatch.setattr(keep_topk, "keep_topk_tile", lambda q: (16, 1))
    module = torch_ops if request.param == "torch" else triton_ops

    def run(z, k):
        out = z.to(DEVICE, copy=True)
        assert module.keep_topk_(out, k) is None
        return out.cpu()

    return run


def truth(z, k):
    """By a stable sort, largest first, in which NaN is the largest."""
    order = z.nan_to_num(nan=INF, posinf=INF).sort(dim=1, descending=True, stable=True).indices
    if z.isnan().any():
        by_nan = z.gather(1, order).isnan().sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, by_nan)
    kept = torch.zeros_like(z, dtype=torch.bool).scatter(1, order[:, :k], True)
    return torch.where(kept, z.relu(), 0)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "q", "k"),
    [
        (3, 1, 1),
        (2, 1, 5),
        (4, 7, 3),
        (3, 16, 16),
        (2, 33, 40),
        (5, 100, 9),
        (2, 1025, 64),
        (0, 5, 2),
    ],
)
def test_the_k_largest_stay(keep, n, q, k, dtype):
    z = torch.randn(n, q, generator=torch.Generator().manual_seed(q)).to(dtype)
    assert_equal(keep(z, k), truth(z, k))


@given(
    rows=st.integers(1, 40).flatmap(
        lambda q: st.lists(
            st.lists(
                st.sampled_from([-INF, -2.0, -0.0, 0.0, 2**-149, 0.5, 1.0, 1.5, 3e38, INF]),
                min_size=q,
                max_size=q,
            ),
            min_size=1,
            max_size=3,
        )
    ),
    k=st.integers(1, 40),
)
@settings(deadline=None, max_examples=40)
def test_ties_go_to_the_smaller_index(rows, k):
    """Zeros, the smallest number and infinities among them."""
    z = torch.tensor(rows)
    for module in (torch_ops, triton_ops):
        out = z.to(DEVICE, copy=True)
        module.keep_topk_(out, k)
        assert_equal(out.cpu(), truth(z, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_and_counts_as_the_largest(keep, dtype):
    z = torch.tensor(
        [[1, NAN, INF, 2, 3, -1], [-NAN, 5, 4, 3, -INF, 2], [NAN, -3, -2, -1, 0, -5]], dtype=dtype
    )
    z = torch.cat([z, z], 1)
    assert_equal(keep(z, 5), truth(z, 5))
    assert_equal(keep(z, 3)[0], torch.tensor([0, NAN, INF, 0, 0, 0, 0, NAN, 0, 0, 0, 0]).to(dtype))
    all_nan = torch.full((2, 20), NAN, dtype=dtype)
    assert (keep(all_nan, 7).isnan().sum(1) == 7).all()


def test_negative_nan_is_nan(keep):
    """Its sign bit is set, as of the result of ∞ − ∞ on x86."""
    z = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    z.view(torch.int32)[0, 1] = -(2**22)
    assert z[0, 1].isnan()
    assert_equal(keep(z, 2), torch.tensor([[0, NAN, 0, 3.0]]))


def test_neighbouring_floats_are_told_apart(keep):
    """The bisection ends at one bit, near 1, among denormals and at the largest number."""
    for first in (torch.tensor(1.0), torch.tensor(2.0**-149), torch.tensor(3.4028e38)):
        bits = first.view(torch.int32) + torch.tensor([4, 0, 3, 1, 2], dtype=torch.int32)
        z = bits.view(torch.float32)[None]
        for k in range(1, 6):
            assert_equal(keep(z, k), truth(z, k))


def test_the_kernel_wants_rows_one_after_the_other():
    with pytest.raises(ValueError, match=r"z must be contiguous, got the strides \(1, 3\)"):
        triton_ops.keep_topk_(torch.zeros(4, 3, device=DEVICE).T, 1)


def test_the_operator_writes_to_z_and_says_so():
    z = torch.randn(3, 9, device=DEVICE)
    version, expected = z._version, truth(z.cpu(), 4)
    ops.keep_topk_(z, 4)
    assert z._version > version
    assert_equal(z.cpu(), expected)
    torch.library.opcheck(torch.ops.sparse_topk.keep_topk_.default, (torch.randn(3, 9), 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("q", [1001, 4096, 16384, 40000])
def test_real_sizes(q, dtype):
    """In bfloat16 most rows have ties at the k-th."""
    z = torch.randn(300, q).to(dtype)
    out = z.to(DEVICE)
    triton_ops.keep_topk_(out, 256)
    assert_equal(out.cpu(), truth(z, 256))
