"""Training in several processes is the training in one: in float64, so that nothing else differs.

Legend: L layers, N tokens, D inputs, M latents, K active latents a token.
"""

import copy
import time
from unittest import mock

import pytest
import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae import survey as survey_module
from mlsae.data import Batches, Received
from mlsae.distributed import ALONE, LostContactError, mesh, shares
from mlsae.errors import InputError
from mlsae.measure import evaluate
from mlsae.survey import survey
from mlsae.trainer import NonFiniteError, Step, Trainer

L, N, D, M, K = 2, 61, 8, 49, 4
MESHES = [1, 2, 4]  # of 4 processes: shards of the latents


def make(ranks):
    torch.manual_seed(0)
    mlsae = MLSAE(MLSAEConfig(D, M, K, (0, 3)), shards=ranks.latents).double()
    trainer = Trainer(
        mlsae, dead_tokens=100, k_aux=6, aux_weight=1 / 32, max_grad_norm=1.0, data=ranks.data
    )
    with mock.patch.object(survey_module, "_MEDIAN_VECTORS", L * 40):  # of L · 61
        trainer.initialize(*survey(mlsae, mine(residuals(99), ranks), ranks.data))
    return trainer


def residuals(seed, n=N):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, n, D, generator=generator, dtype=torch.float64)
    return x * torch.tensor([1.0, 9.0])[:, None, None] + 2


def mine(x, ranks):
    """The parts of x (L, N, D) that this process has, of at most 20 tokens."""
    share = shares(x.shape[1], ranks.data.size)[ranks.data.rank]
    return [part for part in x[:, share].split(20, dim=1) if part.shape[1]]


def train(trainer, ranks, seeds):
    """Sums of the last step; one of them has fewer tokens than processes."""
    for seed in seeds:
        x = residuals(seed, 3 if seed % 10 == 7 else N)
        step = Step(trainer, x.shape[1])
        for part in mine(x, ranks):
            step.add(part)
        step.check()
        sums = step.end(lr=1e-2)
    return {
        "fvu": sums.fvu(), "loss": sums.loss, "aux": sums.aux,
        "dead": torch.tensor(trainer.dead_share()),
    }  # fmt: skip


def flat(state, prefix=""):
    tensors = {}
    for name, value in state.items():
        if isinstance(value, dict):
            tensors |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor):
            tensors[prefix + name] = value.detach().clone()
    return tensors


def run(everyone, shards, seeds, state=None):
    """Train, from a state if given: the first process's state, and every process's sums."""
    ranks = mesh(everyone, torch.device("cpu"), shards, timeout=30) if everyone.size > 1 else ALONE
    trainer = make(ranks)
    if state:
        trainer.load_state_dict(copy.deepcopy(state))  # processes share what is sent to them
    sums = train(trainer, ranks, seeds)
    figures = evaluate([trainer.mlsae], mine(residuals(500), ranks), ranks.data)[0]
    sums |= {"heldout": figures.fvu, "l0": figures.l0}
    whole = trainer.state_dict() if ranks.data.rank == 0 else None
    first = ranks.everyone.rank == 0
    own = [p.detach().clone() for p in trainer.mlsae.parameters()]
    counts = figures.counts if first else None
    return sums, whole if first else None, counts, (ranks.latents.rank, own)


@pytest.fixture(scope="module")
def alone():
    return run(ALONE.everyone, 1, range(30))


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
    again = run(ALONE.everyone, 1, range(15, 30), half)
    assert_same(alone[1], again[1], rtol=1e-6, atol=1e-6)


def test_a_state_goes_on_to_the_same_bits(team):
    straight = team.run(run, 2, range(30))[0][1]
    half = team.run(run, 2, range(15))[0][1]
    results = team.run(run, 2, range(15, 30), half)
    assert_same(straight, results[0][1], rtol=0, atol=0)


def poisoned(everyone, shards):
    ranks = mesh(everyone, torch.device("cpu"), shards, timeout=30)
    trainer = make(ranks)
    before = [p.detach().clone() for p in trainer.mlsae.parameters()]
    x = residuals(1)
    x[1, -1, 2] = float("nan")  # a token of the last process
    step = Step(trainer, N)
    for part in mine(x, ranks):
        step.add(part)
    try:
        step.check()
    except NonFiniteError as error:
        untouched = all(map(torch.equal, before, trainer.mlsae.parameters()))
        return str(error), untouched
    return None


@pytest.mark.parametrize("shards", MESHES)
def test_what_is_not_finite_in_one_process_stops_all(team, shards):
    for message, untouched in team.run(poisoned, shards):
        assert "residuals of layer 3 are not finite at step 0" in message
        assert untouched


class Counting:
    """Rows 0, 1, 2, …, each of its number."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.next += 1
        return torch.full((3,), self.next - 1)


def shares_of_batches(everyone):
    if everyone.rank == 0:
        batches = Batches(Counting(), 6, group=everyone)
    else:
        batches = Received((6, 3), everyone)
    mine = shares(6, everyone.size)[everyone.rank]
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


def fails_together(everyone, failing):
    try:
        with everyone.together():
            if everyone.rank in failing:
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


def waits_for_the_last(everyone):
    """All but the last call; the last one comes when they have given up."""
    ranks = mesh(everyone, torch.device("cpu"), 2, timeout=2)
    started = time.monotonic()
    if everyone.rank == everyone.size - 1:
        return None
    try:
        for group in (ranks.latents, ranks.data, everyone):
            group.sum_(torch.ones(1))
    except LostContactError as error:
        return str(error), time.monotonic() - started
    return None


def test_nothing_hangs():
    """A process that does not come is missed within the timeout."""
    from team import Team

    with Team(4, timeout=2) as processes:
        *waited, last = processes.run(waits_for_the_last)
    assert last is None
    for message, seconds in waited:
        assert "lost contact with another process" in message
        assert seconds < 20
