"""The training step's loss and gradients, which are written by hand, against the formula, which is
dense here and differentiated by autograd in float64.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

import pytest
import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.metrics import Moments
from mlsae.training.gradients import forward_backward
from mlsae.training.state import TrainState
from tests.helpers.parts import unmasked

L, N, D, M, K, K_AUX = 3, 40, 8, 24, 3, 5
EPS = 1e-5
ERROR_VARIANCE = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
DEAD = torch.arange(0, M, 3)


def residuals(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, n, D, generator=generator, dtype=torch.float64)
    return x * torch.tensor([1.0, 5.0, 0.2])[:, None, None] + 2


def make(standardize=True, bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    mlsae = MLSAE(MLSAEConfig(D, M, K, (0, 1, 2), standardize, bias=bias)).to(dtype)
    with torch.no_grad():
        mlsae.sae.b_dec.normal_(std=0.3)
        if bias:
            mlsae.sae.b_enc.normal_(std=0.3)
    state = TrainState(
        mlsae, schedule=lambda _: 0.0, dead_tokens=1, k_aux=K_AUX, aux_weight=0.25, dtype=dtype
    )
    moments = Moments(L, D)
    moments.update(residuals(9))
    state.initialize(moments, None)
    return state


def steps(state, parts, dead=None):
    """The step after `parts`, pairs of residuals and masks, before the weights are updated."""
    state.error_variance = ERROR_VARIANCE
    step = state.begin_step(sum(int(mask.sum()) for _, mask in parts))
    step.dead = dead
    for x, mask in parts:
        forward_backward(state, step, x, mask)
    return step


def everything(x):
    return [unmasked(x)]


def gradients(state):
    return {name: p.grad for name, p in state.mlsae.named_parameters()}


def formula(state, x, n_tokens, dead):
    """The losses by the formulas of `mlsae.training.gradients`, with gradients in the parameters:
    loss, aux, and of the kept tokens |x − x̂|² (L, N) and error (L, N, D)."""
    sae = state.mlsae.sae
    mean, std, eps = x.mean(2, keepdim=True), x.std(2, keepdim=True), EPS
    if not state.mlsae.config.standardize:
        mean, std, eps = torch.zeros_like(mean), torch.ones_like(std), 0.0
    bias = 0 if sae.b_enc is None else sae.b_enc
    centered = (x - mean) / (std + eps) - sae.b_dec
    scores = (centered @ sae.W_enc.T + bias).flatten(0, 1)
    values, indices = scores.topk(K)
    codes = torch.zeros_like(scores).scatter(1, indices, values.relu())
    x_hat = (codes @ sae.W_dec + sae.b_dec).view_as(x) * std + mean
    sq_error = (x - x_hat).square().sum(2)
    variance = state.moments.variance()
    loss = (sq_error.sum(1) / variance).mean() / n_tokens
    error = (x - x_hat) / (std + eps)
    aux = torch.zeros(())
    if dead is not None:
        fixed, bias = centered.detach(), 0 if sae.b_enc is None else sae.b_enc[dead]
        values, chosen = (fixed @ sae.W_enc[dead].T + bias).topk(min(K_AUX, len(dead)))
        predicted = torch.einsum("lnk,lnkd->lnd", values.relu(), sae.W_dec[dead][chosen])
        missed = (error.detach() - predicted).square().sum((1, 2))
        aux = (missed / ERROR_VARIANCE).mean() / n_tokens
    (loss + state.aux_weight * aux).backward()
    return loss + state.aux_weight * aux, aux, sq_error, error


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dead", [None, DEAD, DEAD[:1]])
def test_loss_and_gradients_are_those_of_the_formula(standardize, bias, dead):
    x = residuals()
    ours, theirs = make(standardize, bias), make(standardize, bias)
    step = steps(ours, everything(x), dead)
    loss, aux, sq_error, error = formula(theirs, x, N, dead)
    torch.testing.assert_close(step.metrics.loss, loss)
    torch.testing.assert_close(step.metrics.aux, aux.double(), rtol=1e-6, atol=0)
    assert aux > 0 or dead is None
    torch.testing.assert_close(step.metrics.sq_error, sq_error.sum(1))
    moments = Moments(L, D)
    moments.update(error.detach())
    torch.testing.assert_close(step.metrics.errors.sq_dev, moments.sq_dev)
    torch.testing.assert_close(step.metrics.errors.mean, moments.mean)
    for name, grad in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], grad, rtol=1e-6, atol=1e-9)


def test_the_loss_is_the_mean_fvu_of_the_layers():
    state, x = make(), residuals()
    step = steps(state, everything(x))
    error = (x - state.mlsae(x)).square().sum(2).mean(1)
    fvu = (error / state.moments.variance()).mean()
    torch.testing.assert_close(step.metrics.loss, fvu)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("junk", [7.0, float("nan"), float("inf")])
def test_masked_tokens_are_as_if_they_were_not_there(junk, bias):
    x = residuals()
    mask = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.7
    masked, dropped = make(bias=bias), make(bias=bias)
    filled = x.masked_fill(~mask[:, None], junk)
    step, other = (
        steps(masked, [(filled, mask)], DEAD),
        steps(dropped, everything(x[:, mask]), DEAD),
    )
    for name in ("loss", "aux", "sq_error"):
        torch.testing.assert_close(getattr(step.metrics, name), getattr(other.metrics, name))
    for one, two in (
        (step.metrics.moments, other.metrics.moments),
        (step.metrics.errors, other.metrics.errors),
    ):
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(masked.last_active, dropped.last_active)
    assert (masked.last_active > 0).any()
    for name, grad in gradients(dropped).items():
        torch.testing.assert_close(gradients(masked)[name], grad)


def test_a_latent_that_only_masked_tokens_have_is_not_active():
    """A masked token is 0 to the encoder, which a bias answers to."""
    state, x = make(bias=True), residuals()
    with torch.no_grad():
        state.mlsae.sae.W_enc.mul_(100)[:K] = 0
        state.mlsae.sae.b_enc.fill_(-1)[:K] = 0.002
    mask = torch.arange(N) < N - 1
    steps(state, [(x, mask)])
    assert (state.last_active[:K] == 0).all()
    x[:, -1] = 7.0  # a constant vector: kept, it is the same to the encoder, but for b_pre
    with torch.no_grad():
        state.mlsae.sae.b_dec.zero_()
    steps(state, everything(x))
    assert (state.last_active[:K] > 0).all()


def test_aux_of_no_weight_is_not_computed(monkeypatch):
    some, none = make(), make()
    some.aux_weight = 0.0
    monkeypatch.delattr("mlsae.training.gradients.auxk")
    assert steps(some, everything(residuals()), DEAD).metrics.aux == 0
    steps(none, everything(residuals()))
    for name, grad in gradients(some).items():
        assert torch.equal(grad, gradients(none)[name])


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_add_up_to_the_whole(parts):
    x, mask = residuals(), torch.arange(N) % 5 > 0
    one, many = make(), make()
    whole = steps(one, [(x, mask)], DEAD)
    pieces = zip(x.tensor_split(parts, dim=1), mask.tensor_split(parts), strict=True)
    split = steps(many, list(pieces), DEAD)
    torch.testing.assert_close(split.metrics.loss, whole.metrics.loss)
    torch.testing.assert_close(split.metrics.aux, whole.metrics.aux)
    torch.testing.assert_close(split.metrics.fvu(), whole.metrics.fvu())
    torch.testing.assert_close(split.metrics.errors.variance(), whole.metrics.errors.variance())
    assert torch.equal(many.last_active, one.last_active)
    for name, grad in gradients(one).items():
        torch.testing.assert_close(gradients(many)[name], grad)


def test_gradients_are_added_to_those_that_are_there():
    state = make()
    steps(state, everything(residuals()), DEAD)
    once = {name: grad.clone() for name, grad in gradients(state).items()}
    steps(state, everything(residuals()), DEAD)
    for name, grad in gradients(state).items():
        torch.testing.assert_close(grad, 2 * once[name])


def test_aux_pulls_the_dead_latents_and_nothing_else():
    with_aux, without = make(), make()
    steps(with_aux, everything(residuals()), DEAD)
    steps(without, everything(residuals()))
    alive = torch.ones(M, dtype=torch.bool).index_fill(0, DEAD, False)
    for name, grad in gradients(with_aux).items():
        change = grad - gradients(without)[name]
        if name == "sae.b_dec":
            assert (change == 0).all()
        else:
            assert (change[DEAD].norm(dim=1) > 0).any()
            assert (change[alive] == 0).all()


def test_aux_is_exactly_zero_with_no_dead_latents():
    state = make()
    assert state.begin_step(N).dead is None
    assert steps(state, everything(residuals())).metrics.aux == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residuals_in_half_precision_are_read_exactly(dtype):
    """They are widened where they are read: no rounding beside that of the residuals."""
    x = residuals().to(dtype)
    half, wide = make(), make()
    steps(half, everything(x), DEAD)
    steps(wide, everything(x.double()), DEAD)
    for name, grad in gradients(wide).items():
        torch.testing.assert_close(gradients(half)[name], grad, rtol=1e-4, atol=1e-6)


def test_a_step_in_bfloat16_has_the_gradient_to_its_rounding():
    narrow, exact = make(dtype=torch.float32), make()
    narrow.dtype = narrow.shadows.dtype = torch.bfloat16
    x = residuals().float()
    steps(narrow, everything(x), None)
    steps(exact, everything(x.double()), None)
    for name, grad in gradients(exact).items():
        ours = gradients(narrow)[name]
        assert ours.dtype == torch.float32
        assert (ours - grad).norm() < 0.1 * grad.norm(), name  # some tokens choose another latent


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_loss(bad):
    state, x = make(), residuals()
    x[1, 3, 2] = bad
    step = steps(state, everything(x))
    assert not step.metrics.loss.isfinite()
    assert not step.metrics.moments.mean[1].isfinite().all()
