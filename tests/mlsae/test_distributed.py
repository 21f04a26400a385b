"""Training in several processes equals training in one, in float64, where rounding is negligible.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

import time

import pytest
import torch

from mlsae.data.config import DataConfig
from mlsae.data.stream import DataStream, read_shape
from mlsae.data.tokens import Batches, BroadcastBatches
from mlsae.distributed import ALONE, LostContactError, choose_device, make_mesh, splits
from mlsae.errors import InputError, NonFiniteError
from mlsae.training.loop import train_step
from tests.helpers.models import save_gpt2
from tests.helpers.parallel import SHARDS, N, flat, make, mine, residuals, run
from tests.helpers.parts import unmasked


@pytest.fixture(scope="module")
def alone():
    return run(ALONE.world, 1, range(30))


def assert_same(state, expected, **tolerance):
    state, expected = flat(state), flat(expected)
    assert list(state) == list(expected)
    for name in expected:
        torch.testing.assert_close(
            state[name].double(),
            expected[name].double(),
            **tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("shards", SHARDS)
def test_many_steps_equal_one_process(team, alone, shards):
    """Weights, optimizer, counters, metrics, validation metrics; with AuxK and clipping at work."""
    metrics, state, counts, _ = alone
    assert metrics["aux"] > 0
    assert 0 < metrics["dead"] < 0.9
    results = team.run(run, shards, range(30))
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    for team_metrics, _, _, _ in results:
        assert_same(team_metrics, metrics, **tolerance)
    assert_same(results[0][1], state, **tolerance)
    assert torch.equal(results[0][2], counts)
    for shard in range(shards):  # ranks with the same latents have the same bits
        first, *rest = [weights for _, _, _, (rank, weights) in results if rank == shard]
        for weights in rest:
            assert all(torch.equal(a, b) for a, b in zip(first, weights, strict=True))


@pytest.mark.parametrize("shards", SHARDS)
def test_orthogonalized_steps_equal_one_process(team, shards):
    """NorMuon's matrices of D × D are sums over all rows of a weight."""
    expected = run(ALONE.world, 1, range(10), None, "normuon")
    results = team.run(run, shards, range(10), None, "normuon")
    assert_same(results[0][1], expected[1], rtol=1e-6, atol=1e-6)
    half = team.run(run, shards, range(5), None, "normuon")[0][1]
    resumed = run(ALONE.world, 1, range(5, 10), half, "normuon")[1]
    assert_same(resumed, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shards", "then"), [(4, 2), (1, 4)])
def test_training_resumes_with_another_number_of_shards(team, alone, shards, then):
    half = team.run(run, shards, range(15))[0][1]
    resumed = team.run(run, then, range(15, 30), half)[0][1]
    assert_same(resumed, alone[1], rtol=1e-6, atol=1e-6)
    resumed_alone = run(ALONE.world, 1, range(15, 30), half)[1]
    assert_same(resumed_alone, alone[1], rtol=1e-6, atol=1e-6)


def test_training_resumes_to_the_same_bits(team):
    straight = team.run(run, 2, range(30))[0][1]
    half = team.run(run, 2, range(15))[0][1]
    resumed = team.run(run, 2, range(15, 30), half)[0][1]
    assert_same(resumed, straight, rtol=0, atol=0)


def train_with_nan(world, shards):
    mesh = make_mesh(world, torch.device("cpu"), shards, timeout=30)
    state = make(mesh)
    before = [p.detach().clone() for p in state.mlsae.parameters()]
    x = residuals(1)
    x[1, -1, 2] = float("nan")  # a token of the last process
    try:
        train_step([state], map(unmasked, mine(x, mesh)), N)
    except NonFiniteError as error:
        untouched = all(map(torch.equal, before, state.mlsae.parameters()))
        return str(error), untouched
    return None


@pytest.mark.parametrize("shards", SHARDS)
def test_residuals_that_are_not_finite_in_one_process_stop_all(team, shards):
    for message, untouched in team.run(train_with_nan, shards):
        assert "residuals of layer 3 are not finite at step 0" in message
        assert untouched


class NumberedRows:
    """Rows 0, 1, 2, …, each filled with its number."""

    passes = 1

    def __init__(self):
        self.next = 0

    def take(self, n):
        first, self.next = self.next, self.next + n
        return torch.arange(first, self.next)[:, None].repeat(1, 3)

    def close(self):
        pass


def own_rows_of_batches(world):
    if world.rank == 0:
        batches = Batches(NumberedRows(), 6, group=world)
    else:
        batches = BroadcastBatches((6, 3), world)
    own = splits(6, world.size)[world.rank]
    rows = [next(batches)[own, 0].tolist() for _ in range(4)]
    batches.close()
    return rows


def test_rows_are_split_without_gap_or_overlap(team):
    """6 rows among 4 processes, in the order of one process: none has more than 2."""
    per_process = team.run(own_rows_of_batches)
    for step in range(4):
        rows = [row for process in per_process for row in process[step]]
        assert rows == list(range(6 * step, 6 * step + 6))
        assert max(len(process[step]) for process in per_process) == 2


def raise_on(world, failing):
    try:
        with world.raise_together():
            if world.rank in failing:
                raise InputError("--k must be 3, got 4")
    except InputError as error:
        return str(error)
    except SystemExit as error:
        return error.code
    return None


def test_bad_input_in_any_process_ends_all_with_one_message(team):
    message, *exit_codes = team.run(raise_on, [2])
    assert message.startswith("on rank 2 (")
    assert message.endswith("): --k must be 3, got 4")
    assert exit_codes == [2, 2, 2]
    assert team.run(raise_on, [0, 1, 2, 3]) == ["--k must be 3, got 4", 2, 2, 2]
    assert team.run(raise_on, []) == [None] * 4


def wait_for_the_last(world):
    """All ranks but the last make collective calls."""
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
    """A process that does not join a call makes it fail within the timeout."""
    from tests.helpers.team import Team

    with Team(4, timeout=2) as processes:
        *waited, last = processes.run(wait_for_the_last)
    assert last is None
    for message, seconds in waited:
        assert "lost contact with another process" in message
        assert seconds < 20


def test_an_unknown_device_is_named():
    with pytest.raises(InputError, match=r"--device must be auto, cpu, .* got 'gpu'"):
        choose_device("gpu")


def found_massive(world, model, shards):
    """The rule, its line, and the residuals that this process keeps of 10 rows."""
    mesh = make_mesh(world, torch.device("cpu"), shards, timeout=30) if world.size > 1 else ALONE
    config = DataConfig(model, "builtin", model_dtype="float32")
    device = torch.device("cpu")
    stream = DataStream(config, read_shape(config), device, mesh, micro_rows=2, whole=False)
    input_ids = torch.arange(640).view(10, 64) % 300 + 10
    line = stream.resolve_drop(input_ids)
    kept = torch.cat(list(stream.residuals(input_ids)), 1)
    return stream.drop, line, kept


@pytest.mark.parametrize("shards", SHARDS)
def test_massive_tokens_are_found_and_dropped_as_in_one_process(team, tmp_path, shards):
    model = save_gpt2(tmp_path, massive=50)
    rule, line, kept = found_massive(ALONE.world, model, 1)
    assert "position 0 (10 of 10)" in line
    results = team.run(found_massive, model, shards)
    for other, other_line, _ in results:
        assert other == results[0][0], "to the same bits in all"
        assert other_line == line
        assert other.medians == pytest.approx(rule.medians)
    first_of_groups = [x for _, _, x in results[::shards]]
    torch.testing.assert_close(torch.cat(first_of_groups, 1), kept)
