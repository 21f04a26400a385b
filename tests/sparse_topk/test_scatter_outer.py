"""`scatter_outer` that adds to a gradient, on both backends, against dense float64 mathematics.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import math

import pytest
import torch

from sparse_topk import ops, torch_ops, triton_ops
from sparse_topk.triton_ops import sparse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [pytest.param(torch_ops, id="torch"), pytest.param(triton_ops, id="triton")]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # not in the interpreter


def case(n, d, m, k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values, x = (torch.randn(n, size, generator=generator) for size in (k, d))
    indices = torch.rand(n, m, generator=generator).topk(k).indices.sort(1).values
    return values.to(DEVICE, dtype), indices.to(DEVICE), x.to(DEVICE, dtype)


def dense(values, indices, x, m):
    """codesᵀ x in float64, and the same of absolute values, which bounds what rounding can do."""
    zeros = torch.zeros(len(values), m, dtype=torch.float64)
    codes = zeros.scatter_add(1, indices.cpu(), values.cpu().double())
    x = x.cpu().double()
    return codes.T @ x, codes.abs().T @ x.abs()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16, torch.float64])
@pytest.mark.parametrize(("d", "chunk"), [(5, 128), (300, 4), (513, 128)])
def test_what_was_there_stays_in_the_sum(monkeypatch, backend, dtype, d, chunk):
    """In float32 although the factors have less: no sum is rounded to half precision."""
    monkeypatch.setattr(sparse, "CHUNK", chunk)
    m = 9
    values, indices, x = case(12, d, m, 3, dtype)
    out_dtype = torch.promote_types(dtype, torch.float32)
    out = torch.randn(m, d).to(DEVICE, out_dtype)
    truth, magnitude = dense(values, indices, x, m)
    truth, magnitude = truth + out.cpu().double(), magnitude + out.cpu().double().abs()
    assert backend.scatter_outer(values, backend.csc_by_latent(indices, m), x, out) is out
    bound = 14 * torch.finfo(out_dtype).eps * magnitude
    assert ((out.cpu().double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_a_gradient_begins_in_the_dtype_asked_for(monkeypatch, backend, dtype):
    """Its sums are not rounded to the factors' dtype, and rows that no token chose are 0."""
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", backend)
    values, indices, x = case(12, 40, 9, 3, dtype)
    out = ops.scatter_outer(values, ops.csc_by_latent(indices, 11), x, dtype=torch.float32)
    truth, magnitude = dense(values, indices, x, 11)
    assert out.dtype == torch.float32
    bound = 14 * torch.finfo(torch.float32).eps * magnitude
    assert ((out.cpu().double() - truth).abs() <= bound).all()
    assert not out[9:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [2, 128])
def test_micro_batches_add_up_to_the_whole(monkeypatch, backend, chunk):
    """Integers, so that every sum is exact; latent 1 is every token's, and half are nobody's."""
    monkeypatch.setattr(sparse, "CHUNK", chunk)
    values, indices, x = case(20, 6, 8, 3)
    values, x = (4 * values).round(), (4 * x).round()
    indices[:, 1] = 1
    whole = backend.scatter_outer(values, backend.csc_by_latent(indices, 16), x)
    out = torch.zeros(16, 6, device=DEVICE)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 8), slice(8, 20)):
        csc = backend.csc_by_latent(indices[rows], 16)
        backend.scatter_outer(values[rows], csc, x[rows], out)
    assert torch.equal(out, whole)


def test_rows_that_no_token_chose_are_not_touched():
    """By the kernel: not even a NaN is read and written back."""
    values, indices, x = case(4, 300, 5, 2)
    out = torch.full((8, 300), -0.0, device=DEVICE)
    out[6] = math.nan
    before = out.clone()
    triton_ops.scatter_outer(values, triton_ops.csc_by_latent(indices, 8), x, out)
    idle = torch.tensor([i not in indices for i in range(8)])
    assert idle.sum() >= 3
    assert torch.equal(out[idle].view(torch.int32), before[idle].view(torch.int32))
    assert out[~idle].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_gradient(backend):
    values, indices, x = case(4, 5, 6, 2)
    values[2, 0] = math.nan
    out = torch.zeros(6, 5, device=DEVICE)
    backend.scatter_outer(values, backend.csc_by_latent(indices, 6), x, out)
    assert out.isnan().any(1).nonzero().tolist() == [[indices[2, 0].item()]]


@pytest.mark.parametrize("runs", [[7], [0, 0, 7, 0], [1, 0, 3, 2, 0, 4], [8] * 70, [2, 1] * 600])
def test_a_chunk_finds_its_latent_among_any_number(monkeypatch, runs):
    """One latent, some, and more than 32 · 32: latents without a token may come anywhere."""
    monkeypatch.setattr(sparse, "CHUNK", 4)
    m = len(runs)
    indices = torch.arange(m).repeat_interleave(torch.tensor(runs))[:, None].to(DEVICE)
    x = torch.arange(1.0, len(indices) + 1, device=DEVICE)[:, None]
    values = torch.ones_like(x)
    outer = triton_ops.scatter_outer(values, triton_ops.csc_by_latent(indices, m), x)
    assert torch.equal(outer.cpu().double(), dense(values, indices, x, m)[0])


def test_the_operator_writes_to_out_and_says_so():
    values, indices, x = case(7, 12, 40, 5, torch.bfloat16)
    csc = torch_ops.csc_by_latent(indices, 40)
    out = torch.zeros(40, 12, device=DEVICE)
    version = out._version
    assert ops.scatter_outer(values, csc, x, out) is out
    assert out._version > version
    arguments = (values, *csc, x, torch.zeros_like(out))
    torch.library.opcheck(torch.ops.sparse_topk.scatter_outer_.default, arguments)


def test_out_must_be_contiguous_for_the_kernel():
    values, indices, x = case(2, 3, 4, 1)
    csc = triton_ops.csc_by_latent(indices, 4)
    with pytest.raises(ValueError, match=r"out must be contiguous, got the strides \(1, 4\)"):
        triton_ops.scatter_outer(values, csc, x, torch.zeros(3, 4, device=DEVICE).T)
