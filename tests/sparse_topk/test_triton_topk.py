"""`topk_encode` in Triton, both ways, against a stable sort and against float64.

Kernels are interpreted if there is no GPU, so sizes are small.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_topk.triton_ops.precision import dot_precision
from sparse_topk.triton_ops.topk import chunked, product, rescore, select, topk_encode
from sparse_topk.triton_ops.topk.dispatch import choose
from tests.helpers.oracles import stable_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
PATHS = ("chunked", "fused")


@pytest.fixture(autouse=True, scope="module")
def poison():
    """An element that a kernel leaves unwritten is NaN, or an index out of range."""
    with pytest.MonkeyPatch.context() as patch:
        empty = torch.empty

        def poisoned(*size, **options):
            tensor = empty(*size, **options)
            return tensor.fill_(NAN if tensor.is_floating_point() else 0x7EADBEEF)

        patch.setattr(torch, "empty", poisoned)
        yield


def check_stable_topk(x, W, b, k, path, latents=None):
    """Scores whose sums are exact: the same indices and the same values."""
    values, indices = topk_encode(x, W, b, k, latents, path=path)
    truth = x.double() @ W.double().T + (0 if b is None else b.double())
    if latents is not None:
        masked = torch.full_like(truth, -INF)
        masked[:, latents] = truth[:, latents]
        truth = masked
    expected_values, expected_indices = stable_topk(truth, k)
    assert values.dtype == x.dtype
    assert indices.dtype == torch.int64
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(values.double(), expected_values, rtol=0, atol=0, equal_nan=True)


def check_by_value(x, W, b, k, path, **options):
    """Real scores: none chosen is smaller than the K-th largest by more than torch's own float32
    product errs and, if scores stay in registers, 2⁻¹⁷ of the score."""
    values, indices = topk_encode(x, W, b, k, path=path, **options)
    bias = 0 if b is None else b.double()
    truth = x.double() @ W.double().T + bias
    plain = (x.float() @ W.float().T).double() + bias
    error = 4 * (plain - truth).abs().max() + 1e-30
    cut = 2.0**-17 if path == "fused" else 0.0
    kth = truth.topk(k).values[:, -1:]
    chosen = truth.gather(1, indices)
    assert (indices.diff(dim=1) > 0).all()
    assert (chosen >= kth - error - cut * kth.abs()).all()
    if x.dtype == torch.float32:
        cut = 0.0  # values are computed again
    rounding = torch.finfo(x.dtype).eps / 2 + cut
    assert ((values.double() - chosen).abs() <= error + rounding * chosen.abs()).all()


def integers(n, d, m, seed, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (n, d), generator=generator)
    W = torch.randint(-2, 3, (m, d), generator=generator)
    b = torch.randint(-2, 3, (m,), generator=generator) if bias else None
    return tuple(None if t is None else t.to(DEVICE, dtype) for t in (x, W, b))


def reals(n, d, m, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (m, d), (m,))
    return tuple(torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)


@given(
    n=st.integers(0, 4),
    d=st.integers(1, 5),
    m=st.integers(1, 200),
    share=st.floats(0, 1),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=8)
def test_chunked_is_a_stable_sort(n, d, m, share, bias, seed):
    check_stable_topk(*integers(n, d, m, seed, bias), 1 + round(share * (m - 1)), "chunked")


@given(
    n=st.integers(1, 2),
    d=st.integers(1, 20),
    m=st.integers(1, 130),
    share=st.floats(0, 1),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=6)
def test_fused_is_a_stable_sort(n, d, m, share, bias, seed):
    check_stable_topk(*integers(n, d, m, seed, bias), 1 + round(share * (m - 1)), "fused")


def in_one_group():
    return torch.where((torch.arange(160) // 8) == 9, 50.0, 0.0) + torch.arange(160) % 7


def neighbors_alike():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-9, 10, (160,), generator=generator).cumsum(0).float()


def heavy_ties():
    return torch.randint(0, 3, (160,), generator=torch.Generator().manual_seed(4)).float()


def few_finite():
    scores = torch.full((160,), -INF)
    scores[[7, 70, 150]] = torch.tensor([-5.0, 2.0, 0.0])
    return scores


def not_finite():
    scores = heavy_ties() - 5
    scores[[3, 90, 91]] = INF
    scores[[5, 31, 120]] = NAN
    scores[[8, 159]] = -INF
    return scores


def minus_zeros():
    return torch.where(torch.arange(160) > 90, 0.0, -0.0)


ADVERSARIES = {
    "all of the top k in one group": in_one_group,
    "correlated neighbors": neighbors_alike,
    "heavy ties": heavy_ties,
    "all equal": lambda: torch.full((160,), 3.0),
    "all negative": lambda: -1 - heavy_ties(),
    "fewer than k finite": few_finite,
    "NaN and infinities": not_finite,
    "zeros of both signs": minus_zeros,
}


@pytest.mark.parametrize("k", [1, 7, 100])
@pytest.mark.parametrize("case", ADVERSARIES)
@pytest.mark.parametrize("path", PATHS)
def test_adversaries(path, case, k):
    """One token, one input: W is the scores. One K is in half precision, whose values come from
    the keys."""
    dtype = torch.float16 if k == 7 else torch.float32
    W = ADVERSARIES[case]()[:, None].to(DEVICE, dtype)
    check_stable_topk(torch.ones(1, 1, device=DEVICE, dtype=dtype), W, None, k, path)


def test_stored_zeros_are_equal_whatever_their_sign(monkeypatch):
    """A sum that begins at 0 is never −0, but a library's product may be."""
    monkeypatch.setattr(chunked, "product", lambda x, W: minus_zeros().to(DEVICE)[None])
    W = torch.zeros(160, 1, device=DEVICE)
    _, indices = topk_encode(W[:1], W, None, 3, path="chunked")
    assert indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_token_is_nan_and_the_others_are_not(path):
    x, W, b = integers(3, 4, 100, seed=1)
    x[1, 2] = NAN
    check_stable_topk(x, W, b, 5, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("infinity", [INF, -INF])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of Inf − Inf
def test_an_infinite_input(path, infinity):
    x, W, b = integers(2, 3, 70, seed=2)
    x[0, 1] = infinity  # ±Inf where W is not 0, NaN where it is; padding must not show
    check_stable_topk(x, W, b, 9, path)


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_of_either_sign_comes_first(path):
    W = torch.arange(40.0)[:, None].to(DEVICE)
    W[4], W[20] = NAN, -torch.tensor(NAN)
    W.view(torch.int32)[20] = -(2**22)  # the quiet NaN with its sign bit set
    check_stable_topk(torch.ones(1, 1, device=DEVICE), W, None, 3, path)


@pytest.mark.parametrize("path", PATHS)
def test_among_a_subset_of_latents(path):
    x, W, b = integers(2, 3, 150, seed=3)
    latents = torch.arange(2, 150, 3, device=DEVICE)
    check_stable_topk(x, W, b, 20, path, latents)


@pytest.mark.parametrize("path", PATHS)
def test_no_token(path):
    x, W, b = integers(0, 3, 10, seed=4)
    values, indices = topk_encode(x, W, b, 10, path=path)
    assert values.shape == indices.shape == (0, 10)


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_do_not_follow_one_another(path):
    x, W, b = integers(6, 8, 50, seed=5)
    check_stable_topk(x[::2, 1:5], W[:, ::2], b, 4, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(path, dtype):
    check_stable_topk(*integers(2, 9, 100, seed=8, dtype=dtype), 11, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_real_scores_by_value(path, dtype):
    """bfloat16 waits for a GPU, below: the interpreter truncates it where a GPU rounds."""
    x, W, b = reals(3, 24, 300, dtype=dtype)
    check_by_value(x, W, b, 20, path)


def test_chunked_scores_are_compared_whole():
    """A difference in the last bit of a float32 counts, and values keep every bit."""
    scores = (torch.full((90,), 1.5).view(torch.int32) + torch.arange(90) * 37 % 90).view(
        torch.float32
    )
    scores = torch.cat([scores, -scores]).to(DEVICE)
    for k in (5, 100):
        check_stable_topk(torch.ones(1, 1, device=DEVICE), scores[:, None], None, k, "chunked")


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "d", "m", "k"), [(300, 512, 5000, 32), (130, 100, 3001, 200)])
def test_real_scores_on_a_gpu(path, dtype, n, d, m, k):
    x, W, b = reals(n, d, m, dtype=dtype)
    check_by_value(x, W, b, k, path)
    once, again = (topk_encode(x, W, b, k, path=path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_segments_give_what_the_whole_gives(path, monkeypatch):
    """Chunks of tokens, and more keys than registers hold."""
    monkeypatch.setattr(chunked, "_WORKSPACE_BYTES", 1)
    monkeypatch.setattr(product, "_KEY_BYTES", 1)
    monkeypatch.setattr(rescore, "_BYTES", 1)
    monkeypatch.setattr(select, "keys_tile", lambda keys: (4 if keys < 20 else 32, 1))
    check_stable_topk(*integers(2, 4, 140, seed=6), 12, path)
    check_stable_topk(*integers(1, 4, 140, seed=6), 120, path)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_of_the_best_two(tma, group, dtype):
    """The product's keys, decoded: scores of D inputs and M latents that no block divides."""
    x, W, b = reals(11, 24, 150, dtype=dtype)
    best, second = product.best_two(x, W, b, group, tma=tma and may_describe())
    truth = x.double() @ W.double().T + b.double()
    padded = torch.nn.functional.pad(truth, (0, -150 % group), value=-INF)
    top = padded.unflatten(1, (-1, group)).topk(2, dim=2)
    error = 4 * ((x.float() @ W.float().T).double() + b.double() - truth).abs().max()
    for keys, expected, member in zip(
        (best, second), top.values.unbind(2), top.indices.unbind(2), strict=True
    ):
        bits = (keys & -group) + 0x400000
        bits = torch.where(bits < 0, bits | (group - 1), bits)
        score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32).double()
        assert ((score - expected).abs() <= error + expected.abs() * group * 2.0**-23).all()
        assert torch.equal(group - 1 - (keys & (group - 1)), member.int())


def may_describe() -> bool:
    return DEVICE == "cpu" or product.describes(torch.cuda.get_device_capability())


def test_a_group_is_opened_only_where_its_second_counts():
    """Two of the three largest are in group 2, of four; group 0 has the third."""
    best = torch.tensor([[40, 10, 90, 30]], dtype=torch.int32, device=DEVICE) * 64
    second = torch.tensor([[20, 5, 80, 1]], dtype=torch.int32, device=DEVICE) * 64
    picks = select.pick_groups(best, second, 3, 256, 64)
    assert picks.tolist() == [[0, 2 * 2 + 1, -1]]


@pytest.mark.parametrize("k", [1, 2, 9, 64])
def test_no_more_than_half_of_k_groups_are_opened(k):
    best = torch.zeros(2, 64, dtype=torch.int32, device=DEVICE)  # all equal: the worst of ties
    picks = select.pick_groups(best, best, k, 64 * 32, 32)
    assert ((picks >= 0) & (picks & 1 == 1)).sum(1).tolist() == [k // 2] * 2


@triton.jit
def blocks_kernel(out_ptr, N, M, BAND_N, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """One program writes the blocks of its tile."""
    tile = tl.program_id(0)
    pid_n, pid_m = product._block_of(tile, N, M, BAND_N, BLOCK_N, BLOCK_M)
    tl.store(out_ptr + tile * 2, pid_n)
    tl.store(out_ptr + tile * 2 + 1, pid_m)


@pytest.mark.parametrize(("n", "m", "band"), [(70, 33, 3), (5, 100, 8), (64, 16, 4)])
def test_tiles_cover_the_product_once(n, m, band):
    blocks = [(i, j) for i in range(-(-n // 8)) for j in range(-(-m // 16))]
    out = torch.empty(len(blocks), 2, dtype=torch.int32, device=DEVICE)
    blocks_kernel[(len(blocks),)](out, n, m, band, BLOCK_N=8, BLOCK_M=16)
    assert sorted(map(tuple, out.tolist())) == blocks
    assert {i for i, _ in out.tolist()[:band]} == set(range(min(band, -(-n // 8))))


def test_the_choice():
    hopper, half = (9, 0), torch.bfloat16
    assert choose(8192, 2048, 2**17, 32, half, hopper) == "fused"
    assert choose(8192, 512, 2**15, 32, half, hopper) == "fused"
    assert choose(8192, 8192, 2**17, 32, half, hopper) == "chunked"  # the product is all
    assert choose(8192, 2048, 13107, 512, half, hopper) == "chunked"  # AuxK
    assert choose(8192, 2048, 2**17, 32, torch.float32, hopper) == "fused"
    assert choose(5, 2048, 2**17, 32, half, hopper) == "chunked"


def test_float32_follows_torchs_own_switch():
    assert dot_precision(torch.float32) == "tf32x3"
    torch.set_float32_matmul_precision("high")
    try:
        assert dot_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float64_is_refused():
    x, W, b = integers(2, 3, 10, seed=7, dtype=torch.float64)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got"):
        topk_encode(x, W, b, 2)
