"""AuxK's errors and gradients against autograd through the dense formula in float64.

Legend: N tokens, D inputs, Q dead latents, k active ones per token.
"""

import math

import pytest
import torch

from sparse_topk import auxk as module
from sparse_topk import ops
from sparse_topk.auxk import auxk

N, D = 23, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
INTERPRETER = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 / 0, ∞ / ∞


@pytest.fixture(params=["dense", "dense, triton", "sparse"], autouse=True)
def _way(request, monkeypatch):
    """Dense products, or the sparse ops, whose kernels have tests of their own."""
    monkeypatch.setattr(module, "latents_are_few", lambda *sizes: request.param != "sparse")
    backend = "triton" if "triton" in request.param else "torch"
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", backend)


def case(q, dtype=torch.float64, n=N, bias=True):
    """Every third token has weight 0."""
    generator = torch.Generator().manual_seed(q)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    weight = torch.rand(n, generator=generator, dtype=torch.float64).to(DEVICE)
    weight[::3] = 0
    return (
        randn(n, D),
        randn(n, D),
        weight,
        randn(q, D),
        0.1 * randn(q) if bias else None,
        randn(q, D),
    )


def oracle(centered, error, weight, W_enc, b_enc, W_dec, k):
    """By autograd, on the tokens whose weight is not 0; ties as in a stable sort."""
    kept = weight != 0
    x, e, w = centered[kept].double(), error[kept].double(), weight[kept].double()
    leaves = [
        t.double().requires_grad_()
        for t in (W_enc, W_enc[:, 0] * 0 if b_enc is None else b_enc, W_dec)
    ]
    z = x @ leaves[0].T + leaves[1]
    order = z.sort(dim=1, descending=True, stable=True).indices[:, :k]
    codes = torch.zeros_like(z).scatter(1, order, z.gather(1, order).relu())
    sq_error = (codes @ leaves[2] - e).square().sum(1)
    grads = torch.autograd.grad((w * sq_error).sum(), leaves)
    whole = torch.zeros(len(weight), dtype=torch.float64, device=DEVICE)
    whole[kept] = sq_error.detach()
    return whole, *grads


def assert_close(actual, expected, tolerance=1e-12):
    for ours, truth in zip(actual, expected, strict=True):
        if ours is None:  # there is no bias
            continue
        assert ours.shape == truth.shape
        error = (ours.double() - truth).norm()
        assert error <= tolerance * truth.norm(), f"{error / truth.norm():.1e}"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("q", "k"), [(1, 1), (3, 8), (8, 3), (8, 8), (29, 5)])
def test_errors_and_gradients_equal_autograds(q, k, bias):
    inputs = case(q, bias=bias)
    actual = auxk(*inputs, k)
    assert (actual.b_enc is None) == (not bias)
    assert_close(actual, oracle(*inputs, k))


@pytest.mark.parametrize("rows", [1, 4, 128])
def test_pieces_of_any_size_give_the_same(monkeypatch, rows):
    monkeypatch.setattr(module, "_PIECE_BYTES", rows * 8 * (2 * 32 + 3 * D))
    inputs = case(29)
    assert_close(auxk(*inputs, 5), oracle(*inputs, 5))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_rounding_is_of_the_dtype(dtype, size):
    """All latents are active where they are positive, so that no choice depends on rounding.
    Weights too small for half precision lose nothing."""
    inputs = list(case(12, dtype))
    inputs[2] = size * inputs[2]
    actual = auxk(*inputs, 12)
    assert {t.dtype for t in actual} == {torch.float32}
    assert_close(actual, oracle(*inputs, 12), 4 * torch.finfo(dtype).eps)


def test_ties_go_to_the_smaller_index():
    inputs = [t if i == 2 else t.round() for i, t in enumerate(case(29))]
    assert_close(auxk(*inputs, 4), oracle(*inputs, 4))


def test_a_token_of_weight_zero_has_no_part_whatever_it_holds():
    centered, error, *rest = case(12)
    garbage = torch.tensor([NAN, INF, -INF, 1e300, 0.0], dtype=torch.float64, device=DEVICE)
    dirty = [centered.clone(), error.clone()]
    for t in dirty:
        t[::3] = garbage.repeat(2)
    actual = auxk(*dirty, *rest, 3)
    assert_close(actual, oracle(centered, error, *rest, 3))
    assert (actual.sq_error[::3] == 0).all()


@INTERPRETER
def test_no_tokens_and_none_kept():
    for inputs in (case(12, n=0), case(12, n=1)):  # token 0 has weight 0
        for t in auxk(*inputs, 3):
            assert not t.any()


@INTERPRETER
@pytest.mark.parametrize("where", ["centered", "error", "weight", "W_enc", "W_dec"])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_what_is_not_finite_reaches_the_gradients(where, poison):
    """Of the decoder at least, so that no training goes on with it."""
    inputs = dict(
        zip(("centered", "error", "weight", "W_enc", "b_enc", "W_dec"), case(8), strict=True)
    )
    inputs[where] = inputs[where].abs() if where == "W_dec" else inputs[where]
    inputs[where][4, ...] = poison
    assert not auxk(**inputs, k=8).W_dec.isfinite().all()


def test_nan_in_one_code_only_has_a_gradient():
    """ReLU's backward passes a NaN on."""
    inputs = list(case(8, bias=True))
    inputs[4][3] = NAN
    grads = auxk(*inputs, 2)
    assert grads.b_enc[3].isnan()
    assert grads.W_enc[3].isnan().all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("d", [3, 300, 2500])
def test_the_residual_of_any_width(d, dtype):
    """In one block of columns, or several; its operator's fake twin, too."""
    e_hat, error = torch.randn(5, d, device=DEVICE), torch.randn(5, d, device=DEVICE).to(dtype)
    weight = torch.tensor([1e-8, 0.0, 3e-8, 2e-8, 4e-8], device=DEVICE)
    error[1] = NAN
    sq_error, part = ops.aux_residual(e_hat, error, weight, weight.amax())
    r = (e_hat.double() - error.double()).nan_to_num() * (weight > 0)[:, None]
    r[1] = 0
    torch.testing.assert_close(sq_error.double(), r.square().sum(1), rtol=1e-6, atol=0)
    assert part.dtype == dtype
    expected = r * (weight.double() / 4e-8)[:, None]
    assert (
        (part.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-7
    ).all()
    if d == 3:
        arguments = (e_hat, error, weight, weight.amax())
        torch.library.opcheck(torch.ops.sparse_topk.aux_residual.default, arguments)


def test_k_must_be_positive():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        auxk(*case(8), 0)


def test_many_latents_are_gathered(monkeypatch):
    """On a CPU and on a GPU, by the time that each way takes."""
    monkeypatch.undo()
    cpu, gpu = torch.empty(1), torch.empty(1, dtype=torch.bfloat16, device="meta")
    assert module.latents_are_few(1000, 256, cpu)
    assert not module.latents_are_few(20000, 64, cpu)
    assert module.latents_are_few(30000, 256, gpu)
    assert not module.latents_are_few(30000, 64, gpu)
    assert module.latents_are_few(1000, 256, gpu.float())
    assert not module.latents_are_few(8000, 64, gpu.float())
