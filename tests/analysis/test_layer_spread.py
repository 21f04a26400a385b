"""Where latents are active: distributions known in closed form, and a dense oracle.

Legend: L layers, N tokens, M latents.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae.analysis.accumulate import Accumulator, Adjacent
from mlsae.analysis.layer_spread import (
    bootstrap_layer_spread,
    compute_layer_spread,
    released_spread,
)
from sparse_topk import TopK

CPU = torch.device("cpu")


def accumulate(dense, row, groups=4, batches=1):
    """An accumulator updated with dense activations (L, N, M) of tokens in rows `row` (N,)."""
    n_layers, _, n_latents = dense.shape
    n_rows = int(row[-1]) + 1
    accumulator = Accumulator(n_latents, n_layers, n_rows, groups, CPU)
    values, indices = dense.topk(n_latents, dim=2)
    for part in torch.arange(n_rows).chunk(batches):
        keep = (row >= part[0]) & (row <= part[-1])
        accumulator.update(TopK(values[:, keep], indices[:, keep]), row[keep])
    return accumulator


def unweighted(sums):
    return compute_layer_spread(sums, torch.ones(1, len(sums.within), dtype=torch.float64))


def by_hand(cases, n_tokens, n_layers):
    """Dense activations (L, N, M) from a list of (number of tokens, {layer: h}) per latent; no two
    latents are active at the same token."""
    dense = torch.zeros(n_layers, n_tokens, len(cases))
    token = 0
    for latent, parts in enumerate(cases):
        for times, activation in parts:
            for layer, h in activation.items():
                dense[layer, token : token + times, latent] = h
            token += times
    assert token <= n_tokens
    return dense


def test_three_latents_by_hand():
    """One is active at layer 0; one at layer 0 or 2, depending on the token; one always at both."""
    dense = by_hand(
        [[(4, {0: 3.0})], [(2, {0: 1.0}), (2, {2: 5.0})], [(4, {0: 2.0, 2: 2.0})]], 12, 3
    )
    accumulator = accumulate(dense, torch.arange(12) // 4)
    whole, _, _ = accumulator.finish()
    spread = unweighted(whole)
    # Var(L | j) is 0, 1, 1; of a single token 0, 0, 1; E[L | j] is 0, 1, 1.
    assert spread.var_given_latent.item() == pytest.approx(2 / 3)
    assert spread.var_given_latent_token.item() == pytest.approx(1 / 3)
    assert spread.var_layer.item() == pytest.approx(2 / 3 + 2 / 9)  # within and between
    assert spread.A.item() == pytest.approx(3 / 4)
    assert spread.B.item() == pytest.approx(1 / 2)
    # The profiles are (1, 0, 0), (½, 0, ½), (½, 0, ½); the second totals (1, 0, 5) / 6.
    half = math.log(2) / math.log(3)
    assert spread.entropy.item() == pytest.approx(2 / 3 * half)
    sixth = -(math.log(1 / 6) / 6 + 5 / 6 * math.log(5 / 6)) / math.log(3)
    assert spread.entropy_totals.item() == pytest.approx((sixth + half) / 3)
    assert accumulator.counts.view(3, 3).tolist() == [[4, 0, 0], [2, 0, 2], [4, 0, 4]]
    assert accumulator.max.tolist() == [3, 5, 2]
    assert whole.profile[0].sum(1).tolist() == [4, 4, 4]
    assert whole.totals[0].tolist() == [[12, 0, 0], [2, 0, 10], [8, 0, 8]]


def test_rare_latents_show_the_released_estimators_error():
    """Two latents around layers 1 and 4 of 6, each active at 1.2 % of the tokens. Of its 2,000
    tokens, 251 are one layer below, 251 one above, and 138 on each side are half at the center and
    half a layer away:

        Var(L | j) = 2 · (251 + 69) / 2000 = .32;   Var(L | t, j) = ¼ at 276 tokens: .0345 in mean
        Var(L) = .32 + 1.5² = 2.57, since the centers are 1.5 from their mean

    The latents spread over about half a layer, and the released estimator gives A = .997.
    """
    cases = [
        [
            (251, {c - 1: 1.0}), (138, {c - 1: 2.0, c: 2.0}), (1222, {c: 3.0}),
            (138, {c: 2.0, c + 1: 2.0}), (251, {c + 1: 1.0}),
        ]
        for c in (1, 4)
    ]  # fmt: skip
    n_tokens = 171_500
    accumulator = accumulate(by_hand(cases, n_tokens, 6), torch.zeros(n_tokens, dtype=torch.int64))
    whole, _, rows = accumulator.finish()
    equations, code = unweighted(whole), released_spread(rows, 2)
    assert equations.var_layer.item() == pytest.approx(2.57)
    assert equations.A.item() == pytest.approx(0.32 / 2.57)
    assert equations.B.item() == pytest.approx(0.0345 / 0.32)
    assert [round(x.item(), 3) for x in (equations.A, equations.B)] == [0.125, 0.108]
    assert [round(code[name].item(), 3) for name in "AB"] == [0.997, 0.004]


def dense_oracle(dense):
    """E[Var(L|J)], E[Var(L|J,T)] and Var(L) from dense activations (L, N, M), in float64."""
    layers = torch.arange(len(dense), dtype=torch.float64)
    q, within = [], []
    for j in range(dense.shape[2]):
        h = dense[:, :, j].double()
        p = h[:, h.sum(0) > 0]
        if p.shape[1]:
            p = p / p.sum(0)
            q.append(p.mean(1))
            within.append((layers.square() @ p - (layers @ p).square()).mean())
    q = torch.stack(q)
    variance = q @ layers.square() - (q @ layers).square()
    mean = q.mean(0)
    return variance.mean(), sum(within) / len(within), layers.square() @ mean - (layers @ mean) ** 2


def released_oracle(dense):
    """The same three as the released code computes them, from one row (L, N, M)."""
    layers = torch.arange(len(dense), dtype=torch.float64)
    p = (dense.double() / dense.double().sum(0)).nan_to_num(0)

    def variance(x):
        square, mean = (torch.tensordot(f, x, 1) for f in (layers.square(), layers))
        return square - mean.square()

    return variance(p.mean(1)).mean(), variance(p).mean(), variance(p.mean((1, 2)))


@settings(max_examples=25, deadline=None)
@given(
    n_layers=st.integers(1, 5), n_latents=st.integers(2, 7), n_rows=st.integers(1, 5),
    batches=st.integers(1, 3), groups=st.integers(1, 6), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_against_a_dense_oracle(n_layers, n_latents, n_rows, batches, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(n_rows).repeat_interleave(6)
    dense = torch.randn(n_layers, len(row), n_latents, generator=generator).relu()
    dense[0, 0, 0] = 1.0  # at least one latent is active
    accumulator = accumulate(dense, row, groups, batches)
    whole, grouped, rows = accumulator.finish()
    for spread in (unweighted(whole), unweighted(grouped)):
        for got, expected in zip(
            (spread.var_given_latent, spread.var_given_latent_token, spread.var_layer),
            dense_oracle(dense),
            strict=True,
        ):
            torch.testing.assert_close(got[0], expected, rtol=1e-5, atol=1e-6)
    code = released_spread(rows, n_latents)
    for r in range(n_rows):
        for name, expected in zip(
            ("var_given_latent", "var_given_latent_token", "var_layer"),
            released_oracle(dense[:, row == r]),
            strict=True,
        ):
            torch.testing.assert_close(code[name][r], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(whole.totals[0].T, dense.double().sum(1))
    assert torch.equal(accumulator.counts.view(n_latents, -1).T, (dense > 0).sum(1))
    assert torch.equal(accumulator.max, dense.amax((0, 1)))


def test_intervals_have_the_spread_of_repeated_texts():
    """Half the interval's width is 1.96 times the standard deviation of ratio A over 60 texts. The
    latents differ, because the bootstrap is known to fail at A = 1."""
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(32).repeat_interleave(8)

    def text():
        at = torch.linspace(0, 1, 6) + 0.3 * torch.randn(1, 32, 6, generator=generator)
        at = at.repeat_interleave(8, 1)  # the tokens of a row are alike
        layers = torch.arange(4.0)[:, None, None]
        noise = torch.rand(4, 256, 6, generator=generator)
        return (noise - (layers - 3 * at).abs() / 2).relu() + 1e-6

    ratios = []
    for _ in range(60):
        whole, grouped, _ = accumulate(text(), row, groups=32).finish()
        ratios.append(bootstrap_layer_spread(whole, grouped, 300, 0)["A"])
    value, low, high = map(torch.stack, zip(*ratios, strict=True))
    spread = 1.96 * value.std().item()
    assert ((high - low) / 2).mean().item() == pytest.approx(spread, rel=0.25)
    assert ((low < value) & (value < high)).all()


def test_adjacent_residuals_about_their_mean():
    x = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)) + 10
    adjacent = Adjacent(x.mean(1))
    for part in x.split(20, 1):
        adjacent.update(part)
    y = x.double() - x.double().mean(1, keepdim=True)
    norm = y.norm(dim=2)
    cosine = (y[1:] * y[:-1]).sum(2) / (norm[1:] * norm[:-1])
    means = adjacent.as_dict()
    assert means["cosine"] == pytest.approx(cosine.mean(1).tolist(), abs=1e-5)
    assert means["norm"] == pytest.approx(norm.mean(1).tolist(), rel=1e-5)
