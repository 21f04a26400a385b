"""The ops of `torch_ops` against dense mathematics in float64.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_topk import torch_encode
from sparse_topk import torch_ops as ops
from tests.helpers.oracles import stable_topk


def dense(values: torch.Tensor, indices: torch.Tensor, n_latents: int) -> torch.Tensor:
    """The codes as a dense float64 (N, M)."""
    zeros = torch.zeros(len(values), n_latents, dtype=torch.float64)
    return zeros.scatter(1, indices, values.double())


def random_case(n, d, m, k, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    W = torch.randn(m, d, generator=generator, dtype=dtype)
    indices = torch.rand(n, m, generator=generator).topk(k).indices.sort(1).values
    values = torch.randn(n, k, generator=generator, dtype=dtype)
    return x, W, values, indices


@given(
    n=st.integers(0, 9),
    d=st.integers(1, 6),
    m=st.integers(1, 300),
    share=st.floats(0, 1),
    bias=st.booleans(),
    levels=st.integers(1, 50),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=150)
def test_topk_encode_is_a_stable_sort(n, d, m, share, bias, levels, seed):
    """Integer scores: every sum is exact and ties abound, so the indices must be equal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (n, d), generator=generator).double()
    W = torch.randint(-2, 3, (m, d), generator=generator).double()
    b = torch.randint(-2, 3, (m,), generator=generator).double() if bias else None
    k = 1 + round(share * (m - 1))
    values, indices = ops.topk_encode(x, W, b, k)
    expected_values, expected_indices = stable_topk(x @ W.T + (0 if b is None else b), k)
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


def test_topk_encode_goes_block_by_block(monkeypatch):
    """Several blocks of rows, the last one short, give what one block gives."""
    x, W, _, _ = random_case(1000, 8, 100, 5)
    whole = ops.topk_encode(x, W, None, 5)
    monkeypatch.setattr(torch_encode, "_TILE_BYTES", 1)
    for actual, expected in zip(ops.topk_encode(x, W, None, 5), whole, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("tile_bytes", [1, 4000, 2**22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), [(4999, 7), (5000, 32), (4096, 1)])
def test_topk_encode_goes_tile_by_tile(monkeypatch, tile_bytes, dtype, m, k):
    """Tiles of one group, of several, and of all; the last tile is short. Ties abound, also across
    tiles, and small integers are exact in bfloat16."""
    monkeypatch.setattr(torch_encode, "_TILE_BYTES", tile_bytes)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (50, 3), generator=generator).to(dtype)
    W = torch.randint(-2, 3, (m, 3), generator=generator).to(dtype)
    b = torch.randint(-2, 3, (m,), generator=generator).to(dtype)
    values, indices = ops.topk_encode(x, W, b, k)
    expected_values, expected_indices = stable_topk(x.double() @ W.double().T + b.double(), k)
    assert torch.equal(values.double(), expected_values)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("m", [3, 64, 1000])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_topk_encode_never_drops_values_that_are_not_finite(m, k):
    x = torch.ones(4, 2)
    x[0, 0] = math.nan  # the whole row is NaN
    x[1] = math.inf  # inf − inf or inf + inf
    W = torch.randn(m, 2, generator=torch.Generator().manual_seed(0))
    W[m // 2, 0] = math.nan  # one latent is NaN for every token
    values, indices = ops.topk_encode(x, W, None, k)
    assert values[0].isnan().all()
    assert values.isnan().any(1).all()
    assert (indices == m // 2).any(1)[2:].all()
    for row in indices:
        assert len(row.unique()) == k


def test_topk_encode_orders_infinities():
    scores = torch.tensor([[-math.inf, 1.0, math.inf, -math.inf, 0.0]])
    values, indices = ops.topk_encode(torch.ones(1, 1), scores.T.contiguous(), None, 4)
    assert indices.tolist() == [[0, 1, 2, 4]]
    assert values.tolist() == [[-math.inf, 1.0, math.inf, 0.0]]


def test_topk_encode_clips_the_values_on_request():
    x, W, _, _ = random_case(20, 8, 30, 5)
    x[3, 0] = math.nan
    scores, indices = ops.topk_encode(x, W, None, 25)
    clipped = ops.topk_encode(x, W, None, 25, relu=True)
    assert (scores < 0).any()
    torch.testing.assert_close(clipped[0], scores.relu(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(clipped[1], indices)


@given(n=st.integers(0, 9), d=st.integers(1, 9), m=st.integers(1, 40), seed=st.integers(0, 2**20))
@settings(deadline=None, max_examples=60)
def test_sparse_products_equal_dense_ones(n, d, m, seed):
    k = 1 + seed % m
    x, W, values, indices = random_case(n, d, m, k, seed)
    codes = dense(values, indices, m)
    csc = ops.csc_by_latent(indices, m)
    torch.testing.assert_close(ops.gather_sum(values, indices, W), codes @ W)
    torch.testing.assert_close(ops.gather_dot(x, indices, W), (x @ W.T).gather(1, indices))
    torch.testing.assert_close(ops.scatter_outer(values, csc, x), codes.T @ x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_products_err_no_more_than_dense_ones(dtype):
    """In low precision, they err at most three times as much as the dense product itself."""
    x, W, values, indices = random_case(64, 48, 200, 16, dtype=dtype)
    codes = dense(values, indices, 200)
    csc = ops.csc_by_latent(indices, 200)
    for ours, dense_product, truth in (
        (ops.gather_sum(values, indices, W), codes.to(dtype) @ W, codes @ W.double()),
        (
            ops.gather_dot(x, indices, W),
            (x @ W.T).gather(1, indices),
            (x.double() @ W.double().T).gather(1, indices),
        ),
        (ops.scatter_outer(values, csc, x), codes.to(dtype).T @ x, codes.T @ x.double()),
    ):
        error = (ours.double() - truth).norm()
        assert error <= 3 * (dense_product.double() - truth).norm() + 1e-12


def test_csc_by_latent_is_stable_and_complete():
    indices = torch.tensor([[1, 3], [0, 3], [3, 4]])
    perm, indptr = ops.csc_by_latent(indices, 6)
    assert perm.tolist() == [2, 0, 1, 3, 4, 5]  # tokens ascend within latent 3
    assert indptr.tolist() == [0, 1, 2, 2, 5, 6, 6]
