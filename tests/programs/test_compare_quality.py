"""`scripts.compare_quality` on our own trainer, and on little text. The peers are not needed: what
they leave is measured by the same code, and how they train is checked in each comparison."""

import argparse
import functools
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from mlsae.config import TrainConfig, learning_rate
from mlsae.data.config import DataConfig
from mlsae.data.stream import DataStream
from mlsae.errors import InputError
from mlsae.evaluation.faithfulness import measure_faithfulness
from mlsae.evaluation.token_metrics import compute_token_metrics
from mlsae.model import MLSAE, MLSAEConfig
from scripts import compare_quality, study
from scripts.quality import harvest as harvesting
from scripts.quality import measure, peers, worker
from scripts.quality.harvest import harvest, open_stream
from scripts.quality.measure import InModel
from scripts.quality.table import table
from scripts.quality.trainers import TRAINERS, law
from scripts.quality.vectors import Vectors, standardized

TOKENS, BATCH, SLICE = 2048, 256, 512
SIZES = [
    "--tokens", str(TOKENS), "--batch_tokens", str(BATCH), "--n_latents", "64", "--k", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    """Rows of 64 tokens of little text, and residuals of float16 as the harvest stores them."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    text = Path(argparse.__file__).read_text()
    pieces = [text[i : i + 500] for i in range(0, 60_000, 500)]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    config = functools.partial(DataConfig, dataset=str(path), seq_len=64, heldout_share=0.2)
    read = DataStream._read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataStream, "_read", lambda self, rows: read(self, rows).half().float())
        patch.setattr(study, "DataConfig", config)
        patch.setattr(harvesting, "DataConfig", config)
        patch.setattr(measure, "PREDICTED_TOKENS", 128)
        yield


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, short_text):
    return harvest(tmp_path_factory.mktemp("residuals"), TOKENS, BATCH, SLICE)


def train_here(cell, vectors, envs, out):
    return worker.work(cell | {"package": None}, vectors.folder, out)


def compare(results, vectors, *arguments, train=train_here):
    data = ["--data", str(vectors.folder), "--slice_tokens", str(SLICE)]
    compare_quality.main([str(results), *SIZES, *data, *arguments], train)
    return compare_quality.read(results)


@pytest.mark.parametrize(
    ("trainer", "settings", "tolerance"),
    [
        # NorMuon makes small singular values of a gradient as large as the others, and with them
        # its rounding: a rate 1e-7 higher changes FVU by 2e-4.
        ("normuon", ["--optimizer", "normuon"], 6e-4),
        ("adam", ["--optimizer", "adam"], 2e-5),
        (
            "0.2",
            ["--optimizer", "adam", "--betas", "0.9,0.999", "--init", "unit", "--decay", "0.2"],
            2e-5,
        ),
    ],
)
def test_our_trainer_ends_where_the_training_program_does(
    tmp_path, vectors, monkeypatch, trainer, settings, tolerance
):
    """The study trains by the program's own loop, on residuals straight from the transformer."""
    (line,) = compare(tmp_path / "ours", vectors, "--trainer", f"{trainer}=0.2", "--seed", "1")
    monkeypatch.setattr(study, "SLICE_TOKENS", SLICE)
    factor = str(line["lr"] / law(line))
    study.main([str(tmp_path / "study"), *SIZES, "--seed", "1", "--factor", factor, *settings])
    expected = json.loads((tmp_path / "study").read_text())
    assert line["lr"] == pytest.approx(expected["lr"])
    for name in ("fvu", "fvu_choose", "l0"):
        assert line[name] == pytest.approx(expected[name], abs=tolerance), name
    layers = expected["fvu_layers"]
    assert line["fvu_layers"] == pytest.approx(layers, abs=2 * tolerance + 1e-4)
    assert line["never_active"] == expected["never_active"]
    assert line["fvu"] < 0.9  # so that there is something to be equal in


def test_factor_one_is_the_rate_of_the_training_program():
    given = compare_quality.parse(["x", "--trainer", "normuon=1", "adam=3", "--seed", "0"])
    normuon, adam = compare_quality.cells_of(given)
    level = TrainConfig(tokens=400_000, warmup=0.0, decay=0.0)
    assert normuon["lr"] == learning_rate(level, 3072, 0)
    assert adam["lr"] == pytest.approx(3 * 2e-4 / (3072 / 2**14) ** 0.5 * 2500**0.32)


def test_batches_are_those_of_the_training_program_without_special_tokens(vectors):
    stream = open_stream(None, whole=False)
    batches = stream.batches(BATCH // stream.seq_len)
    for (x, counted), rows in zip(vectors.batches(), batches, strict=False):
        expected = torch.cat(list(stream.residuals(rows)), dim=1)
        torch.testing.assert_close(x, expected, rtol=0, atol=0)
        assert counted == stream.count(rows)
    batches.close()
    total = [counted for _, counted in vectors.about.batches]
    assert sum(total[:-1]) < TOKENS <= sum(total)


def test_vectors_are_standardized_as_our_own_model_does(vectors):
    x, _ = next(vectors.batches())
    mlsae = MLSAE(MLSAEConfig(x.shape[-1], 8, 2, vectors.about.layers))
    torch.testing.assert_close(
        standardized(x), mlsae.standardize(x).x.flatten(0, 1), rtol=0, atol=0
    )


def test_a_folder_of_other_residuals_is_refused(vectors, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        compare(tmp_path / "x", vectors, "--tokens", "9000")
    assert end.value.code == 2
    assert "--data must be a new folder or hold the residuals asked for" in capsys.readouterr().err


def test_fvu_is_of_the_report_slice_and_never_active_is_of_both(vectors):
    torch.manual_seed(0)
    mlsae = MLSAE(MLSAEConfig(192, 2048, 1, vectors.about.layers)).requires_grad_(False)
    found = measure.fit_figures(mlsae, vectors)
    active = set()
    for name in ("choose", "report"):
        x = torch.cat(list(vectors.heldout(name)), dim=1)
        values, indices = mlsae.encode(x)
        active |= set(indices[values > 0].tolist())
    mean = x.double().mean(1, keepdim=True)
    error, spread = (x - mlsae(x)).double(), x.double() - mean
    fvu = error.square().sum((1, 2)) / spread.square().sum((1, 2))
    assert 0 < len(active) < 2048
    assert found["never_active"] == pytest.approx(1 - len(active) / 2048, abs=1e-5)
    assert found["fvu"] == pytest.approx(fvu.mean().item(), abs=1e-5)
    assert found["fvu_layers"] == pytest.approx(fvu.tolist(), abs=1e-4)


def test_delta_ce_is_that_of_an_evaluation_also_when_ablations_are_not_run_again(vectors):
    torch.manual_seed(0)
    model, config = InModel(vectors), MLSAEConfig(192, 64, 4, vectors.about.layers)
    saes = [MLSAE(config).requires_grad_(False) for _ in range(2)]
    figures = [model.figures(sae) for sae in saes]
    for sae, found in zip(saes, figures, strict=True):
        sums = measure_faithfulness(sae, model.stream.reader, model.rows, model.kept, 1).sums
        metrics = compute_token_metrics(sums, torch.ones(1, len(model.rows), dtype=torch.float64))
        for name in ("delta_ce", "recovered_mean", "recovered_zero"):
            expected = getattr(metrics, name).mean().item()
            assert found[name] == pytest.approx(expected, abs=2e-5), name
    assert figures[0]["delta_ce"] != figures[1]["delta_ce"]


def test_a_comparison_that_was_stopped_goes_on_where_it_was(tmp_path, vectors):
    results, trained = tmp_path / "results", []

    def stopped(cell, *rest):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append((cell["trainer"], cell["seed"]))
        return train_here(cell, *rest)

    def to_the_end(cell, *rest):
        trained.append((cell["trainer"], cell["seed"]))
        return train_here(cell, *rest)

    asked = ["--trainer", "adam", "--seed", "0", "1"]
    with pytest.raises(KeyboardInterrupt):
        compare(results, vectors, *asked, train=stopped)
    (first,) = compare_quality.read(results)
    assert len(compare(results, vectors, *asked, train=to_the_end)) == 2
    assert trained == [("adam", 0), ("adam", 1)]
    lines = compare(results, vectors, "--trainer", "adam=2", "--seed", "0", train=to_the_end)
    assert trained[2:] == [("adam", 0)]  # another rate is another training
    assert lines[0] == first
    assert lines[2]["lr"] == 2 * first["lr"]


def test_the_table_has_the_mean_and_half_the_difference_of_the_seeds(capsys, tmp_path):
    figures = {"recovered_mean": 0.5, "never_active": 0.01, "step_seconds": 0.25}
    size = {"tokens": 400_000, "batch_tokens": 2048, "layers": None}
    size |= {"n_latents": 3072, "k": 32}
    signum = {"trainer": "sparsify-signum", "factor": 1.0, "lr": 0.01} | size
    adam = {"trainer": "adam", "factor": 0.5, "seed": 3} | size
    adam["lr"] = 0.5 * 2e-4 / (3072 / 2**14) ** 0.5 * 2500**0.32
    lines = [
        signum | figures | {"seed": 1, "fvu": 0.2, "delta_ce": 0.3, "never_active": 0.03},
        signum | figures | {"seed": 0, "fvu": 0.1, "delta_ce": 0.5},
        adam | figures | {"fvu": 0.125, "delta_ce": 0.25},
        adam | figures | {"fvu": 0.9, "delta_ce": 0.25, "tokens": 1000},
    ]
    heading, _, first, second = table(lines[:3]).splitlines()
    assert [cell.strip() for cell in first.split("|")[3:-1]] == [
        "3", "0.1250", "0.2500", "50.0%", "1.0%", "0.25",
    ]  # fmt: skip
    assert "(0.5 × law)" in first
    assert [cell.strip() for cell in second.split("|")[2:-1]] == [
        "0.01 (1 × default)", "0 1", "0.1500 ± 0.0500", "0.4000 ± 0.1000", "50.0%", "2.0%", "0.25",
    ]  # fmt: skip
    assert heading.count("|") == second.count("|")
    results = tmp_path / "results"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare_quality.main([str(results), "--table"])
    assert capsys.readouterr().out.splitlines() == table(lines[:3]).splitlines()


def test_a_peer_whose_losses_are_not_its_own_is_refused(vectors, monkeypatch):
    def build(errors):
        def peer(size, cell, native):
            losses = iter([1.0, 0.9, 0.8] if native else [1.0, 0.9 + errors, 0.8])
            return peers.Peer(lambda x: next(losses), dict)

        return {"sae-lens": peer}

    size = peers.Size(192, 64, 4, len(vectors.about.batches), BATCH)
    monkeypatch.setattr(peers, "BUILD", build(1e-5))
    assert peers.checked(size, {"trainer": "sae-lens"}, vectors) == pytest.approx(1e-5 / 0.9)
    monkeypatch.setattr(peers, "BUILD", build(0.01))
    with pytest.raises(RuntimeError, match="sae-lens has the losses"):
        peers.checked(size, {"trainer": "sae-lens"}, vectors)


def test_a_worker_reads_a_cell_and_answers_in_one_line(vectors, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sae.safetensors"
    cell = {
        "trainer": "normuon", "package": TRAINERS["normuon"].package, "lr": 0.01, "seed": 0,
        "tokens": TOKENS, "batch_tokens": BATCH, "n_latents": 64, "k": 4,
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["worker", str(vectors.folder), str(out)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(cell)))
    worker.main()
    answer = json.loads(capsys.readouterr().out)
    assert answer["step_seconds"] > 0
    assert out.exists()


def test_a_harvest_of_some_layers_has_those_of_one_of_all(vectors, tmp_path):
    some = harvest(tmp_path / "some", TOKENS, BATCH, SLICE, (1, 3))
    assert some.about.layers == (1, 3)
    for (x, counted), (every, expected) in zip(some.batches(), vectors.batches(), strict=True):
        assert torch.equal(x, every[[1, 3]])
        assert counted == expected
    with pytest.raises(InputError, match=r"layers \(1, 3\)"):
        harvest(tmp_path / "some", TOKENS, BATCH, SLICE)


def test_a_harvest_that_was_cut_off_is_made_anew(vectors, tmp_path):
    folder = tmp_path / "partial"
    folder.mkdir()
    (folder / "train.f16").write_bytes(b"half")
    assert not (folder / "about.json").exists()
    again = harvest(folder, TOKENS, BATCH, SLICE)
    assert again.about == vectors.about
    assert (folder / "train.f16").read_bytes() == (vectors.folder / "train.f16").read_bytes()
    assert Vectors(folder).about == vectors.about
