"""One optimizer step, and what is counted between steps.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

import pytest
import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.errors import InputError, NonFiniteError
from mlsae.training import init
from mlsae.training.gradients import forward_backward
from mlsae.training.init import geometric_median, init_stats
from mlsae.training.loop import train_step
from mlsae.training.state import TrainState
from tests.helpers.parts import unmasked

L, N, D, M, K = 2, 64, 8, 48, 4


def make(**options):
    torch.manual_seed(0)
    mlsae = MLSAE(MLSAEConfig(D, M, K, (0, 1)))
    settings = {"dead_tokens": 100, "k_aux": 4, "aux_weight": 1 / 32} | options
    state = TrainState(mlsae, schedule=lambda tokens: 0.0, **settings)
    state.initialize(*init_stats(mlsae, [residuals(99)])[:2])
    return state


def take(state, parts, lr):
    """The metrics of one optimizer step on residuals in parts."""
    state.schedule = lambda tokens: lr
    (metrics,) = train_step([state], map(unmasked, parts), sum(x.shape[1] for x in parts))
    return metrics


def residuals(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(L, N, D, generator=generator) * torch.tensor([1.0, 9.0])[:, None, None] + 2


def weights(state):
    return [p.detach().clone() for p in state.mlsae.parameters()]


@pytest.mark.parametrize("parts", [2, 5])
def test_a_step_in_parts_is_the_step(parts):
    """Weights, counters and metrics after several steps, with AuxK at work."""
    whole, split = make(), make()
    for seed in range(8):
        one = take(whole, [residuals(seed)], lr=1e-2)
        other = take(split, residuals(seed).tensor_split(parts, dim=1), lr=1e-2)
        torch.testing.assert_close(one.fvu(), other.fvu())
        torch.testing.assert_close(one.loss, other.loss)
        torch.testing.assert_close(one.aux, other.aux)
    assert whole.dead().any(), "no latent died, so AuxK was not tried"
    assert one.aux > 0
    assert torch.equal(whole.inactive_tokens, split.inactive_tokens)
    for a, b in zip(weights(whole), weights(split), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_constant_vectors_are_reproduced_and_change_nothing_else():
    """As documented at `MLSAE.standardize`: a step with some has the gradient of one without."""
    some, none = make(), make()
    constant = torch.full((L, 8, D), 3.0)
    gradients = []
    for state, parts in ((some, [residuals(0), constant]), (none, [residuals(0)])):
        step = state.begin_step(N)
        for x in parts:
            forward_backward(state, step, *unmasked(x))
        gradients.append([p.grad.clone() for p in state.mlsae.parameters()])
        assert step.metrics.sq_error.isfinite().all()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(some.mlsae(constant), constant)


def test_the_first_median_needs_bounded_memory(monkeypatch):
    """It is of the first tokens, however the batch is split; the moments are of all."""
    monkeypatch.setattr(init, "_MEDIAN_VECTORS", 2 * 20)
    mlsae, x = MLSAE(MLSAEConfig(D, M, K, (0, 1))), residuals(0)
    moments, whole, vectors = init_stats(mlsae, [x])
    _, split, parts = init_stats(mlsae, x.split(7, dim=1))
    torch.testing.assert_close(whole, split)
    standard = mlsae.standardize(x[:, :20])[0].flatten(0, 1)
    assert torch.equal(whole, geometric_median(standard))
    assert torch.equal(vectors, standard)
    assert torch.equal(parts.sort(0).values, standard.sort(0).values)
    assert moments.n_tokens == N


def test_the_decoder_stays_on_the_unit_sphere():
    state = make()
    for seed in range(5):
        take(state, [residuals(seed)], lr=1e-2)
        norms = state.mlsae.sae.W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(M))


def test_a_step_tells_when_each_of_its_stages_ends():
    laps: list[str] = []
    state = make()
    train_step([state, make()], map(unmasked, residuals(0).tensor_split(2, dim=1)), N, laps.append)
    of_sae = ["encode", "rest of the SAE"]
    assert laps == 2 * ["model", *of_sae, *of_sae] + ["optimizer"]


def test_the_loss_falls():
    state = make()
    losses = [take(state, [residuals(0)], lr=1e-2).loss.item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_dead_latents_are_counted_in_tokens():
    state = make(dead_tokens=3 * N)
    sae = state.mlsae.sae
    with torch.no_grad():
        sae.W_enc[7] = 0  # it never fires
        sae.W_enc[7, 0] = 1e-6
    for step in range(4):
        assert state.inactive_tokens[7] == step * N
        assert bool(state.dead()[7]) == (step >= 3)
        dead = state.dead().nonzero().flatten()
        assert state.n_dead == state.n_dead_anywhere == len(dead)
        ids = state.begin_step(N).dead
        assert ids is None if step < 3 else torch.equal(ids, dead)
        take(state, [residuals(0)], lr=0.0)
    firing = state.mlsae.encode(residuals(0))
    fired = torch.zeros(M, dtype=torch.bool)
    fired[firing.indices[firing.values > 1e-3]] = True
    assert torch.equal(state.inactive_tokens == 0, fired)
    assert state.tokens == 4 * N


def test_aux_revives_dead_latents():
    """Latents that start too weak to be selected come back with AuxK, and stay dead without it."""

    def dead_at_end(aux_weight):
        generator = torch.Generator().manual_seed(3)
        features = torch.randn(64, 16, generator=generator)  # more than there are latents

        def sparse_residuals():
            chosen = torch.rand(L, N, 64, generator=generator).topk(3).indices
            return features[chosen].sum(2)

        torch.manual_seed(0)
        mlsae = MLSAE(MLSAEConfig(16, M, K, (0, 1)))
        state = TrainState(
            mlsae, schedule=lambda _: 3e-3, dead_tokens=8 * N, k_aux=16, aux_weight=aux_weight
        )
        state.initialize(*init_stats(mlsae, [sparse_residuals()])[:2])
        with torch.no_grad():
            mlsae.sae.W_enc[:20] *= 1e-2
        for _ in range(200):
            take(state, [sparse_residuals()], lr=3e-3)
        return int(state.dead().sum())

    assert dead_at_end(0.0) >= 20
    assert dead_at_end(1 / 32) <= 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_before_the_weights(bad):
    state = make()
    take(state, [residuals(0)], lr=1e-2)
    before, moments = weights(state), state.moments.mean.clone()
    x = residuals(1)
    x[1, 3, 2] = bad
    with pytest.raises(NonFiniteError, match=r"layer 1 are not finite at step 1, after 64 tokens"):
        take(state, [x], lr=1e-2)
    for one, other in zip(weights(state), before, strict=True):
        assert torch.equal(one, other)
    assert state.tokens == N
    assert torch.equal(state.moments.mean, moments)
    take(state, [residuals(1)], lr=1e-2)  # and it can go on


@pytest.mark.parametrize("bad", [float("nan"), 0.0])
def test_residuals_that_cannot_be_trained_on_are_named(bad):
    x = residuals(0)
    x[1] = bad
    mlsae = MLSAE(MLSAEConfig(D, M, K, (0, 5)))
    with pytest.raises(InputError, match="those of layer 5"):
        init_stats(mlsae, [x])
