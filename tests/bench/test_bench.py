"""The benchmarks' arithmetic, and their report of a small made-up run.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from bench import report, results
from bench.memory import peak_bytes
from bench.peers import jobs
from bench.results import BenchRun, Timing
from bench.shapes import SHAPES, ProblemShape, scaled
from sparse_topk import costs

TINY = ProblemShape("tiny", n=2, d=3, m=5, k=1)
MACHINE = results.describe_machine() | {"device": "A (TM) chip 2", "driver": None}


def row(impl, seconds, m=100, axis=None, work="step", peak=10**6, matmul=None):
    return Timing(
        work, impl, "medium", 10, 4, m, 2, "float32", seconds, seconds, 5,
        flop=2e9, bytes=1e6, roofline=0.001 * m, peak_bytes=peak, axis=axis, matmul=matmul,
    )  # fmt: skip


def test_costs_are_those_counted_by_hand():
    # x has 6 numbers of 4 bytes, W 15; two values of 4 bytes come out, two indices of 8.
    assert costs.topk_encode(TINY, 4) == (2 * 2 * 3 * 5, 4 * (6 + 15) + 2 * (4 + 8))
    # Two tokens take a row of W each: 2 rows of 3 and 2 results of 3, of 2 bytes.
    assert costs.gather_sum(TINY, 2) == (2 * 2 * 3, 2 * (6 + 6) + 2 * (2 + 8))
    # With K = 4 they name 8 rows, of which only 5 exist.
    assert costs.gather_sum(TINY._replace(k=4), 2) == (2 * 8 * 3, 2 * (15 + 6) + 8 * (2 + 8))
    assert costs.scatter_outer(TINY, 4) == (2 * 2 * 3, 4 * (15 + 6) + 2 * (4 + 8))
    # The two rows chosen, read and written in float32, instead of all five written.
    assert costs.scatter_outer_add(TINY, 2) == (2 * 2 * 3, 8 * 6 + 2 * 6 + 2 * (2 + 8))
    assert costs.keep_topk(TINY, 2) == (0, 2 * 2 * 10)
    assert costs.aux_residual(TINY, 2) == (4 * 6, 4 * 6 + 2 * (6 + 6) + 2 * (4 + 4))
    assert costs.adam(TINY) == (15 * 15, 28 * 15)
    # 6 numbers in and out; 8 bytes for each of 2 tokens; 20 for each of 3 dimensions.
    assert costs.standardize(TINY, 2) == (60, 2 * (6 + 6) + 2 * 8 + 3 * 20)
    # As `gather_sum` above, and x is read.
    assert costs.decode_error(TINY, 2) == (12 + 66, 2 * (6 + 6 + 6) + 2 * 10 + 2 * 8 + 3 * 20)


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    assert costs.Cost(flop=100, bytes=10).roofline(10, 10) == 10
    assert costs.Cost(flop=100, bytes=1000).roofline(10, 10) == 100


def test_auxk_adds_its_parts_to_a_step():
    plain, with_aux = costs.step(TINY, 4), costs.step(TINY, 4, dead=2, k_aux=7)
    assert with_aux[: len(plain)] == plain
    assert with_aux[len(plain)] == costs.topk_encode(ProblemShape("", 2, 3, 2, 2), 4)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_shapes_are_possible(kind):
    """Five values of each size, and K never exceeds M."""
    varied = {axis: {getattr(s, axis) for _, s in scaled(kind)} for axis in "ndmk"}
    assert all(len(sizes) == 5 for sizes in varied.values())
    shapes = [*SHAPES[kind], *(s for _, s in scaled(kind)), *(job[0] for job in jobs(kind))]
    assert all(1 <= s.k <= s.m for s in shapes)


def test_peak_memory_counts_what_is_alive_at_once():
    def work():
        a = torch.ones(1000)  # 4 kB
        b = a + 1  # 8 kB at once
        del a
        return torch.cat([b, b])  # 12 kB at once

    assert peak_bytes(work, torch.device("cpu")) == 12_000


def test_the_exponent_of_a_power_law():
    assert report.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


@pytest.fixture
def runs():
    """The time of ours grows with M, that of dense with M²; the memory of both with √M."""
    scaling = [
        row(impl, 0.001 * m**power, m, axis="m", peak=round(1e4 * m**0.5))
        for impl, power in (("ours", 1), ("dense", 2))
        for m in (100, 400, 1600)
    ]
    named = [row("ours", 0.5, work="encode"), row("dense", 1.0, work="encode")]
    peers = [row("ours", 0.5, matmul=0.25), row("sae-lens", 2.0, matmul=0.5, peak=10**8)]
    return {
        "suite": BenchRun(MACHINE, {"copy, GB/s": 12.5}, named + scaling, {}),
        "peers": BenchRun(MACHINE, {}, peers, {"sae-lens": "1.2.3; more work"}),
    }


def test_saving_a_section_keeps_the_other(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "new")
    for section, run in runs.items():
        path = results.save(section, run)
    assert path.name == "a-tm-chip-2.json"
    assert results.load(path) == runs


def test_the_report_has_all_tables(runs):
    text = report.markdown(runs, "picture.svg")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["M", "100 to 1,600", "ours", "1.00", "1.00", "0.50"] in lines
    assert ["M", "100 to 1,600", "dense", "2.00", "1.00", "0.50"] in lines
    ours, lens = (line for line in lines if line[1:3] == ["medium", "float32"] and len(line) == 8)
    assert ours[0] == "ours"  # the fastest comes first
    assert ours[4] == "2.00"  # twice the matmul
    assert lens[:1] + lens[3:] == ["sae-lens", "2000", "4.00", "20.00", "100", "1.2.3; more work"]
    encode = next(line for line in lines if line[0] == "encode")
    assert encode[3:8] == ["500", "1000", "2.0", "100", "5.00"]
    assert ["copy, GB/s", "12.5"] in lines


def test_the_plot_names_every_impl(runs, tmp_path):
    report.plot(runs, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for impl in ("ours", "dense", "roofline"):
        assert f"<!-- {impl} -->" in text


def test_a_plot_without_scaling_rows_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="varies M"):
        report.plot({"peers": runs["peers"]}, tmp_path / "plot.svg")
