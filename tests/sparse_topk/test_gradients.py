"""Gradients of the SAE against autograd through the dense reference, in float64.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import pytest
import torch

from sparse_topk import SparseTopKSAE, TopK, reference, sparse_decode, topk_encode, topk_sae

N, D, M, K = 12, 5, 40, 6


def weights(bias=True, seed=0):
    """Leaves that require a gradient. The bias is negative, so that ReLU clips selected latents."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    b_enc = (leaf(M).detach() - 3).requires_grad_() if bias else None
    return leaf(N, D), leaf(M, D), b_enc, leaf(M, D), leaf(D)


@pytest.mark.parametrize("bias", [True, False])
def test_every_gradient_equals_dense_autograd(bias):
    ours, truth = weights(bias), weights(bias)
    x_hat, values, _ = topk_sae(*ours, K)
    x, W_enc, b_enc, W_dec, b_dec = truth
    f = reference.encode(x - b_dec, W_enc, b_enc, K)
    expected = reference.decode(f, W_dec, b_dec)
    if bias:
        assert ((values == 0).any(1)).any(), "no row with fewer than k positive values"
    torch.testing.assert_close(x_hat, expected)
    torch.testing.assert_close(values.sum(1), f.sum(1))
    # A loss of both outputs, so that both of their gradients count.
    (x_hat.sin().sum() + values.square().sum()).backward()
    (expected.sin().sum() + f.square().sum()).backward()
    for leaf, expected_leaf in zip(ours, truth, strict=True):
        if leaf is not None:
            torch.testing.assert_close(leaf.grad, expected_leaf.grad)


def test_encode_and_decode_equal_topk_sae():
    whole, parts = weights(), weights()
    x_hat = topk_sae(*whole, K).x_hat
    x, W_enc, b_enc, W_dec, b_dec = parts
    decoded = sparse_decode(topk_encode(x - b_dec, W_enc, b_enc, K), W_dec, b_dec)
    torch.testing.assert_close(x_hat, decoded)
    x_hat.sin().sum().backward()
    decoded.sin().sum().backward()
    for leaf, part_leaf in zip(whole, parts, strict=True):
        torch.testing.assert_close(leaf.grad, part_leaf.grad)


@pytest.mark.parametrize("index", range(5))
def test_one_gradient_alone_is_the_same(index):
    """Each gradient is computed only if asked for, and does not depend on the others."""
    together = weights()
    topk_sae(*together, K).x_hat.sin().sum().backward()
    alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(weights())]
    topk_sae(*alone, K).x_hat.sin().sum().backward()
    torch.testing.assert_close(alone[index].grad, together[index].grad)
    assert all(t.grad is None for i, t in enumerate(alone) if i != index)


def test_a_clipped_latent_has_no_gradient():
    """Selected, but negative before ReLU: its rows must not move."""
    W = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    values, indices = topk_encode(torch.tensor([[2.0]]), W, None, 2)
    assert values.tolist() == [[2.0, 0.0]]
    assert indices.tolist() == [[0, 1]]
    values.sum().backward()
    assert W.grad.tolist() == [[2.0], [0.0]]


def test_nan_reaches_the_loss_and_the_gradients():
    x, *rest = [t.detach().clone().requires_grad_() for t in weights()]
    with torch.no_grad():
        x[3, 2] = torch.nan
    x_hat = topk_sae(x, *rest, K).x_hat
    assert x_hat[3].isnan().all()
    assert not x_hat[[0, 1, 2, *range(4, N)]].isnan().any()
    x_hat.sum().backward()
    assert rest[0].grad.isnan().any()


def test_a_second_derivative_is_refused_not_wrong():
    x, *rest = weights()
    loss = topk_sae(x, *rest, K).x_hat.sin().sum()
    with pytest.raises(RuntimeError, match=r"second derivative .* needs torch.func"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4), (2, 0, 3)])
def test_any_leading_shape(shape):
    torch.manual_seed(0)
    sae = SparseTopKSAE(D, M, K)
    x = torch.randn(*shape, D, requires_grad=True)
    codes = sae.encode(x)
    assert codes.values.shape == codes.indices.shape == (*shape, K)
    flat = SparseTopKSAE.forward(sae, x.reshape(-1, D)).reshape(*shape, D)
    torch.testing.assert_close(sae(x), flat)
    torch.testing.assert_close(sae.decode(codes), flat)
    torch.testing.assert_close(sae.dense(x) @ sae.W_dec + sae.b_dec, flat)
    sae(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32])
def test_mixed_dtypes_compute_in_the_weights_dtype(x_dtype, w_dtype):
    """And x̂ has x's dtype, to take its place."""
    torch.manual_seed(0)
    sae = SparseTopKSAE(D, M, K, dtype=w_dtype)
    x = torch.randn(N, D, dtype=x_dtype, requires_grad=True)
    x_hat, values, _ = sae.reconstruct(x)
    assert values.dtype == sae.encode(x).values.dtype == w_dtype
    assert x_hat.dtype == sae(x).dtype == x_dtype
    torch.testing.assert_close(x_hat, sae.decode(sae.encode(x)).to(x_dtype))
    x_hat.float().square().sum().backward()
    assert x.grad.dtype == x_dtype
    assert sae.W_enc.grad.dtype == w_dtype


def test_autocast_computes_low_and_keeps_full_gradients():
    torch.manual_seed(0)
    sae = SparseTopKSAE(48, 256, k=256)  # all selected: only rounding can differ
    x = torch.randn(64, 48)
    with torch.autocast("cpu", torch.bfloat16):
        x_hat = sae(x)
    assert x_hat.dtype == torch.bfloat16
    exact = sae(x)
    assert (x_hat - exact).norm() < 0.02 * exact.norm()
    x_hat.float().square().sum().backward()
    assert {p.grad.dtype for p in sae.parameters()} == {torch.float32}


def test_bad_arguments_are_named():
    x, W = torch.randn(4, 8), torch.randn(16, 8)
    with pytest.raises(ValueError, match=r"k must be in \[1, 16\] \(the number of latents\), got"):
        topk_encode(x, W, None, 40)
    with pytest.raises(ValueError, match="k must be in"):
        SparseTopKSAE(8, 16, 0)
    with pytest.raises(ValueError, match=r"x's last dimension must be 8 .* got .*\(4, 7\)"):
        topk_encode(x[:, :7], W, None, 2)
    with pytest.raises(ValueError, match=r"W_dec must have W_enc's shape .* got \(8, 16\)"):
        topk_sae(x, W, None, W.T, None, 2)
    with pytest.raises(ValueError, match=r"b_enc must have the shape \(16,\)"):
        topk_encode(x, W, torch.zeros(8), 2)
    with pytest.raises(ValueError, match="floating-point"):
        topk_encode(x.long(), W, None, 2)
    with pytest.raises(ValueError, match="same shape"):
        sparse_decode(TopK(torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.int64)), W, None)
    with pytest.raises(RuntimeError, match="range"):
        sparse_decode(TopK(torch.ones(1, 1), torch.tensor([[16]])), W, None)
