"""The kernels at the sizes they are for; all of it needs a GPU of 24 GiB or more.

Legend: N tokens, D inputs, M latents, K active latents a token.
"""

import pytest
import torch

from sparse_topk import SparseTopKSAE, UnitNormAdam

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def large():
    """x and W in bfloat16, with N · M = 2³³: the scores would take 17 GB."""
    torch.manual_seed(0)
    x = torch.randn(65536, 2048, device="cuda", dtype=torch.bfloat16)
    W = torch.randn(131072, 2048, device="cuda", dtype=torch.bfloat16)
    yield x, W
    del x, W
    torch.cuda.empty_cache()


@pytest.mark.parametrize("path", ["fused", "chunked"])
def test_encode_past_two_to_the_31_scores(large, path):
    """The same bits twice, at most a tenth of the scores' memory, and right in rows throughout."""
    from sparse_topk.triton_ops import topk_encode

    x, W = large
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values, indices = topk_encode(x, W, None, 32, path=path)
    outputs = values.nbytes + indices.nbytes
    extra = torch.cuda.max_memory_allocated() - before - outputs
    assert extra <= 0.1 * x.shape[0] * W.shape[0] * 2
    again = topk_encode(x, W, None, 32, path=path)
    assert torch.equal(values, again[0])
    assert torch.equal(indices, again[1])
    rows = torch.linspace(0, len(x) - 1, 64, device="cuda").long()
    scores = x[rows].double() @ W.T.double()
    kth = scores.topk(32).values[:, -1:]
    chosen = scores.gather(1, indices[rows])
    slack = 1e-5 * kth.abs()  # float32 sums, compared to a part in 2¹⁷
    assert (chosen >= kth - slack).all()
    assert (indices[:, 1:] > indices[:, :-1]).all()
    torch.testing.assert_close(values[rows].double(), chosen, rtol=2**-8, atol=0.0)


def test_a_step_is_the_same_bits_twice():
    """Forward, backward and optimizer, a latent firing on every token among the rest."""

    def step():
        torch.manual_seed(0)
        sae = SparseTopKSAE(512, 32768, 32, device="cuda")
        with torch.no_grad():
            sae.b_enc[7] = 1e3
        optimizer = UnitNormAdam(sae.parameter_groups(), lr=1e-3, max_grad_norm=1.0)
        for seed in range(3):
            x = torch.randn(
                8192, 512, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"
            )
            with torch.autocast("cuda", torch.bfloat16):
                loss = (sae(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in sae.parameters()]

    for one, other in zip(step(), step(), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
