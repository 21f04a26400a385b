"""BatchTopK: a training step's selection, loss and gradients against the definition, which is dense
here and differentiated by autograd in float64; the threshold; and what a run leaves.

Legend: L layers, N tokens, D inputs, M latents, K active latents per vector in the mean.
"""

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlsae import MLSAE, MLSAEConfig
from mlsae.distributed import ALONE
from mlsae.metrics import Moments
from mlsae.training.gradients import forward_backward
from mlsae.training.loop import train_step
from mlsae.training.selection import keep_largest
from mlsae.training.state import TrainState
from tests.helpers import parallel
from tests.helpers.parts import unmasked

L, N, D, M, K = 3, 40, 8, 24, 3
EPS = 1e-5


def residuals(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, n, D, generator=generator, dtype=torch.float64)
    x[1, ::2] *= torch.linspace(0.1, 1, D)  # vectors of different shapes need different numbers
    return x * torch.tensor([1.0, 5.0, 0.2])[:, None, None] + 2


def make(standardize=True, bias=False, k_max=M, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = MLSAEConfig(D, M, K, (0, 1, 2), standardize, bias=bias, k_max=k_max)
    mlsae = MLSAE(config).to(dtype)
    with torch.no_grad():
        mlsae.sae.b_dec.normal_(std=0.3)
        if bias:
            mlsae.sae.b_enc.normal_(std=0.3)
    chosen = {"dead_tokens": 10**9, "k_aux": 5, "aux_weight": 0.25} | options
    state = TrainState(mlsae, schedule=lambda _: 1e-3, dtype=dtype, **chosen)
    moments = Moments(L, D)
    moments.update(residuals(9))
    state.initialize(moments, None)
    return state


def steps(state, parts):
    """The step after `parts`, pairs of residuals and masks, before the weights are updated."""
    step = state.begin_step(sum(int(mask.sum()) for _, mask in parts))
    for x, mask in parts:
        forward_backward(state, step, x, mask)
    return step


def definition(state, x, n_tokens):
    """The loss of the residuals x (L, N, D) of the kept tokens, with gradients in the parameters;
    the dense codes (L, N, M) and the smallest of the K · L · N largest."""
    sae = state.mlsae.sae
    mean, std, eps = x.mean(2, keepdim=True), x.std(2, keepdim=True), EPS
    if not state.mlsae.config.standardize:
        mean, std, eps = torch.zeros_like(mean), torch.ones_like(std), 0.0
    bias = 0 if sae.b_enc is None else sae.b_enc
    scores = ((x - mean) / (std + eps) - sae.b_dec) @ sae.W_enc.T + bias
    active = scores.relu().flatten()
    values, chosen = active.topk(K * L * x.shape[1])
    codes = torch.zeros_like(active).scatter(0, chosen, values).view_as(scores)
    x_hat = (codes @ sae.W_dec + sae.b_dec) * std + mean
    loss = ((x - x_hat).square().sum(2).sum(1) / state.moments.variance()).mean() / n_tokens
    loss.backward()
    return loss.detach(), codes.detach(), values[-1].detach()


def gradients(state):
    return {name: p.grad for name, p in state.mlsae.named_parameters()}


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_loss_and_gradients_are_those_of_the_largest_of_all_tokens_and_layers(
    standardize, bias, masked
):
    x = residuals()
    mask = torch.arange(N) % 3 > 0 if masked else torch.ones(N, dtype=torch.bool)
    ours, theirs = make(standardize, bias), make(standardize, bias)
    step = steps(ours, [(x.masked_fill(~mask[:, None], math.nan), mask)])
    n_tokens = int(mask.sum())
    loss, codes, smallest = definition(theirs, x[:, mask], n_tokens)
    counts = (codes > 0).sum((1, 2)) / n_tokens
    assert counts.max() - counts.min() > 0.1  # the layers do differ in what they get
    torch.testing.assert_close(step.metrics.loss, loss)
    torch.testing.assert_close(step.metrics.threshold, smallest)
    assert step.metrics.capped_share == 0
    for name, grad in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], grad, rtol=1e-6, atol=1e-9)


def test_a_cap_that_no_vector_meets_changes_nothing():
    x = residuals()
    _, codes, _ = definition(make(), x, N)
    most = int((codes > 0).sum(2).max())
    assert K < most < M - 1
    whole, capped, met = make(), make(k_max=most + 1), make(k_max=most)
    one, two, three = (steps(state, [unmasked(x)]) for state in (whole, capped, met))
    torch.testing.assert_close(one.metrics.loss, two.metrics.loss)
    torch.testing.assert_close(one.metrics.threshold, two.metrics.threshold)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(capped)[name], grad)
    assert two.metrics.capped_share == 0
    full = int(((codes > 0).sum(2) == most).sum())
    assert three.metrics.capped_share == pytest.approx(full / (L * N))


def test_vectors_at_the_cap_are_counted_and_the_others_get_what_they_leave():
    values = torch.tensor([[9.0, 8.0], [7.0, 6.0], [3.0, 2.0], [5.0, 4.0]])
    kept, selected = keep_largest(values, None, 2, 1, n_latents=10)
    assert kept.tolist() == [[9, 8], [7, 6], [0, 0], [0, 0]]
    assert selected.capped == 2
    assert selected.threshold == 6 * 2  # times its tokens
    _, selected = keep_largest(values, None, 2, 1, n_latents=2)
    assert selected.capped == 0  # all the latents there are


def test_ties_at_the_threshold_all_stay():
    values = torch.tensor([[4.0, 2.0, 2.0], [2.0, 1.0, 0.0]])
    kept, _ = keep_largest(values, None, 1, 1, n_latents=10)
    assert kept.tolist() == [[4, 2, 2], [2, 0, 0]]


def test_with_fewer_positive_candidates_than_the_budget_all_stay():
    values = torch.tensor([[4.0, 0.0], [0.5, 0.0]])
    kept, selected = keep_largest(values, None, 1, 2, n_latents=10)
    assert torch.equal(kept, values)
    assert selected.threshold == selected.capped == 0


def test_no_kept_token_selects_nothing():
    values = torch.tensor([[4.0, 1.0], [0.5, 0.0]])
    kept, selected = keep_largest(values, torch.tensor([False, False]), 1, 1, n_latents=10)
    assert not kept.any()
    assert selected.threshold == selected.capped == 0
    kept, _ = keep_largest(values[:0], torch.tensor([], dtype=torch.bool), 1, 1, n_latents=10)
    assert kept.shape == (0, 2)


def test_nan_stays():
    values = torch.tensor([[math.nan, 3.0], [2.0, 1.0]])
    kept, _ = keep_largest(values, None, 1, 1, n_latents=10)
    assert kept[0, 0].isnan()
    assert kept[1].tolist() == [0, 0]
    state, x = make(), residuals()
    x[1, 3, 2] = math.nan
    assert not steps(state, [unmasked(x)]).metrics.loss.isfinite()


def test_aux_and_dead_latents_are_as_with_topk():
    """Only latents that stay count as active, and AuxK trains the dead ones."""
    state, x = make(dead_tokens=1), residuals()
    state.error_variance = torch.ones(L, dtype=torch.float64)
    step = state.begin_step(N)
    step.dead = torch.arange(0, M, 3)
    forward_backward(state, step, *unmasked(x))
    _, codes, _ = definition(make(), x, N)
    active = (codes > 1e-3).any(0).any(0)
    assert torch.equal(state.last_active > 0, active)
    assert step.metrics.aux > 0


def test_the_threshold_is_a_running_mean_of_the_steps_corrected_for_its_start():
    state = make()
    told = []
    for seed in range(3):
        x = residuals(seed)
        parts = [unmasked(x[:, :10]), unmasked(x[:, 10:])]
        thresholds = []
        for part, _ in parts:
            _, _, smallest = definition(make(), part, N)
            thresholds.append(smallest)
        told.append((10 * thresholds[0] + (N - 10) * thresholds[1]) / N)
        step = steps(state, parts)
        state.optimizer.zero_grad()  # the weights stay
        state.end_step(step)
    weights = torch.tensor([0.9**2, 0.9, 1.0], dtype=torch.float64)
    expected = (weights * torch.stack(told)).sum() / weights.sum()
    torch.testing.assert_close(state.threshold.value(), expected)
    assert state.mlsae.threshold == pytest.approx(expected.item(), rel=1e-6)


def test_inference_keeps_what_exceeds_the_threshold_of_the_k_max_largest():
    state, x = make(k_max=6), residuals()
    mlsae, sae = state.mlsae, state.mlsae.sae
    sae.threshold.fill_(0.9)
    scores = (mlsae.standardize(x).x - sae.b_dec) @ sae.W_enc.T
    values, indices = scores.topk(6)
    dense = torch.zeros_like(scores).scatter(2, indices, values.where(values > 0.9, 0))
    ours = mlsae.encode(x)
    assert ours.values.shape == (L, N, 6)
    numbers = (ours.values > 0).sum(2)
    assert numbers.max() == 6  # some vectors are at the cap
    assert numbers.min() < K  # and some have few
    torch.testing.assert_close(torch.zeros_like(scores).scatter(2, *ours[::-1]), dense)
    out = mlsae.reconstruct(x)
    torch.testing.assert_close(
        out.x_hat, mlsae.standardize(x).invert(dense @ sae.W_dec + sae.b_dec)
    )
    assert torch.equal(out.codes.values, ours.values)
    torch.testing.assert_close(sae.dense(mlsae.standardize(x).x), dense)


def test_inference_is_differentiable_as_its_definition():
    state, x = make(bias=True, k_max=6), residuals()
    sae = state.mlsae.sae
    sae.threshold.fill_(0.9)
    flat = state.mlsae.standardize(x).x.flatten(0, 1)
    target = residuals(5).flatten(0, 1)
    (sae(flat) - target).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    scores = (flat - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    values, indices = scores.topk(6)
    dense = torch.zeros_like(scores).scatter(1, indices, values.where(values > 0.9, 0))
    (dense @ sae.W_dec + sae.b_dec - target).square().sum().backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad)


def test_nan_passes_the_threshold():
    mlsae = make(k_max=6).mlsae
    mlsae.sae.threshold.fill_(0.9)
    x = residuals()
    x[0, 0, 0] = math.nan
    assert mlsae.encode(x).values[0, 0].isnan().any()


def test_processes_select_among_their_own_tokens_as_parts_do(team):
    alone, share, weights = parallel.batchtopk(ALONE.data, 6, [1, 2, 3])
    assert alone > 0
    assert 0 < share < 1
    for threshold, capped, own in team.run(parallel.batchtopk, 6, [1, 2, 3]):
        torch.testing.assert_close(threshold, alone)
        assert capped == pytest.approx(share)
        for one, other in zip(own, weights, strict=True):
            torch.testing.assert_close(one, other)


def test_the_selection_does_not_wait_for_the_device():
    """Tensors without data have nothing to wait for: reading one raises."""
    with FakeTensorMode():
        values, mask = torch.empty(6, 4), torch.empty(3, dtype=torch.bool)
        kept, _ = keep_largest(values, mask, 2, 1, n_latents=10)
        assert kept.shape == (6, 4)


def test_a_saved_state_goes_on_to_the_same_bits():
    one, two = make(), make()
    for seed in range(2):
        train_step([one], [unmasked(residuals(seed))], N)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.mlsae.threshold == one.mlsae.threshold > 0
    for state in (one, two):
        train_step([state], [unmasked(residuals(7))], N)
    assert torch.equal(one.threshold.value(), two.threshold.value())
    assert one.mlsae.threshold == two.mlsae.threshold
    assert one.window.capped_share == two.window.capped_share
    assert torch.equal(one.mlsae.sae.W_enc, two.mlsae.sae.W_enc)
