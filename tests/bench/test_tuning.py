"""The table of candidates: each takes the place of what the kernel's own function returns."""

import math

import pytest
import torch

from bench import tuning
from bench.record import Record
from bench.tune_table import TUNABLES

BY_NAME = {tunable.kernel: tunable for tunable in TUNABLES}


@pytest.mark.parametrize("tunable", TUNABLES, ids=lambda tunable: tunable.kernel)
def test_every_candidate_is_built_as_it_says(tunable):
    """A candidate has as many numbers as the shipped tile, and each makes another build."""
    choose = getattr(tunable.module, tunable.function)
    for shape in tunable.shapes:
        tiles = tunable.candidates(shape)
        assert len(tiles) >= 2
        assert len({str(tile) for tile in tiles}) == len(tiles)
        built = set()
        for tile in tiles:
            with tuning.tiled(tunable, tile):
                made = tunable.builds(shape, 90)
            built |= {f"{b.constexprs} {b.num_warps} {b.num_stages}" for b in made}
        assert len(built) >= len(tiles) or not made
        assert getattr(tunable.module, tunable.function) is choose  # as it was


def test_the_shipped_tile_is_the_one_that_the_launch_asked_for():
    tunable = BY_NAME["gather_sum"]
    (case,) = tuning.cases(["gather_sum"], "cpu")
    work = tunable.prepare(case.shape, torch.device("cpu"))
    assert tuning.shipped_tile(tunable, work) == tunable.module.gather_sum_tile(256, 8, 4)
    with tuning.tiled(tunable, (128, 2, 1)):
        assert tuning.shipped_tile(tunable, work) == (128, 2, 1)


def test_what_fails_is_said_and_the_others_are_timed(tmp_path, monkeypatch, capsys):
    tunable = BY_NAME["gather_sum"]._replace(candidates=lambda shape: [(100, 8, 1), (256, 8, 1)])
    monkeypatch.setattr(tuning, "TUNABLES", (tunable,))
    record = Record("tune", tmp_path, "cpu", 60)
    tuning.time_cases(record, [], torch.device("cpu"))
    shipped, failed, timed = record.sections["tiles"]
    assert failed["tile"] == "(100, 8, 1)"
    assert failed["µs"] is None
    assert failed["failed"]
    assert timed["µs"] > 0
    assert record.sections["best"][0]["tried"] == "2 of 2"
    assert failed["failed"] in capsys.readouterr().out
    assert shipped["× shipped"] == 1


def test_each_case_has_its_share_of_the_time(tmp_path, monkeypatch):
    """Of ten seconds, the first of two kernels may take five, and the second what is left."""
    left, given = [10.0], []
    monkeypatch.setattr(Record, "time_left", lambda self: left[0])

    def time_case(record, case, device, until):
        given.append((case.tunable.kernel, until))
        left[0] -= 4

    monkeypatch.setattr(tuning, "_time_case", time_case)
    record = Record("tune", tmp_path, "cpu", math.inf)
    tuning.time_cases(record, ["gather_sum", "gather_dot"], torch.device("cpu"))
    assert given == [("gather_sum", 5.0), ("gather_dot", 0.0)]
