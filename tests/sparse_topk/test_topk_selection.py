"""The selection from each group's T largest keys, against a stable sort of all scores. The keys are
made here in plain torch, so no product is interpreted.

Kernels are interpreted if there is no GPU, so sizes are small.

Legend: N tokens, M latents, K active latents per token, G latents per group, T keys per group.
"""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_topk.triton_ops.topk import product
from sparse_topk.triton_ops.topk import select as selection
from sparse_topk.triton_ops.topk.encode import expected_opened, group_size
from sparse_topk.triton_ops.topk.select import SelectTile, select
from tests.helpers.oracles import check_topk, keys_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
SIZES = [(8, 2), (16, 3), (8, 4), (4, 4)]  # G, T
TILE = SelectTile(block_j=8, block_k=128, block_d=4, warps=1)


def choose(scores, k, group, n_keys, relu, tile=TILE, dtype=torch.float16):
    """What `select` makes of the keys of scores (N, M): values and indices. A token's one input is
    its row of scores, so that the scores of a group can be computed again."""
    n = len(scores)
    values = torch.full((n, k), NAN, device=DEVICE, dtype=dtype)
    indices = torch.full((n, k), 2**40, device=DEVICE)
    keys = keys_of(scores, group, n_keys, relu).to(DEVICE)
    x = torch.ones(1, 1, device=DEVICE)
    for row in range(n):
        part = slice(row, row + 1)
        W = scores[row, :, None].to(DEVICE)
        select(keys[part], x, W, None, group, relu, values[part], indices[part], tile=tile)
    return values, indices


def some(*choices, seed=0, m=90):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(choices)[torch.randint(len(choices), (m,), generator=generator)]


def not_finite():
    scores = some(-1.0, 0.0, 1.0)
    scores[[3, 40, 41]] = INF
    scores[[5, 31, 80]] = NAN
    scores[[8, 89]] = -INF
    scores.view(torch.int32)[4] = -(2**22)  # the quiet NaN with its sign bit set
    return scores


ADVERSARIES = {
    "all of the K largest in one group": torch.where(torch.arange(90) // 16 == 2, 50.0, 0.0)
    + torch.arange(90) % 7,
    "in order": torch.arange(90.0),
    "in reverse order": -torch.arange(90.0),
    "heavy ties": some(0.0, 1.0, 2.0),
    "all equal": torch.full((90,), 3.0),
    "all zero": torch.zeros(90),
    "all negative": some(-1.0, -2.0, -4.0),
    "mixed signs": torch.randint(-9, 10, (90,), generator=torch.Generator().manual_seed(1)).float(),
    "few finite": torch.where(torch.arange(90) % 40 == 7, 2.0, -INF),
    "NaN and infinities": not_finite(),
    "NaN alone": torch.full((90,), NAN),
    "zeros of both signs": torch.where(torch.arange(90) > 50, 0.0, -0.0),
}


@pytest.mark.parametrize(("group", "n_keys"), SIZES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", ADVERSARIES)
def test_adversaries(case, relu, group, n_keys):
    scores = ADVERSARIES[case][None]
    ks = (1, 7, 90 if group == n_keys else 18)
    k = ks[(list(ADVERSARIES).index(case) + n_keys + relu) % 3]
    check_topk(*choose(scores, k, group, n_keys, relu), scores, relu)


@given(
    sizes=st.sampled_from(SIZES),
    m=st.integers(1, 150),
    share=st.floats(0, 1),
    levels=st.integers(1, 40),
    relu=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=25)
def test_a_stable_sort(sizes, m, share, levels, relu, seed):
    group, n_keys = sizes
    known = n_keys * (m // group) + min(n_keys, m % group)
    k = 1 + round(share * (min(m, known) - 1))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (1, m), generator=generator).float()
    check_topk(*choose(scores, k, group, n_keys, relu), scores, relu)


@pytest.mark.parametrize(("k", "relu"), [(120, False), (120, True), (70, False)])
def test_more_keys_than_registers_hold(k, relu):
    tile = SelectTile(block_j=8, block_k=16, block_d=4, warps=1)
    scores = some(-2.0, -1.0, 0.0, 1.0, 2.0, seed=2, m=120)[None]
    check_topk(*choose(scores, k, 4, 4, relu, tile), scores, relu)


def test_scores_are_compared_to_the_last_bit_that_keys_have():
    """At G = 8, three bits are lost: then the smaller index comes first."""
    scores = (torch.tensor(1.5).view(torch.int32) + torch.arange(90) * 37 % 90).view(torch.float32)
    cut = (scores.view(torch.int32) & -8).view(torch.float32)[None]
    values, indices = choose(scores[None], 20, 8, 3, False, dtype=torch.float16)
    _, expected = check_topk(values, indices, cut, False, rtol=2**-11)
    assert torch.equal(indices, expected)


def test_float32_values_are_computed_again():
    scores = torch.randn(1, 90, generator=torch.Generator().manual_seed(3))
    for relu in (False, True):
        values, indices = choose(scores, 40, 8, 4, relu, dtype=torch.float32)
        kept = scores.to(DEVICE).gather(1, indices)
        assert torch.equal(values, kept.relu() if relu else kept)


@pytest.fixture
def opened(monkeypatch):
    """The groups that the selection opens, in order."""
    if DEVICE == "cuda":
        pytest.skip("kernels are not interpreted")
    groups, open_group = [], selection.open_group

    def count(group, *arguments):
        groups.append(int(group.handle.data.item()))
        open_group(group, *arguments)

    monkeypatch.setattr(selection, "open_group", count)
    return groups


def taken_whole(scores, k, group, n_keys):
    """(N, J) whether all of a group's T keys are among the K largest of all groups' keys."""
    best = scores.unflatten(1, (-1, group)).topk(n_keys, dim=2).values  # (N, J, T)
    return best[..., -1] >= best.flatten(1).topk(k).values[:, -1:]


@pytest.mark.parametrize(("group", "n_keys"), SIZES)
def test_a_group_is_opened_only_if_all_of_its_keys_are_taken(opened, group, n_keys):
    scores = torch.randn(3, 96, generator=torch.Generator().manual_seed(4))
    scores[:, 36:40] += 9
    choose(scores, 9, group, n_keys, True)
    hides = torch.zeros_like(scores).scatter(1, scores.topk(9).indices, 1.0)
    hides = (hides.unflatten(1, (-1, group)).sum(2) > n_keys).nonzero()[:, 1].tolist()
    full = taken_whole(scores, 9, group, n_keys).nonzero()[:, 1].tolist()
    assert len(hides) <= len(opened) <= (0 if group == n_keys else len(full))
    assert set(hides) <= set(opened) <= set(full)
    assert full


def test_a_last_group_of_as_many_latents_as_keys_hides_nothing(opened):
    scores = torch.arange(83.0)[None]
    check_topk(*choose(scores, 4, 16, 3, False), scores, False)
    assert opened == []


@pytest.mark.parametrize("case", ["all zero", "all negative"])
def test_rows_without_a_positive_score_open_nothing_with_relu(opened, case):
    """A masked token is such a row."""
    choose(ADVERSARIES[case][None], 18, 16, 3, True)
    assert opened == []


def test_a_group_whose_keys_others_displaced_is_not_opened(opened):
    """All scores are equal. Three of each group are taken, then all sixteen of the first group."""
    choose(torch.full((1, 90), 3.0), 18, 16, 3, False)
    assert opened == [0]


@pytest.mark.parametrize(("group", "n_keys"), [(32, 2), (16, 3), (32, 3), (32, 4)])
def test_as_many_groups_are_opened_as_expected(group, n_keys):
    """On scores in no order, counted: the bound holds, and is less than a third above the count."""
    n, m, k = 4000, 4096, 32
    scores = torch.rand(n, m, generator=torch.Generator().manual_seed(5))
    counts = taken_whole(scores, k, group, n_keys).sum(1).double()
    noise = 4 * counts.std() / math.sqrt(n)
    bound = expected_opened(m, k, group, n_keys)
    assert counts.mean() <= bound + noise
    assert counts.mean() >= 0.75 * bound - noise


def test_the_sizes_of_groups():
    assert group_size(2**15, 32) == (64, 3)
    assert group_size(2**17, 32) == (64, 3)
    assert group_size(2**16, 256) == (64, 4)
    assert group_size(4096, 1024) == (4, 4)


@given(m=st.integers(1, 2**21), share=st.floats(0, 1))
def test_the_keys_always_hold_k_latents(m, share):
    k = 1 + round(share * (m - 1))
    group, n_keys = group_size(m, k)
    assert n_keys * (m // group) + min(n_keys, m % group) >= k
    tile = selection.select_tile(-(-m // group), k, group)
    assert n_keys == group or tile.block_k >= k
    assert expected_opened(m, k, group, n_keys) <= 1.5


@triton.jit
def merge_kernel(a_ptr, b_ptr, out_ptr, N, merge: tl.constexpr, T: tl.constexpr):
    """One program merges the lists a and b (T, N) into their T largest, out (T, N)."""
    offs = tl.arange(0, 128)
    lists = ()
    for t in tl.static_range(T):
        lists += (tl.load(a_ptr + t * N + offs, offs < N, other=0),)
    for t in tl.static_range(T):
        lists += (tl.load(b_ptr + t * N + offs, offs < N, other=0),)
    if T == 2:
        merged = merge(lists[0], lists[1], lists[2], lists[3])
    elif T == 3:
        merged = merge(lists[0], lists[1], lists[2], lists[3], lists[4], lists[5])
    else:
        merged = merge(
            lists[0], lists[1], lists[2], lists[3], lists[4], lists[5], lists[6], lists[7]
        )
    for t in tl.static_range(T):
        tl.store(out_ptr + t * N + offs, merged[t], offs < N)


@pytest.mark.parametrize(
    "merge", [product._largest_2, product._largest_3, product._largest_4], ids=["2", "3", "4"]
)
def test_lists_merge_into_their_largest_however_they_interleave(merge):
    """On a GPU a reduction is a tree, which merges whole lists; the interpreter merges each key
    into a list by itself, so what it sums says nothing of that."""
    n_keys = {product._largest_2: 2, product._largest_3: 3, product._largest_4: 4}[merge]
    ranks = set(range(2 * n_keys))
    chosen = list(itertools.combinations(sorted(ranks, reverse=True), n_keys))
    a = torch.tensor(chosen, dtype=torch.int32, device=DEVICE).T.contiguous()
    others = [sorted(ranks - set(c), reverse=True) for c in chosen]
    b = torch.tensor(others, dtype=torch.int32, device=DEVICE).T.contiguous()
    out = torch.full_like(a, -1)
    merge_kernel[(1,)](a, b, out, a.shape[1], merge, n_keys)
    expected = torch.arange(2 * n_keys - 1, n_keys - 1, -1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(out, expected[:, None].expand_as(out))
