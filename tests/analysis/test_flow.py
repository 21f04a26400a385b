"""How latents follow one another along the layers, against counts by hand and by loops.

Legend: L layers, N tokens, K active latents per token, M latents.
"""

import itertools
import math
from collections import Counter

import pytest
import torch

from mlsae.analysis import flow
from mlsae.analysis.flow import FlowCounts
from sparse_topk import TopK

CPU = torch.device("cpu")


def codes_of(active, k):
    """Codes (L, N, K) from sets of latents, active[layer][token]; the rest of the K slots hold
    other latents, with the value 0."""
    n_layers, n = len(active), len(active[0])
    values, indices = torch.zeros(n_layers, n, k), torch.zeros(n_layers, n, k, dtype=torch.int64)
    for layer, token in itertools.product(range(n_layers), range(n)):
        own = active[layer][token]
        others = [j for j in range(99) if j not in own][: k - len(own)]
        latents = sorted([*own, *others])
        indices[layer, token] = torch.tensor(latents)
        values[layer, token] = torch.tensor([float(j in own) for j in latents])
    return TopK(values, indices)


def random_sets(n_layers, n, m, k, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        size = int(torch.randint(0, k + 1, (), generator=generator))
        return set(torch.randperm(m, generator=generator)[:size].tolist())

    return [[draw() for _ in range(n)] for _ in range(n_layers)]


def active_counts(active, m):
    counts = torch.zeros(m, len(active), dtype=torch.int64)
    for layer, tokens in enumerate(active):
        for own in tokens:
            counts[list(own), layer] += 1
    return counts


def measured(active, m, k, parts=1):
    counts = FlowCounts(m, len(active), len(active[0]), CPU)
    codes = codes_of(active, k)
    for values, indices in zip(
        codes.values.chunk(parts, 1), codes.indices.chunk(parts, 1), strict=True
    ):
        counts.update(TopK(values, indices))
    return counts.finish(active_counts(active, m))


@pytest.mark.parametrize("parts", [1, 3])
def test_counts_are_those_of_a_loop_over_tokens(monkeypatch, parts):
    monkeypatch.setattr(flow, "_LEAST", 1)
    m, k = 12, 4
    active = random_sets(4, 40, m, k, seed=0)
    found = measured(active, m, k, parts)
    continued = torch.zeros(m, 3, dtype=torch.int64)
    ended, began, pairs = Counter(), Counter(), Counter()
    for layer in range(3):
        for now, after in zip(active[layer], active[layer + 1], strict=True):
            continued[list(now & after), layer] += 1
            ended.update((i, layer) for i in now - after)
            began.update((j, layer) for j in after - now)
            pairs.update(itertools.product(now - after, after - now))
    assert torch.equal(found.continued, continued)
    assert found.tokens == found.pair_tokens == 40
    assert found.missed == 0
    listed = set()
    for i, j, n, share, chance, strength in zip(*(x.tolist() for x in found.pairs), strict=True):
        all_ended = sum(ended[i, layer] for layer in range(3))
        all_began = sum(began[j, layer] for layer in range(3))
        expected = sum(ended[i, layer] * began[j, layer] for layer in range(3)) / 40
        assert n == pairs[i, j] > expected
        assert share == pytest.approx(n / all_ended)
        assert chance == pytest.approx(expected / all_ended)
        assert strength == pytest.approx((n - expected) / math.sqrt(all_ended * all_began))
        listed.add((i, j))
    assert found.pairs.strength.tolist() == sorted(found.pairs.strength.tolist(), reverse=True)
    for i, j in pairs:
        expected = sum(ended[i, layer] * began[j, layer] for layer in range(3)) / 40
        assert ((i, j) in listed) == (pairs[i, j] > expected)


def planted(n, m, seed=0):
    """Latent 2 begins where 1 ends; 5 is active at every layer; the rest is noise."""
    active = random_sets(3, n, m - 6, 3, seed)
    active = [[{j + 6 for j in own} | {5} for own in tokens] for tokens in active]
    for token in range(0, n, 2):
        active[0][token].add(1)
        active[1][token].add(2)
    return active


def test_a_latent_that_begins_where_another_ends_is_found():
    found = measured(planted(60, 30), 30, 8)
    assert (found.pairs.ended[0], found.pairs.began[0]) == (1, 2)
    assert found.pairs.share[0] == 1
    assert found.pairs.strength[0] == pytest.approx(0.5)
    assert found.pairs.chance[0] == pytest.approx(0.5)
    columns = found.columns()
    assert columns["follower"][1] == 2
    assert columns["follower_share"][1] == 1
    assert columns["continues"][5] == 1
    assert columns["continues"][1] == 0
    assert columns["follower"][5] == -1
    assert columns["continues"][0].isnan()
    told = found.as_dict()
    assert told["pairs"][0]["ended"] == 1
    for layer in range(2):
        continued = found.continued[:, layer].sum().item() / 60
        assert told["active"][layer] - told["ended"][layer] == pytest.approx(continued)
        assert told["active"][layer + 1] - told["began"][layer + 1] == pytest.approx(continued)
    assert told["began"][0] == told["active"][0]
    assert told["ended"][-1] == told["active"][-1]


def test_rare_pairs_are_given_up_when_there_are_too_many(monkeypatch):
    """The strongest stays, and what its count can have lost is told."""
    whole = measured(planted(60, 30), 30, 8)
    monkeypatch.setattr(flow, "_MOST_PAIRS", 50)
    found = measured(planted(60, 30), 30, 8, parts=10)
    assert found.missed > 0
    assert (found.pairs.ended[0], found.pairs.began[0]) == (1, 2)
    counts = dict(zip(zip(*(x.tolist() for x in whole.pairs[:2]), strict=True),
                      whole.pairs.tokens.tolist(), strict=True))  # fmt: skip
    for i, j, n, *_ in zip(*(x.tolist() for x in found.pairs), strict=True):
        assert counts[i, j] - found.missed <= n <= counts[i, j]
    assert torch.equal(found.continued, whole.continued)


def test_pairs_of_a_long_text_are_counted_at_some_of_its_tokens(monkeypatch):
    monkeypatch.setattr(flow, "_PAIR_TOKENS", 20)
    active = planted(60, 30)
    found = measured(active, 30, 8, parts=4)
    assert found.pair_tokens == 20
    some = [[own for t, own in enumerate(tokens) if t % 3 == 0] for tokens in active]
    monkeypatch.setattr(flow, "_PAIR_TOKENS", 60)
    expected = measured(some, 30, 8)
    for column, same in zip(found.pairs, expected.pairs, strict=True):
        assert torch.equal(column, same)
    assert torch.equal(found.continued, measured(active, 30, 8).continued)


def test_nothing_active_is_no_error():
    nothing = [[set() for _ in range(5)] for _ in range(2)]
    found = measured(nothing, 4, 2)
    assert found.continued.sum() == 0
    assert len(found.pairs.ended) == 0
    assert found.as_dict()["pairs"] == []
    empty = FlowCounts(4, 2, 0, CPU)
    empty.update(TopK(torch.zeros(2, 0, 2), torch.zeros(2, 0, 2, dtype=torch.int64)))
    assert empty.finish(torch.zeros(4, 2, dtype=torch.int64)).as_dict()["active"] == [0, 0]
