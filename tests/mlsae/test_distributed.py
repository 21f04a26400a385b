"""Training in several processes is the training in one: in float64, so that nothing else differs.

Legend: L layers, N tokens, D inputs, M latents, K active latents a token.
"""

import time

import pytest
import torch

from mlsae.data.tokens import Batches, BroadcastBatches
from mlsae.distributed import ALONE, LostContactError, choose_device, make_mesh, splits
from mlsae.errors import InputError, NonFiniteError
from mlsae.training.loop import train_step
from tests.helpers.parallel import MESHES, N, flat, make, mine, residuals, run


@pytest.fixture(scope="module")
def alone():
    return run(ALONE.world, 1, range(30))


def assert_same(one, other, **tolerance):
    one, other = flat(one), flat(other)
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(
            one[name].double(), other[name].double(), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shards", MESHES)
def test_many_steps_equal_one_process(team, alone, shards):
    """Weights, optimizer, counters, metrics, held-out figures; with AuxK and clipping at work."""
    sums, state, counts, _ = alone
    assert sums["aux"] > 0
    assert 0 < sums["dead"] < 0.9
    results = team.run(run, shards, range(30))
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    for other, _, _, _ in results:
        assert_same(sums, other, **tolerance)
    assert_same(state, results[0][1], **tolerance)
    assert torch.equal(counts, results[0][2])
    for shard in range(shards):  # to the same bits in all that have the same latents
        first, *others = [weights for _, _, _, (rank, weights) in results if rank == shard]
        for weights in others:
            assert all(torch.equal(a, b) for a, b in zip(first, weights, strict=True))


@pytest.mark.parametrize(("shards", "then"), [(4, 2), (1, 4)])
def test_a_state_goes_on_in_another_number_of_shards(team, alone, shards, then):
    half = team.run(run, shards, range(15))[0][1]
    results = team.run(run, then, range(15, 30), half)
    assert_same(alone[1], results[0][1], rtol=1e-6, atol=1e-6)
    again = run(ALONE.world, 1, range(15, 30), half)
    assert_same(alone[1], again[1], rtol=1e-6, atol=1e-6)


def test_a_state_goes_on_to_the_same_bits(team):
    straight = team.run(run, 2, range(30))[0][1]
    half = team.run(run, 2, range(15))[0][1]
    results = team.run(run, 2, range(15, 30), half)
    assert_same(straight, results[0][1], rtol=0, atol=0)


def poisoned(world, shards):
    mesh = make_mesh(world, torch.device("cpu"), shards, timeout=30)
    state = make(mesh)
    before = [p.detach().clone() for p in state.mlsae.parameters()]
    x = residuals(1)
    x[1, -1, 2] = float("nan")  # a token of the last process
    try:
        train_step([state], mine(x, mesh), N)
    except NonFiniteError as error:
        untouched = all(map(torch.equal, before, state.mlsae.parameters()))
        return str(error), untouched
    return None


@pytest.mark.parametrize("shards", MESHES)
def test_what_is_not_finite_in_one_process_stops_all(team, shards):
    for message, untouched in team.run(poisoned, shards):
        assert "residuals of layer 3 are not finite at step 0" in message
        assert untouched


class Counting:
    """Rows 0, 1, 2, …, each of its number."""

    passes = 1

    def __init__(self):
        self.next = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.next += 1
        return torch.full((3,), self.next - 1)


def shares_of_batches(world):
    if world.rank == 0:
        batches = Batches(Counting(), 6, group=world)
    else:
        batches = BroadcastBatches((6, 3), world)
    mine = splits(6, world.size)[world.rank]
    rows = [next(batches)[mine, 0].tolist() for _ in range(4)]
    batches.close()
    return rows


def test_rows_are_shared_out_without_gap_or_overlap(team):
    """In the order of one process; 6 rows among 4 processes, so that none has more than 2."""
    per_process = team.run(shares_of_batches)
    for step in range(4):
        rows = [row for process in per_process for row in process[step]]
        assert rows == list(range(6 * step, 6 * step + 6))
        assert max(len(process[step]) for process in per_process) == 2


def fails_together(world, failing):
    try:
        with world.raise_together():
            if world.rank in failing:
                raise InputError("--k must be 3, got 4")
    except InputError as error:
        return str(error)
    except SystemExit as error:
        return error.code
    return None


def test_bad_input_in_any_process_ends_all_and_is_said_once(team):
    first, *others = team.run(fails_together, [2])
    assert first.startswith("on rank 2 (")
    assert first.endswith("): --k must be 3, got 4")
    assert others == [2, 2, 2]
    assert team.run(fails_together, [0, 1, 2, 3]) == ["--k must be 3, got 4", 2, 2, 2]
    assert team.run(fails_together, []) == [None] * 4


def waits_for_the_last(world):
    """All but the last call; the last one comes when they have given up."""
    mesh = make_mesh(world, torch.device("cpu"), 2, timeout=2)
    started = time.monotonic()
    if world.rank == world.size - 1:
        return None
    try:
        for group in (mesh.latents, mesh.data, world):
            group.sum_(torch.ones(1))
    except LostContactError as error:
        return str(error), time.monotonic() - started
    return None


def test_nothing_hangs():
    """A process that does not come is missed within the timeout."""
    from tests.helpers.team import Team

    with Team(4, timeout=2) as processes:
        *waited, last = processes.run(waits_for_the_last)
    assert last is None
    for message, seconds in waited:
        assert "lost contact with another process" in message
        assert seconds < 20


def test_an_unknown_device_is_named():
    with pytest.raises(InputError, match=r"--device must be auto, cpu, .* got 'gpu'"):
        choose_device("gpu")
