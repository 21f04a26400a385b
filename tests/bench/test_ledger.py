"""The ledger counts what it is given, and holds a training step to what it must do.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import pytest
import torch

from bench.ledger import count_step, counting, describe, must_move
from bench.ledger_costs import OPS
from bench.shapes import TRAININGS, ProblemShape, TrainShape
from sparse_topk import NorMuon, UnitNormAdam, costs, ops

LAUNCHES = {False: 40, True: 80}
"""Of a training step with one part of a batch, without dead latents and with some."""
BYTES = 1.3
"""Times what the step's ops must move."""

N, D, M, K = 64, 32, 512, 8
S = ProblemShape("", N, D, M, K)


def counted(work, *made, **answers):
    """The lines of `work`, called with the fake tensors that each of `made` makes."""
    with counting(**answers) as ledger:
        arguments = [make() for make in made]
        with ledger:
            work(*arguments)
    return {name: line for name, line in ledger.lines.items() if line.launches or line.waits}


def floats(*size, dtype=torch.float32):
    return lambda: torch.empty(size, dtype=dtype)


def ids(*size):
    return lambda: torch.empty(size, dtype=torch.int64)


def bytes_of(work, *made):
    """Bytes and launches of work that is not an op of the package."""
    lines = counted(work, *made).values()
    return sum(line.bytes for line in lines), sum(line.launches for line in lines)


def test_torch_reads_its_inputs_and_writes_its_outputs():
    a, b = floats(10, 20), floats(10, 20)  # 800 bytes each
    assert bytes_of(lambda a, b: a + b, a, b) == (2400, 1)
    assert bytes_of(lambda a, b: a.add_(b), a, b) == (2400, 1)
    assert bytes_of(lambda a, b: a.copy_(b), a, b) == (1600, 1)
    assert bytes_of(lambda a, b: torch.add(a, b, out=b), a, b) == (2400, 1)
    assert bytes_of(lambda a, b: torch.neg(a, out=b), a, b) == (1600, 1)
    assert bytes_of(lambda a, b: a @ b.T, a, b) == (1600 + 400, 1)
    assert bytes_of(lambda a, b: a + b[0], a, b) == (1600 + 80, 1)
    assert bytes_of(lambda a: a.bfloat16(), a) == (1200, 1)
    assert bytes_of(lambda a: a.zero_(), a) == (800, 1)
    assert bytes_of(lambda a: a.square().sum(), a) == (1600 + 804, 2)


def test_views_and_allocations_are_free():
    def work(a):
        a.T.flatten(0, 0)[2:].unsqueeze(0).expand(5, 18, 10).detach()
        torch.empty_like(a)
        a.new_empty(3)
        a.contiguous()

    assert counted(work, floats(10, 20)) == {}


def test_an_expanded_tensor_is_as_large_as_its_memory():
    assert bytes_of(lambda a, b: a + b.expand(10, 20), floats(10, 20), floats(20)) == (1680, 1)


def test_indexing_touches_the_elements_that_are_named():
    rows = bytes_of(lambda a, i: a[i], floats(1000, 20), ids(3))
    assert rows == (2 * 240 + 24, 1)
    put = bytes_of(lambda a, i, v: a.index_put_((i,), v), floats(1000, 20), ids(3), floats(3, 20))
    assert put == (240 + 240 + 24, 1)


HALF = torch.float16
CODES = floats(N, K, dtype=HALF), ids(N, K)


def test_an_op_is_counted_by_its_cost_and_its_launches_as_they_come():
    x, W = floats(N, D, dtype=HALF), floats(M, D, dtype=HALF)
    lines = counted(ops.gather_sum, *CODES, W)
    assert set(lines) == {"gather_sum"}
    assert (lines["gather_sum"].calls, lines["gather_sum"].launches) == (1, 1)
    assert lines["gather_sum"].bytes == costs.gather_sum(S, 2).bytes

    def both(values, indices, x):
        csc = ops.csc_by_latent(indices, M)
        ops.scatter_outer(values, csc, x)
        ops.scatter_outer(values, csc, x)

    lines = counted(both, *CODES, x)
    assert set(lines) == {"csc_by_latent", "scatter_outer"}
    assert lines["scatter_outer"].calls == 2
    assert lines["scatter_outer"].launches >= 2
    assert lines["scatter_outer"].bytes == 2 * costs.scatter_outer(S, 2).bytes
    assert lines["csc_by_latent"].bytes == costs.csc_by_latent(S).bytes


def test_the_product_is_modelled_by_its_flop_and_a_gather_by_its_rows():
    shape = ProblemShape("", 8192, 2048, 131072, 32)
    x, W = floats(8192, 2048, dtype=HALF), floats(131072, 2048, dtype=HALF)
    line = counted(lambda x, W: ops.topk_encode(x, W, None, 32), x, W)["topk_encode"]
    assert line.seconds == costs.topk_encode(shape, 2).flop / 750e12
    line = counted(ops.gather_sum, floats(8192, 32, dtype=HALF), ids(8192, 32), W)["gather_sum"]
    assert line.seconds == 8192 * 32 * 2048 * 2 / 2.8e12  # the 537 MB of W are in no cache


def test_a_plain_function_is_counted_too():
    """The optimizer's step is no torch operator."""

    def step(weight):
        optimizer = UnitNormAdam([weight])
        weight.grad = torch.empty_like(weight)
        optimizer.step()

    lines = counted(step, floats(M, D))
    assert lines["adam_unit_norm_"].bytes == costs.adam(S).bytes


def test_normuon_is_counted_by_its_passes_and_products():
    def step(weight):
        optimizer = NorMuon([weight], unit_norm=True, dtype=HALF)
        weight.grad = torch.empty_like(weight)
        optimizer.step()

    lines = counted(step, floats(M, D))
    assert lines["tangent_momentum_"].bytes == costs.tangent_momentum(S, 2, unit_norm=True).bytes
    assert lines["apply_rows_"].bytes == costs.apply_rows(S, 2).bytes
    assert lines["torch mm"].calls >= 2
    must = costs.normuon(S, 2, unit_norm=True).bytes
    assert must == M * D * (16 + 2 + 3 * 2 + 8 + 2) + 8 * M  # by hand


def test_a_wait_for_the_device_is_counted():
    def work(a, mask):
        a.sum().item()
        a[mask]
        mask.nonzero()

    lines = counted(
        work, floats(M, D), lambda: torch.empty(M, dtype=torch.bool), n_latents=M, dead=3
    )
    assert sum(line.waits for line in lines.values()) == 3
    assert lines["torch index"].bytes == 2 * 3 * D * 4 + M
    with pytest.raises(NotImplementedError, match=r"asked the device for a torch.int64"):
        counted(lambda a: int(a.sum()), ids(3))


def test_an_op_without_a_cost_is_named(monkeypatch):
    monkeypatch.delitem(OPS, "gather_sum")
    with pytest.raises(KeyError, match="no cost of the op gather_sum"):
        counted(ops.gather_sum, *CODES, floats(M, D, dtype=HALF))


def test_what_a_step_must_move_is_counted_by_hand():
    """One layer, 2 tokens of 3 inputs, 5 latents, 1 of them active; 2 bytes a number."""
    tiny = TrainShape("", 1, 2, 3, 5, 1)
    x, W, codes = 2 * 2 * 3, 2 * 5 * 3, 2 * (2 + 8)
    chosen = 2 * 2 * 3  # 2 of the 5 rows
    center, moments = 4 * 3, 2 * 8 * 3
    parts = [x + x + 16 + center + moments, x + W + codes, chosen + x + codes]
    parts += [chosen + x + codes + x + 16 + center + moments]
    parts += [8 * (2 + 2 + 6), *2 * [4 * 15 + x + codes], codes + 20, *2 * [28 * 15], 2 * W]
    assert must_move(tiny) == sum(parts)


def test_the_table_names_all_that_was_called():
    shape = TRAININGS["cpu"][1]
    ledger = count_step(shape)
    text = describe(shape, ledger)
    for name in ("topk_encode", "decode_backward", "scatter_outer", "adam_unit_norm_", "torch "):
        assert f"| {name}" in text
    total = ledger.total()
    assert f"{total.launches} launches, {total.waits} waits" in text
    assert total.launches == sum(line.launches for line in ledger.lines.values())


@pytest.mark.parametrize("shape", TRAININGS["cuda"], ids=lambda shape: shape.name)
def test_a_training_step_does_no_more_than_it_must(shape):
    """Few launches, no pass over memory that no op needs, and one wait, for the loss."""
    ledger = count_step(shape)
    total = ledger.total()
    told = describe(shape, ledger)
    assert total.launches <= LAUNCHES[shape.dead > 0], told
    assert total.bytes <= BYTES * must_move(shape), told
    assert total.waits <= 1, told
