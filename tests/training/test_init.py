"""The first weights: the encoder's scale from the first batch, and the paper's initialization.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

import pytest
import torch

from mlsae import MLSAE
from mlsae.config import SAEConfig, TrainConfig, check_config, peak_rate
from mlsae.data.stream import Shape
from mlsae.distributed import ALONE, make_mesh
from mlsae.errors import InputError
from mlsae.model import MLSAEConfig
from mlsae.sharding import ShardedSAE
from mlsae.train import parse
from mlsae.training.init import draw_linear_, fit_scale_, init_stats, mlsae_config
from mlsae.training.optimizers import Optimizers, optimizers_of
from mlsae.training.start import begin, new_state
from sparse_topk import SparseTopKSAE
from sparse_topk.shadows import Shadows

N, D, M, K = 50, 12, 42, 5


def make(sae_class=SparseTopKSAE, *group, seed=0):
    torch.manual_seed(seed)
    sae = sae_class(D, M, K, *group, **({} if group else {"bias": False})).double()
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, D))
    return sae


def vectors(n=N):
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(0, -1, D, dtype=torch.float64)
    return torch.randn(n, D, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("bias", [True, False])
def test_no_other_scale_of_the_encoder_reconstructs_better(bias):
    torch.manual_seed(0)
    sae, x = SparseTopKSAE(D, M, K, bias=bias).double(), vectors().view(2, -1, D)
    with torch.no_grad():
        sae.b_dec.normal_()
        if bias:
            sae.b_enc.normal_(std=0.1)
    before = sae.encode(x).indices

    def error(scale=1.0):
        with torch.no_grad():
            values, indices = sae.encode(x)
            return (sae.decode(type(sae.encode(x))(values * scale, indices)) - x).square().sum()

    unfitted = error()
    assert sae.fit_scale_(x) is sae
    assert error() < 0.9 * unfitted
    assert error() <= min(error(0.999), error(1.001))
    assert torch.equal(sae.encode(x).indices, before), "the same latents stay active"
    weights = sae.W_enc.clone()
    torch.testing.assert_close(sae.fit_scale_(x).W_enc, weights)  # it is fitted


def test_what_has_no_scale_is_left_as_it_is():
    sae = SparseTopKSAE(D, M, K)
    weights = sae.W_enc.clone()
    sae.fit_scale_(torch.zeros(3, D))
    assert torch.equal(sae.W_enc, weights)
    with pytest.raises(ValueError, match="must be finite, got the sums nan"):
        sae.fit_scale_(torch.full((3, D), torch.nan))
    assert torch.equal(sae.W_enc, weights)


def fitted_by_shards(world, shards):
    mesh = make_mesh(world, torch.device("cpu"), shards, timeout=30)
    sae = make(ShardedSAE, mesh.latents)
    own = vectors().tensor_split(mesh.data.size)[mesh.data.rank]
    fit_scale_(sae, own, mesh.data)
    return sae.rows.start, sae.W_enc.detach()


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_several_processes_fit_the_scale_of_one(team, shards, monkeypatch):
    """By shards of the latents and by tokens."""
    alone = make()
    fit_scale_(alone, vectors())
    if shards == 1:
        monkeypatch.setattr("mlsae.training.init._VECTORS_AT_ONCE", 7)
        parts = make()
        fit_scale_(parts, vectors())
        torch.testing.assert_close(parts.W_enc, alone.W_enc)
        return
    for start, W_enc in team.run(fitted_by_shards, shards):
        torch.testing.assert_close(W_enc, alone.W_enc[start : start + len(W_enc)])


def test_the_papers_encoder_is_linears_own():
    """Kaiming's with a = √5 is uniform in ±1/√D (torch.nn.Linear), so rows have norms near 1/√3."""
    config = MLSAEConfig(64, 2000, K, (0,))
    torch.manual_seed(0)
    sae = MLSAE(config).sae
    draw_linear_(sae)
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 2000, bias=False)
    assert sae.W_enc.abs().max() <= 1 / 8
    torch.testing.assert_close(sae.W_enc.std(), linear.weight.std(), rtol=0.02, atol=0)
    torch.testing.assert_close(sae.W_enc.norm(dim=1).mean().item(), 3**-0.5, rtol=0.01, atol=0)
    torch.testing.assert_close(sae.W_dec, torch.nn.functional.normalize(sae.W_enc, dim=1))


@pytest.mark.parametrize("init", ["fitted", "unit", "linear"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_training_begins_with_the_encoder_that_is_asked_for(init, activation):
    k_max = 4 * K if activation == "batchtopk" else None
    size = MLSAEConfig(D, M, K, (0, 1), k_max=k_max)
    x = vectors(2 * N).float().view(2, N, D)

    def begun(**options):
        sae = SAEConfig(n_latents=M, k=K, init=init, activation=activation)
        config = TrainConfig(sae=sae, **options)
        state = new_state(config, size, torch.device("cpu"), ALONE, 1000)
        first = init_stats(state.mlsae, [x])
        begin(config, state, first)
        return state.mlsae.sae, first

    sae, first = begun()
    assert torch.equal(sae.b_dec, first.center)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
    if init == "linear":
        torch.testing.assert_close(torch.nn.functional.normalize(sae.W_enc), sae.W_dec)
        assert sae.W_enc.abs().max() <= D**-0.5
        assert sae.W_enc.norm(dim=1).std() > 0.01
    else:
        expected = SparseTopKSAE(D, M, K, bias=False)
        with torch.no_grad():
            expected.W_dec.copy_(sae.W_dec)
            expected.W_enc.copy_(sae.W_dec)
            expected.b_dec.copy_(sae.b_dec)
        if init == "fitted":
            expected.fit_scale_(first.vectors)
            assert 0.2 < expected.W_enc.norm(dim=1).mean() < 0.9
        torch.testing.assert_close(sae.W_enc, expected.W_enc)
    loaded, _ = begun(init_from="a trained SAE")  # whose weights stay
    assert (loaded.b_dec == 0).all()
    if init != "linear":
        assert torch.equal(loaded.W_enc, loaded.W_dec)


def test_the_peak_rate_is_the_law():
    """By hand, for 2¹⁴ latents: twice as fast for four times fewer; slower for more tokens, and
    NorMuon's the same for all runs below 10⁵."""

    def peak(optimizer, n_latents, tokens, lr=None):
        return peak_rate(TrainConfig(optimizer=optimizer, lr=lr), n_latents, tokens)

    assert peak("adam", 2**14, 10**9) == pytest.approx(2e-4)
    assert peak("normuon", 2**14, 10**9) == pytest.approx(8e-4)
    assert peak("normuon", 2**12, 10**9) == pytest.approx(16e-4)
    assert peak("normuon", 2**14, 10**6) == pytest.approx(8e-4 * 10**0.96)
    assert peak("normuon", 2**14, 10**5) == peak("normuon", 2**14, 1)
    assert peak("adam", 2**14, 10**4) == pytest.approx(2e-4 * 10**1.6)
    assert peak("normuon", 2**14, 10**9, lr=0.5) == 0.5
    assert peak("auto", 2**14, 10**6) == peak("normuon", 2**14, 10**6)
    assert peak("auto", 2**14, 10**7) == peak("adam", 2**14, 10**7)


def test_each_weight_has_the_optimizer_that_is_asked_for():
    def settings(*arguments, tokens=10**6):
        return optimizers_of(parse(list(arguments))[0], tokens)[:3]

    assert settings() == ("normuon", "normuon", (0.5, 0.95))
    longest = 4000 * 2048  # of the default batch
    assert settings(tokens=longest) == settings()
    assert settings(tokens=longest + 1) == ("adam", "adam", (0.7, 0.95))
    assert settings("--batch_tokens", "4096", tokens=longest + 1) == settings()
    assert settings("--optimizer", "normuon", tokens=longest + 1) == settings()
    assert settings("--optimizer", "adam") == ("adam", "adam", (0.7, 0.95))
    assert settings("--decoder_optimizer", "adam") == ("normuon", "adam", (0.5, 0.95))
    assert settings("--betas", "0.9", "0.99") == ("normuon", "normuon", (0.9, 0.99))
    sae = SparseTopKSAE(D, M, K)
    sae(vectors().float()).sum().backward()
    states = {}
    for names in (("normuon", "adam"), ("adam", "normuon"), ("adam", "adam")):
        optimizer = Optimizers(*names).of(sae, Shadows(torch.float32))
        optimizer.step()
        states[names] = [
            "row_sq" in optimizer.state[weight] for weight in (sae.W_enc, sae.W_dec, sae.b_dec)
        ]
    assert list(states.values()) == [[True, False, False], [False, True, False], [False] * 3]


@pytest.mark.parametrize("betas", [("1", "0.9"), ("0.5", "-0.1")])
def test_betas_out_of_range_are_refused(betas):
    (config,) = parse(["--betas", *betas])
    with pytest.raises(InputError, match=r"--betas must be in \[0, 1\), got"):
        check_config(config)


def test_the_papers_preset_is_the_papers():
    (paper,) = parse(["--preset", "paper"])
    assert (paper.optimizer, paper.decoder_optimizer, paper.betas) == ("adam", None, (0.9, 0.999))
    assert paper.sae.init == "linear"
    assert mlsae_config(paper, Shape(8, (0,), 4)).n_latents == 512
    (default,) = parse([])
    assert (default.optimizer, default.sae.init) == ("auto", "fitted")
