"""The memory that the ops allocate at the sizes they are for, and that none waits for the device.

Tensors are fake: they have shapes and no data, and nothing is launched. So no GPU is needed, and
code that asks a tensor for a value fails. Memory that torch's own kernels (sort, matrix product)
take inside is not seen; `test_real_sizes.py` measures all of it on a GPU.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_topk import UnitNormAdam, auxk, matmul, ops, triton_ops
from sparse_topk.triton_ops import (
    adam,
    decode,
    keep_topk,
    moments,
    residual,
    sparse,
    standardization,
)
from sparse_topk.triton_ops.topk import product, select

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

N, D, M = 65536, 2048, 131072
LIMIT = 600 * 2**20  # a third of a tenth of the scores in half precision, N · M · 2 / 10


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key, size):
        self.known.remove(key)
        self.alive -= size

    def extra(self, op, *arguments, **options):
        """Bytes beyond arguments and results at the peak of one call; and the results."""
        self.peak = before = self.alive
        results = op(*arguments, **options)
        outputs = sum(t.nbytes for t in tree_leaves(results) if isinstance(t, torch.Tensor))
        return self.peak - before - outputs, results


class NoKernel:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture
def memory(monkeypatch):
    for module in (
        adam, decode, keep_topk, moments, residual, sparse, standardization, product, select,
    ):  # fmt: skip
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, NoKernel())

    def fake_product(a, b):  # as on CUDA, where nothing is converted first
        return torch.empty(len(a), b.shape[1])

    monkeypatch.setattr(auxk, "product", fake_product)
    monkeypatch.setattr(matmul, "product", fake_product)
    # Not by the environment, which refuses tensors on a CPU where there is a GPU.
    monkeypatch.setattr(ops, "backend_for", lambda tensor: triton_ops)
    with FakeTensorMode(), Memory() as counted:
        yield counted


def test_the_count(memory):
    kept = torch.empty(1000, dtype=torch.float16)
    for _ in range(3):
        kept.float()
    view = kept.view(10, 100)
    assert (memory.alive, memory.peak) == (2000, 6000)
    del kept, view
    assert memory.alive == 0
    with pytest.raises(DataDependentOutputException):
        torch.empty(1).item()


@pytest.mark.parametrize("k", [32, 1024, M // 10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_encode(memory, dtype, k):
    x, W = torch.empty(N, D, dtype=dtype), torch.empty(M, D, dtype=dtype)
    assert memory.extra(triton_ops.topk_encode, x, W, W[:, 0], k)[0] <= LIMIT


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(M, 32), (M, 1024), (13107, 512), (4096, 512)])
def test_sparse_products(memory, m, k, dtype):
    """With all latents, and with AuxK's."""
    x, W = torch.empty(N, D, dtype=dtype), torch.empty(m, D, dtype=dtype)
    values, indices = torch.empty(N, k, dtype=dtype), torch.empty(N, k, dtype=torch.int64)
    assert memory.extra(triton_ops.gather_sum, values, indices, W)[0] <= LIMIT
    assert memory.extra(triton_ops.gather_dot, x, indices, W)[0] <= LIMIT
    extra, csc = memory.extra(triton_ops.csc_by_latent, indices, m)
    assert extra <= LIMIT
    assert memory.extra(triton_ops.scatter_outer, values, csc, x)[0] <= LIMIT
    out = torch.empty(m, D)
    assert memory.extra(triton_ops.scatter_outer, values, csc, x, out)[0] <= LIMIT - out.nbytes
    assert memory.extra(triton_ops.sum_by_latent, values, indices, csc)[0] <= LIMIT


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_standardize_and_decode_error(memory, dtype):
    """Moments of blocks, a fifth of x at most: nothing of x's size in float32."""
    x, W = torch.empty(8, N // 8, D, dtype=dtype), torch.empty(M, D, dtype=dtype)
    mask = torch.empty(N // 8, dtype=torch.bool)
    limit = N * D * 2 // 5
    extra, (_, mean, std, _) = memory.extra(
        triton_ops.standardize, x, W[0], mask, torch.float16, 1e-5
    )
    assert extra <= limit
    values, indices = torch.empty(N, 32, dtype=dtype), torch.empty(N, 32, dtype=torch.int64)
    codes = (values, indices, W, W[0])
    assert memory.extra(triton_ops.decode_error, *codes, x, mean, std, mask, 1e-5)[0] <= limit


@pytest.mark.parametrize(("q", "k"), [(4096, 512), (13107, 512)])
def test_auxk_by_dense_products(memory, monkeypatch, q, k):
    """No (N, Q) matrix is stored whole: pieces of the tokens take 1 GiB, beside copies of the
    weights and a product in float32 that is still to be added."""
    monkeypatch.setattr(auxk, "latents_are_few", lambda *sizes: True)
    x, error = (torch.empty(N, D, dtype=torch.float16) for _ in range(2))
    W_enc, W_dec = (torch.empty(q, D, dtype=torch.float16) for _ in range(2))
    extra, _ = memory.extra(auxk.auxk, x, error, torch.empty(N), W_enc, W_enc[:, 0], W_dec, k)
    assert extra <= 2**30 + 8 * q * D + 8 * N


def test_the_optimizer_clips_without_asking(memory):
    """No value is read, and nothing as large as a weight is allocated."""
    weights = [torch.empty(M, D), torch.empty(M, D)]
    optimizer = UnitNormAdam(
        [{"params": weights[:1]}, {"params": weights[1:], "unit_norm": True}], max_grad_norm=1.0
    )
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer.step()  # makes the moments
    assert memory.extra(optimizer.step)[0] <= 2**20
