"""`topk_encode` in Triton, against a stable sort and against float64; and the keys of its product.
`test_topk_selection.py` has the adversaries of the selection.

Kernels are interpreted if there is no GPU, so sizes are small.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group, T keys per
group.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_topk.triton_ops.precision import dot_precision
from sparse_topk.triton_ops.topk import encode, product, topk_encode
from tests.helpers.oracles import check_topk, keys_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf


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


def check(x, W, b, k, relu=False):
    """Scores whose sums are exact: the same indices and the same values."""
    values, indices = topk_encode(x, W, b, k, relu)
    assert values.dtype == x.dtype
    check_topk(values, indices, x.double() @ W.double().T + (0 if b is None else b.double()), relu)


def check_by_value(x, W, b, k, relu=False):
    """Real scores: none chosen is smaller than the K-th largest by more than torch's own float32
    product errs and 2⁻¹⁷ of the score, the last bits that keys have."""
    values, indices = topk_encode(x, W, b, k, relu)
    truth = x.double() @ W.double().T + b.double()
    plain = (x.float() @ W.float().T).double() + b.double()
    error = 4 * (plain - truth).abs().max() + 1e-30
    kth = truth.topk(k).values[:, -1:]
    chosen = truth.gather(1, indices)
    if relu:
        kth, chosen = kth.relu(), chosen.relu()
    assert (indices.diff(dim=1) > 0).all()
    assert (chosen >= kth - error - 2.0**-17 * kth.abs()).all()
    cut = 0.0 if x.dtype == torch.float32 else 2.0**-17  # float32 values are computed again
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
    n=st.integers(1, 2),
    d=st.integers(1, 20),
    m=st.integers(1, 130),
    share=st.floats(0, 1),
    bias=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=6)
def test_a_stable_sort(n, d, m, share, bias, relu, seed):
    check(*integers(n, d, m, seed, bias), 1 + round(share * (m - 1)), relu)


@pytest.mark.parametrize("relu", [False, True])
def test_a_nan_token_is_nan_and_the_others_are_not(relu):
    x, W, b = integers(3, 4, 70, seed=1)
    x[1, 2] = NAN
    check(x, W, b, 5, relu)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("infinity", [INF, -INF])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of Inf − Inf
def test_an_infinite_input(infinity, relu):
    x, W, b = integers(2, 3, 70, seed=2)
    x[0, 1] = infinity  # ±Inf where W is not 0, NaN where it is; padding must not show
    check(x, W, b, 9, relu)


@pytest.mark.parametrize("relu", [False, True])
def test_a_nan_of_either_sign_comes_first(relu):
    W = torch.arange(40.0)[:, None].to(DEVICE)
    W[4], W[20] = NAN, -torch.tensor(NAN)
    W.view(torch.int32)[20] = -(2**22)  # the quiet NaN with its sign bit set
    check(torch.ones(1, 1, device=DEVICE), W, None, 3, relu)


def test_a_masked_token_has_the_values_zero():
    x, W, _ = integers(2, 4, 70, seed=3, bias=False)
    x[0] = 0
    check(x, W, None, 9, relu=True)


@pytest.mark.parametrize("k", [1, 50])
def test_the_smallest_and_the_largest_k(k):
    check(*integers(2, 3, 50, seed=4), k)


def test_no_token():
    x, W, b = integers(0, 3, 10, seed=4)
    values, indices = topk_encode(x, W, b, 10)
    assert values.shape == indices.shape == (0, 10)


def test_rows_that_do_not_follow_one_another():
    x, W, b = integers(6, 8, 50, seed=5)
    check(x[::2, 1:5], W[:, ::2], b, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    check(*integers(2, 9, 100, seed=8, dtype=dtype), 11)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_real_scores_by_value(dtype, relu):
    """bfloat16 waits for a GPU, below: the interpreter truncates it where a GPU rounds."""
    check_by_value(*reals(2, 24, 300, dtype=dtype), 20, relu)


@pytest.mark.gpu
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "d", "m", "k"),
    [(300, 512, 5000, 32), (130, 100, 3001, 200), (1, 512, 5000, 32), (40, 512, 5000, 5000)],
)
def test_real_scores_on_a_gpu(n, d, m, k, dtype, relu):
    x, W, b = reals(n, d, m, dtype=dtype)
    check_by_value(x, W, b, k, relu)
    once, again = (topk_encode(x, W, b, k, relu) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "n_keys"), [(64, 2), (64, 3), (64, 4), (32, 4), (16, 4), (4, 4)])
def test_every_size_of_group_on_a_gpu(group, n_keys, monkeypatch):
    """Rows in order and rows of equal scores open as many groups as can be."""
    monkeypatch.setattr(encode, "group_size", lambda m, k: (group, n_keys))
    x, W, b = integers(300, 64, 4001, seed=9, dtype=torch.bfloat16)
    x[7], b[:] = 0, 0
    b[2000:2100] = torch.arange(100, device=DEVICE)
    for relu in (False, True):
        check(x, W, b, 40, relu)


def test_segments_give_what_the_whole_gives(monkeypatch):
    monkeypatch.setattr(encode, "_KEY_BYTES", 1)
    check(*integers(2, 4, 70, seed=6), 12)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize(
    ("group", "n_keys", "relu"),
    [(64, 2, True), (32, 3, False), (16, 4, True), (4, 4, False)],
)
def test_keys_of_the_largest(tma, group, n_keys, relu):
    """D inputs and M latents that no block divides, in the sums of a float32 product."""
    x, W, b = integers(3, 24, 150, seed=7)
    x[1, 1] = NAN
    keys = product.top_keys(x, W, b, n_keys, group, relu, tma=tma and may_describe())
    expected = keys_of(x @ W.T + b, group, n_keys, relu)
    assert torch.equal(keys[[0, 2]], expected[[0, 2]])
    nan = keys[1] >= (0x7F800000 if relu else 0x7F800000 - 0x400000)
    assert torch.equal(nan, expected[1] > -(2**31))


def may_describe() -> bool:
    return DEVICE == "cpu" or product.describes(torch.cuda.get_device_capability())


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


def test_few_tokens_have_small_tiles():
    def tile(n, m=2**15):
        return product.product_tile((9, 0), torch.bfloat16, "tf32", True, 64, n, m, 132)

    assert [tile(n).block_n for n in (1, 17, 64, 65)] == [16, 32, 64, 128]
    assert tile(8192)[:3] == (128, 256, 64)
    assert tile(128).block_m < tile(256).block_m  # of 256 latents, one block per processor at least
    assert tile(1, 4096).block_m < tile(1).block_m


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
