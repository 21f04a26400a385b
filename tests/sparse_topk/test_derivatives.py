"""torch.func's transforms and forward mode against the dense reference, in float64; and the
products' derivatives of all orders by finite differences.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_flatten

from sparse_topk import (
    SparseTopKSAE,
    TopK,
    derivatives,
    ops,
    reference,
    sparse_decode,
    topk_encode,
    topk_sae,
)

N, D, M, K = 4, 3, 12, 3
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own


@pytest.fixture(params=["torch", "triton"])
def like(request, monkeypatch):
    """An empty tensor of a device and dtype that the backend takes: Triton takes no float64."""
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", request.param)
    if request.param == "torch":
        return torch.empty(0, dtype=torch.float64)
    return torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")


def inputs(like=None, seed=0):
    """x, W_enc, b_enc, W_dec, b_dec. The bias is negative, so that ReLU clips selected latents."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, D), (M, D), (M,), (M, D), (D,))
    x, W_enc, b_enc, W_dec, b_dec = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    drawn = x, W_enc, b_enc - 1, W_dec, b_dec
    return drawn if like is None else tuple(t.to(like) for t in drawn)


def assert_close(actual, expected):
    """In float32, as the torch backend errs: sums of a hundred terms of 0 to 100."""
    (first, *_), _ = tree_flatten(expected)
    tolerance = {} if first.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(actual, expected, **tolerance)


def ours(*inputs):
    return topk_sae(*inputs, K).x_hat


def dense(*inputs):
    return reference.topk_sae(*inputs, K)


def test_the_products_have_derivatives_of_all_orders_and_ways():
    x, W, *_ = inputs()
    values = torch.randn(N, K, dtype=torch.float64)
    indices = topk_encode(x, W, None, K).indices
    csc = ops.csc_by_latent(indices, M)
    for product, arguments in (
        (lambda values, W: derivatives.gather_sum(values, indices, W), (values, W)),
        (lambda x, W: derivatives.gather_dot(x, indices, W), (x, W)),
        (lambda values, x: derivatives.scatter_outer(values, indices, csc, x), (values, x)),
    ):
        leaves = [a.clone().requires_grad_() for a in arguments]
        assert gradcheck(
            product, leaves, check_forward_ad=True, check_batched_grad=True,
            check_batched_forward_grad=True,
        )  # fmt: skip
        assert gradgradcheck(product, leaves, check_fwd_over_rev=True)


def loss_of(function):
    return lambda *inputs: function(*inputs).sin().sum()


ALL = tuple(range(5))
TRANSFORMS = {
    "grad": lambda f, i: grad(loss_of(f), ALL)(*i),
    "vjp": lambda f, i: vjp(f, *i)[1](i[0]),
    "jvp": lambda f, i: jvp(f, i, inputs(i[0], seed=5)),
    "jvp by x": lambda f, i: jvp(lambda x: f(x, *i[1:]), i[:1], i[:1]),
    "jacrev": lambda f, i: jacrev(f, ALL)(*i),
    "jacfwd": lambda f, i: jacfwd(f, ALL)(*i),
    "forward over reverse": lambda f, i: jacfwd(jacrev(loss_of(f), ALL), ALL)(*i),
    "reverse over reverse": lambda f, i: jacrev(jacrev(loss_of(f), ALL), ALL)(*i),
    "reverse over forward": lambda f, i: jacrev(jacfwd(loss_of(f), ALL), ALL)(*i),
    "hessian by x": lambda f, i: hessian(lambda x: loss_of(f)(x, *i[1:]))(i[0]),
    "third": lambda f, i: grad(lambda x: hessian(lambda x: loss_of(f)(x, *i[1:]))(x).sum())(i[0]),
    "vmap by tokens": lambda f, i: vmap(lambda x: f(x[None], *i[1:]))(i[0]),
    "vmap by columns": lambda f, i: vmap(lambda x: f(x, *i[1:]), 1, 2)(
        torch.stack([i[0], -i[0]], 1)
    ),
    "vmap twice": lambda f, i: vmap(vmap(lambda x: f(x[None], *i[1:])))(torch.stack([i[0], -i[0]])),
    "vmap by all": lambda f, i: vmap(f)(*[torch.stack([a, 2 * a]) for a in i]),
    "vmap by W_dec": lambda f, i: vmap(f, (None, None, None, 0, None))(
        *i[:3], torch.stack([i[3], -i[3]]), i[4]
    ),
    "gradients per token": lambda f, i: vmap(
        grad(lambda w, x: loss_of(f)(x[None], *w)), (None, 0)
    )(i[1:], i[0]),
    "vectorized jacobian": lambda f, i: torch.autograd.functional.jacobian(f, i, vectorize=True),
}  # fmt: skip


INTERPRETED = ("grad", "jvp by x", "vmap by tokens", "gradients per token")  # quick enough


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_gives_what_it_gives_for_the_dense_reference(like, name):
    if like.dtype != torch.float64 and name not in INTERPRETED:
        pytest.skip("slow under Triton's interpreter, and made of the same ops")
    transform = TRANSFORMS[name]
    actual, expected = transform(ours, inputs(like)), transform(dense, inputs(like))
    assert_close(actual, expected)


def test_forward_mode_without_torch_func():
    i, tangents = inputs(), inputs(seed=5)
    outs = []
    for function in (ours, dense):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(a, t) for a, t in zip(i, tangents, strict=True)]
            outs.append(forward_ad.unpack_dual(function(*duals)).tangent)
    torch.testing.assert_close(*outs)


def test_the_module_and_its_methods_under_transforms():
    torch.manual_seed(0)
    saes = [SparseTopKSAE(D, M, K).double() for _ in range(3)]
    x = torch.randn(2, N, D, dtype=torch.float64)
    for method in ("__call__", "dense", lambda sae, x: sae.decode(sae.encode(x))):
        call = method if callable(method) else lambda sae, x, m=method: getattr(sae, m)(x)
        torch.testing.assert_close(vmap(lambda x: call(saes[0], x))(x), call(saes[0], x))  # noqa: B023
    values, indices = vmap(saes[0].encode)(x)
    assert torch.equal(indices, saes[0].encode(x).indices)
    torch.testing.assert_close(values, saes[0].encode(x).values)
    weights, buffers = stack_module_state(saes)
    ensemble = vmap(lambda w, b: functional_call(saes[0], (w, b), (x[0],)))(weights, buffers)
    torch.testing.assert_close(ensemble, torch.stack([sae(x[0]) for sae in saes]))


class OneShard:
    """All latents in one process, for the functions that ask for `Shards`."""

    keep = sum = staticmethod(lambda tensor: tensor)


def test_sharded_latents_are_refused():
    with pytest.raises(RuntimeError, match=r"no torch\.func .* use the whole SAE in one process"):
        grad(lambda x: topk_sae(x, *inputs()[1:], K, OneShard).x_hat.sum())(inputs()[0])


def test_a_second_derivative_by_autograd_alone_is_refused_in_a_sentence():
    arguments = [a.requires_grad_() for a in inputs()]
    codes = topk_encode(*arguments[:3], K)
    for out in (ours(*arguments), codes.values, sparse_decode(codes, *arguments[3:])):
        with pytest.raises(RuntimeError, match=r"needs torch\.func .*create_graph=True"):
            torch.autograd.grad(out.sum(), arguments, create_graph=True, allow_unused=True)
        torch.autograd.grad(out.sum(), arguments, allow_unused=True, retain_graph=True)


def test_an_ordinary_pass_calls_the_ops_themselves(monkeypatch):
    """Nothing of what the transforms need is paid for without them."""

    def refuse(*_):
        raise AssertionError("an op was recorded for a transform")

    for name in ("_GatherSum", "_GatherDot", "_ScatterOuter"):
        monkeypatch.setattr(getattr(derivatives, name), "apply", refuse)
    arguments = [a.requires_grad_() for a in inputs()]
    ours(*arguments).sum().backward()
    codes = topk_encode(*arguments[:3], K)
    sparse_decode(TopK(*codes), arguments[3], arguments[4]).sum().backward()
    with torch.no_grad():
        ours(*arguments)
    with pytest.raises(AssertionError, match="recorded"):
        grad(loss_of(ours))(*inputs())
