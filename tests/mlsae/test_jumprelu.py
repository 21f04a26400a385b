"""JumpReLU: sparse codes against the dense definition, in float64 where it is the truth.

Legend: N tokens, D inputs, M latents.
"""

import pytest
import torch

from mlsae import DenseSAE, jumprelu, load_sae
from mlsae.errors import InputError
from mlsae.jumprelu import JumpReLUSAE

N, D, M = 50, 12, 96


def make(k_max=M, *, one=False, bias=True, seed=0):
    """An SAE whose tokens have 2 to 20 latents active, of which some have large thresholds."""
    generator = torch.Generator().manual_seed(seed)
    sae = JumpReLUSAE(D, M, min(8, k_max), k_max, bias=bias)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    sae.threshold = torch.tensor(4.0) if one else torch.rand(M, generator=generator) * 8 + 1
    return sae


def inputs(seed=1):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def by_definition(sae, x):
    """h (N, M) in float64: z where z > θ, else 0."""
    z = (x.double() - sae.b_dec.double()) @ sae.W_enc.double().T
    z = z if sae.b_enc is None else z + sae.b_enc.double()
    return torch.where(z > sae.threshold.double(), z, 0)


def to_dense(codes):
    zeros = codes.values.new_zeros(*codes.values.shape[:-1], M)
    return zeros.scatter(-1, codes.indices, codes.values)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("one", [True, False])
def test_codes_are_those_of_the_definition(one, bias):
    sae, x = make(one=one, bias=bias), inputs().view(5, 10, D)
    expected = by_definition(sae, x)
    room = int((expected > 0).sum(-1).max())
    sae.k_max = room
    codes = sae.encode(x)
    assert codes.values.shape == codes.indices.shape == (5, 10, room)
    torch.testing.assert_close(to_dense(codes).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(to_dense(codes) > 0, expected > 0)
    torch.testing.assert_close(sae.dense(x).double(), expected, rtol=1e-5, atol=1e-5)
    out = sae.reconstruct(x)
    x_hat = expected @ sae.W_dec.double() + sae.b_dec.double()
    torch.testing.assert_close(out.x_hat.double(), x_hat, rtol=1e-4, atol=1e-4)


def test_a_score_that_is_large_but_below_its_threshold_gives_way_to_a_smaller_one():
    sae = JumpReLUSAE(2, 2, 1, 1, bias=False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
    sae.threshold = torch.tensor([10.0, 1.0])
    values, indices = sae.encode(torch.tensor([[9.0, 2.0], [10.0, 1.0], [11.0, 1.0]]))
    assert values.tolist() == [[2.0], [0.0], [11.0]]  # a score equal to its threshold is not active
    assert indices[[0, 2]].tolist() == [[1], [0]]
    assert sae.dense(torch.tensor([[10.0, 1.0], [11.0, 2.0]])).tolist() == [[0, 0], [11, 2]]


def test_a_vector_with_more_latents_than_a_code_has_room_for_is_told_and_counted(monkeypatch):
    monkeypatch.setattr(jumprelu, "_CHUNK", 7)  # several chunks of tokens and of latents
    sae, x = make(), inputs()
    active = (by_definition(sae, x) > 0).sum(1)
    assert torch.equal(sae.count_active(x), active)
    sae.k_max = int(active.median())
    codes, excess = sae.encode_capped(x.view(10, 5, D))
    assert torch.equal(excess.flatten(), (active - sae.k_max).clamp_min(0))
    assert 0 < (excess > 0).sum() < N
    told = rf"k_max must be at least {active.max()}, .* got {sae.k_max}, which {(excess > 0).sum()}"
    for call in (sae.encode, sae.reconstruct, sae):
        with pytest.raises(InputError, match=told):
            call(x)
    whole = excess.flatten() == 0
    kept = to_dense(codes).view(N, M).double()
    torch.testing.assert_close(kept[whole], by_definition(sae, x)[whole], rtol=1e-5, atol=1e-5)
    over = torch.where(kept > 0, kept - sae.threshold, torch.inf).amin(1)  # the least that was kept
    left = torch.where(kept > 0, 0, by_definition(sae, x) - sae.threshold).amax(1)
    assert (left[~whole] <= over[~whole] + 1e-5).all()


def test_nothing_is_counted_where_no_code_is_full(monkeypatch):
    def refuse(self, *arguments):
        raise AssertionError("a dense score was computed")

    sae, x = make(), inputs()
    sae.k_max = int((by_definition(sae, x) > 0).sum(1).max()) + 1
    monkeypatch.setattr(JumpReLUSAE, "_scores", refuse)
    assert sae.encode(x).values.shape == (N, sae.k_max)


def test_gradients_are_those_of_the_dense_formula():
    sae, x = make(), inputs().requires_grad_()
    weights = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    (sae(x) * weights).sum().backward()
    actual = [x.grad, *(parameter.grad for parameter in sae.parameters())]
    x.grad = None
    sae.zero_grad()
    h = by_definition(sae, x)
    x_hat = h @ sae.W_dec.double() + sae.b_dec.double()
    (x_hat * weights.double()).sum().backward()
    for found, parameter in zip(actual, [x, *sae.parameters()], strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_vector_that_is_not_finite_stays_so():
    sae, x = make(), inputs()
    x[3, 0] = torch.nan
    assert sae.encode(x).values[3].isnan().all()
    assert sae.dense(x)[3].isnan().all()
    assert not sae.encode(x).values[[2, 4]].isnan().any()


def test_bfloat16_rounds_values_and_no_more():
    sae, x = make(), inputs()
    expected = by_definition(sae, x)
    with torch.autocast("cpu", torch.bfloat16):
        codes = sae.encode(x)
    assert codes.values.dtype == torch.bfloat16
    clear = (expected == 0) | ((expected - sae.threshold).abs() > 0.3)
    found = to_dense(codes).double()
    error = (found - expected).where(clear, 0).abs()
    dense = (x - sae.b_dec).bfloat16() @ sae.W_enc.bfloat16().T + sae.b_enc.bfloat16()
    plain = (dense.double() - expected).where((expected > 0) & clear, 0).abs().max()
    near = (expected == 0) & (found > 0)  # rounding crossed a threshold
    assert error.where(~near, 0).max() <= 3 * plain
    assert near.sum() <= 5


def test_norms_are_folded_with_the_thresholds():
    for sae in (make(), make(one=True)):
        x = inputs()
        before, x_hat = sae.dense(x), sae(x)
        sae.fold_norms_()
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
        assert torch.equal(sae.dense(x) > 0, before > 0)
        torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    sae, x = make(), inputs()
    sae.save_pretrained(tmp_path)
    loaded = load_sae(tmp_path)
    assert (loaded.k, loaded.k_max) == (sae.k, sae.k_max)
    assert torch.equal(loaded.dense(x), sae.dense(x))
    assert torch.equal(DenseSAE(loaded).encode(x), sae.dense(x))
    assert DenseSAE(loaded).cfg.architecture == "jumprelu"
    assert load_sae(tmp_path, k_max=5).k_max == 5
    for k_max in (0, M + 1):
        with pytest.raises(InputError, match=rf"k_max must be in \[1, {M}\], got {k_max}"):
            load_sae(tmp_path, k_max=k_max)
