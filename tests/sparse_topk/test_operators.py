"""The operators under torch.compile, and on the Triton backend: the same numbers.

Legend: N tokens, D inputs, M latents, K active latents a token.
"""

import pytest
import torch

from sparse_topk import SparseTopKSAE, operators, reference
from sparse_topk.triton_ops import sparse

N, D, M, K = 7, 12, 40, 5


def case(bias=True):
    torch.manual_seed(0)
    sae = SparseTopKSAE(D, M, K, bias=bias)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return sae, torch.randn(N, D, requires_grad=True)


def gradients(module, sae, x):
    """The output, and the gradients of all inputs of a loss that no gradient is constant for."""
    out = module(x)
    inputs = [x, *sae.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.filterwarnings("default")  # torch's compiler uses what torch deprecates
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("aot_eager", None), ("aot_eager", torch.bfloat16), ("inductor", None)],
)
def test_compiled_is_the_same_without_a_graph_break(backend, dtype):
    """Output and every gradient; also under autocast, where the output is of its dtype."""
    sae, x = case()

    def autocast(module):
        def forward(x):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                return module(x)

        return forward

    expected = gradients(autocast(sae), sae, x)
    assert expected[0].dtype == (dtype or torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(sae, backend=backend, fullgraph=True)
    for one, other in zip(gradients(autocast(compiled), sae, x), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_fake_results_have_the_real_shapes_and_dtypes():
    sae, x = case()
    x, W = x.detach(), sae.W_enc.detach()
    values, indices = operators.topk_encode(x, W, None, K)
    order = operators.order_by_latent(indices, M)
    verbs = torch.ops.sparse_topk
    for dtype in (torch.float32, torch.bfloat16):
        x, W, values = x.to(dtype), W.to(dtype), values.to(dtype)
        for verb, arguments in (
            (verbs.topk_encode, (x, W, W[:, 0], K)),
            (verbs.gather_sum, (values, indices, W)),
            (verbs.gather_dot, (x, indices, W)),
            (verbs.order_by_latent, (indices, M)),
            (verbs.scatter_outer, (values, *order, x)),
            (verbs.sum_by_latent, (values, indices, *order)),
        ):
            torch.library.opcheck(verb.default, arguments)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_triton_gives_the_gradients_of_dense_autograd(monkeypatch, bias, few):
    """The whole module on the kernels, in Triton's interpreter where there is no GPU; sparse
    products by rows, and as for few latents."""
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "triton")
    monkeypatch.setattr(sparse, "few_latents", lambda *shape: few)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae, x = case(bias)
    sae = sae.to(device)
    x = x.detach().to(device).requires_grad_()

    def dense(x):
        return reference.topk_sae(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, K)

    actual, expected = gradients(sae, sae, x), gradients(dense, sae, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
