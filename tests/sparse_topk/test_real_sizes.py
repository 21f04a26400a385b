"""The kernels at the sizes they are for, on a GPU with at least 24 GiB.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import pytest
import torch

from sparse_topk import SparseTopKSAE, UnitNormAdam

pytestmark = pytest.mark.gpu

N, D, M = 65536, 2048, 131072
TENTH = N * M * 2 // 10  # of the scores in bfloat16
DEVICE = "cuda"


def randn(*size, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(size, generator=generator, device=DEVICE, dtype=dtype)


def twice(op, *arguments, **options):
    """The results of `op`, which must have the same bits a second time, and take at most a tenth of
    the scores' memory beyond them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once = op(*arguments, **options)
    torch.cuda.synchronize()
    results = once if isinstance(once, tuple) else (once,)
    extra = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)
    assert extra <= TENTH
    again = op(*arguments, **options)
    for a, b in zip(results, again if isinstance(once, tuple) else (again,), strict=True):
        assert torch.equal(a, b)
    return once


def sample(length, count=64):
    """Positions throughout `length`, including its first and last."""
    return torch.linspace(0, length - 1, min(count, length), device=DEVICE).long()


def assert_largest(x, W, values, indices, k):
    """In a sample of rows: no smaller than the K-th, ascending, and with the score's value."""
    rows = sample(len(x))
    scores = x[rows].double() @ W.T.double()
    kth = scores.topk(k).values[:, -1:]
    chosen = scores.gather(1, indices[rows])
    assert (chosen >= kth - 1e-5 * kth.abs()).all()  # float32 sums, compared to a part in 2¹⁷
    assert (indices[:, 1:] > indices[:, :-1]).all()
    rounding = max(2.0**-16, torch.finfo(x.dtype).eps)
    torch.testing.assert_close(values[rows].double(), chosen, rtol=rounding, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_encode_past_two_to_the_31_scores(dtype):
    """N · M = 2³³: the scores would take 17 GB in half precision."""
    from sparse_topk.triton_ops import topk_encode

    x, W = randn(N, D, dtype=dtype), randn(M, D, dtype=dtype, seed=1)
    values, indices = twice(topk_encode, x, W, None, 32)
    assert_largest(x, W, values, indices, 32)


def test_the_largest_k_of_the_most_latents():
    from sparse_topk.triton_ops import topk_encode

    x, W = randn(4096, 256), randn(8 * M, 256, seed=1)
    values, indices = twice(topk_encode, x, W, None, 1024)
    assert_largest(x, W, values, indices, 1024)


@pytest.mark.parametrize(("m", "k"), [(M, 32), (M // 10, 512)])
def test_sparse_products_of_many_tokens(m, k):
    """By rows, and densely if latents are as few as AuxK's; one is active on 30 % of tokens."""
    from sparse_topk import triton_ops as ops

    x, W, values = randn(N, D), randn(m, D, seed=1), randn(N, k, seed=2)
    start = torch.randint(m // k, (N, 1), device=DEVICE)
    indices = start + torch.arange(k, device=DEVICE) * (m // k)
    indices[: 3 * N // 10, 0] = 0
    summed = twice(ops.gather_sum, values, indices, W)
    dots = twice(ops.gather_dot, x, indices, W)
    csc = ops.csc_by_latent(indices, m)
    outer = twice(ops.scatter_outer, values, csc, x)
    by_latent = twice(ops.sum_by_latent, values, indices, csc)

    def close(ours, truth):
        assert (ours.double() - truth).norm() <= 2**-8 * truth.norm()

    tokens = sample(N)
    W_rows = W[indices[tokens]].double()  # (64, K, D)
    close(summed[tokens], (values[tokens, :, None].double() * W_rows).sum(1))
    close(dots[tokens], (W_rows @ x[tokens, :, None].double())[..., 0])
    latents = torch.cat([sample(m), torch.zeros(1, device=DEVICE, dtype=torch.int64)])
    for latent in latents.tolist():
        tokens, slots = (indices == latent).nonzero(as_tuple=True)
        chosen = values[tokens, slots].double()
        close(outer[latent], chosen @ x[tokens].double())
        assert (by_latent[latent] - chosen.sum()).abs() <= 1e-5 * chosen.abs().sum()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_is_the_same_bits_twice():
    """Forward, backward and optimizer, with one latent active on every token. After the first step,
    which compiles, nothing waits for the device."""

    def step():
        torch.manual_seed(0)
        sae = SparseTopKSAE(512, 32768, 32, device=DEVICE)
        with torch.no_grad():
            sae.b_enc[7] = 1e3
        optimizer = UnitNormAdam(sae.parameter_groups(), lr=1e-3, max_grad_norm=1.0)
        for seed in range(3):
            x = randn(8192, 512, dtype=torch.float32, seed=seed)
            torch.cuda.set_sync_debug_mode("error" if seed else "default")
            try:
                with torch.autocast(DEVICE, torch.bfloat16):
                    loss = (sae(x) - x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [p.detach().clone() for p in sae.parameters()]

    for once, again in zip(step(), step(), strict=True):
        assert torch.equal(once, again)
        assert once.isfinite().all()
