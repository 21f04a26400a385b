"""A run with BatchTopK: what it leaves, resumes, refuses, and what others make of it."""

import dataclasses
import json
import re
import shutil

import pytest
import torch

from mlsae import MLSAE, DenseSAE, MLSAEConfig, formats, load_sae, memory
from mlsae.analysis.run import AnalyzeConfig, analyze
from mlsae.config import SAEConfig, TrainConfig, check_config
from mlsae.convert import ConvertConfig, convert
from mlsae.data.config import DataConfig
from mlsae.errors import InputError
from mlsae.evaluation.run import EvaluateConfig, evaluate
from mlsae.report.run_data import read_run_data
from mlsae.train import parse
from mlsae.training.run import train
from sparse_topk import SparseTopKSAE

SAE = SAEConfig(n_latents=256, k=4, activation="batchtopk", k_max=12)


def settings(out, sae=SAE, **options):
    chosen = {"tokens": 3000, "batch_tokens": 512, "micro_tokens": 256, "eval_tokens": 2048}
    data = DataConfig(seq_len=64, layers=(1, 3))
    return TrainConfig(data, sae=sae, out=out, **(chosen | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "batchtopk"
    (mlsae,) = train(settings(out, checkpoint_tokens=1000, log_tokens=500)).values()
    return out, mlsae


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def named(line):
    """A line without its times."""
    return {name: value for name, value in line.items() if "second" not in name}


def test_the_model_that_is_left_cuts_at_the_threshold(trained):
    out, mlsae = trained
    config = json.loads((out / "config.json").read_text())
    assert (config["activation"], config["k"], config["k_max"]) == ("batchtopk", 4, 12)
    assert config["threshold"] == mlsae.threshold > 0
    loaded = MLSAE.from_pretrained(out)
    x = torch.randn(3, 50, 192, generator=torch.Generator().manual_seed(0))
    for one, other in zip(loaded.encode(x), mlsae.encode(x), strict=True):
        assert torch.equal(one, other)
    values, _ = loaded.encode(x)
    assert values.shape == (3, 50, 12)
    assert (values[values > 0] > mlsae.threshold).all()
    assert (values == 0).any()
    assert 1 < lines(out)[-1]["heldout"]["l0"] < 12


def test_metrics_tell_the_threshold_and_the_share_of_capped_vectors(trained):
    out, mlsae = trained
    told = [line for line in lines(out) if "capped" in line]
    assert len(told) == 6
    assert all(0 <= line["capped"] <= 1 for line in told)
    assert told[-1]["threshold"] == mlsae.threshold


def test_many_capped_vectors_are_told_at_the_end(tmp_path, capsys):
    sae = dataclasses.replace(SAE, k_max=5)
    train(settings(tmp_path / "run", sae, tokens=600))
    said = capsys.readouterr().out
    assert re.search(r"\d\.\d% of the vectors that n256-k4 saw last had all 5 latents", said)


def test_topk_tells_neither(tmp_path):
    sae = dataclasses.replace(SAE, activation="topk", k_max=None)
    (mlsae,) = train(settings(tmp_path / "run", sae, tokens=600)).values()
    assert mlsae.threshold is None
    assert type(mlsae.sae) is SparseTopKSAE
    assert "capped" not in lines(tmp_path / "run")[0]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert not {"activation", "k_max", "threshold"} & config.keys()


def test_a_resumed_run_is_the_run_that_was_never_stopped(trained, tmp_path):
    out, _ = trained
    run = tmp_path / "run"
    shutil.copytree(out, run)
    newest = max((run / "checkpoints").glob("*.safetensors"))
    newest.with_suffix(".sha256").unlink()  # as if it had been killed before
    (run / "model.safetensors").unlink()
    train(settings(run, checkpoint_tokens=1000, log_tokens=500, resume=True))
    assert [named(line) for line in lines(run)] == [named(line) for line in lines(out)]
    for name in ("model.safetensors", "latents.safetensors"):
        assert (run / name).read_bytes() == (out / name).read_bytes()
    thresholds = [json.loads((o / "config.json").read_text())["threshold"] for o in (run, out)]
    assert thresholds[0] == thresholds[1]


def test_what_it_selects_among_must_stay_when_it_is_resumed(trained, monkeypatch):
    out, _ = trained
    again = settings(out, resume=True, tokens=4000, micro_tokens=512)
    with pytest.raises(InputError) as error:
        train(again)
    assert "--micro_tokens must be 256 to resume this run, as it began, got 512" in str(error.value)
    from mlsae.training import checkpoint

    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path: load(path) | {"processes": 2})
    with pytest.raises(InputError, match="number of processes must be 2 to resume"):
        train(dataclasses.replace(again, micro_tokens=256))


def test_a_new_run_starts_from_it(trained, tmp_path):
    out, mlsae = trained
    assert parse(["--init_from", str(out), "--out", str(tmp_path / "x")])[0].sae.k_max == 12
    start = settings(tmp_path / "run", init_from=str(out), lr=1e-12, tokens=600)
    (again,) = train(start).values()
    torch.testing.assert_close(again.sae.W_enc, mlsae.sae.W_enc)
    assert again.threshold > 0
    topk = dataclasses.replace(SAE, activation="topk", k_max=None)
    with pytest.raises(InputError, match=r"--sae\.activation must be batchtopk, as in --init_from"):
        train(dataclasses.replace(start, sae=topk, out=tmp_path / "other"))


def test_a_topk_sae_is_where_a_run_may_start(tmp_path):
    sae = MLSAE(MLSAEConfig(192, 256, 4, (1, 3)))
    sae.save_pretrained(tmp_path / "topk")
    start = settings(tmp_path / "run", init_from=str(tmp_path / "topk"), lr=1e-12, tokens=600)
    (again,) = train(start).values()
    torch.testing.assert_close(again.sae.W_enc, sae.sae.W_enc)
    assert again.threshold > 0


def test_other_formats_and_loaders_refuse_it(trained, tmp_path):
    out, mlsae = trained
    for to in ("released", "sparsify", "saelens", "dictionary_learning", "openai"):
        with pytest.raises(InputError, match=rf"--to {to} must not be given .* batchtopk"):
            convert(ConvertConfig(out, tmp_path / to, to))
        assert not (tmp_path / to).exists()
    assert "4 in the mean, 12 at most" in convert(ConvertConfig(out, tmp_path / "copy"))
    assert MLSAE.from_pretrained(tmp_path / "copy").threshold == mlsae.threshold
    plain = MLSAE(MLSAEConfig(8, 16, 2, (), standardize=False, k_max=4))
    plain.save_pretrained(tmp_path / "plain")
    x = torch.randn(5, 8)
    assert torch.equal(load_sae(tmp_path / "plain")(x), plain.sae(x))
    with pytest.raises(ValueError, match="has the activation batchtopk"):
        SparseTopKSAE.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("activation", "relu", "must be topk, batchtopk or jumprelu, got 'relu'"),
        ("k_max", 1, r"k_max must be in \[4, 256\]"),
        ("k_max", None, r"k_max must be in \[4, 256\]"),
        ("threshold", -0.5, "threshold must be a number, 0 or more, got -0.5"),
        ("threshold", "high", "threshold must be a number, 0 or more, got 'high'"),
    ],
)
def test_damaged_files_are_one_sentence(trained, tmp_path, name, value, said):
    formats.write(formats.read(trained[0]), tmp_path, "mlsae")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(InputError, match=said):
        MLSAE.from_pretrained(tmp_path)


def test_evaluation_analysis_report_and_card_take_it(trained):
    out, mlsae = trained
    evaluation = evaluate(EvaluateConfig(out, tokens=1024))
    l0 = torch.tensor(json.loads((out / "evaluation.json").read_text())["figures"]["l0"]["layers"])
    assert evaluation is not None
    assert ((l0 > 0.5) & (l0 < 12)).all()
    analyze(AnalyzeConfig(out, tokens=1024))
    totals = read_run_data(out).analysis.totals
    assert totals.shape == (256, 2)
    assert (totals > 0).any()
    page = (out / "report.html").read_text()
    assert "4 active per token and layer in the mean, 12 at most (BatchTopK)" in page
    card = (out / "README.md").read_text()
    assert "4 of them active for each token and layer in the mean, 12 at most" in card
    assert re.search(rf"\| threshold \| {mlsae.threshold}", card)


def test_the_dense_view_is_the_same_sae(trained):
    _, mlsae = trained
    view = DenseSAE(mlsae, layer=1)
    x = torch.randn(20, 192, generator=torch.Generator().manual_seed(0))
    values, indices = mlsae.encode(x)
    assert torch.equal(view.encode(x), torch.zeros(20, 256).scatter(1, indices, values))
    torch.testing.assert_close(view(x), mlsae(x))
    assert view.cfg.activation_fn_kwargs["threshold"] == mlsae.threshold


def test_a_copy_in_half_precision_keeps_its_threshold(trained):
    out, mlsae = trained
    half = MLSAE.from_pretrained(out, dtype=torch.bfloat16)
    assert half.threshold == mlsae.threshold
    x = torch.randn(20, 192, generator=torch.Generator().manual_seed(0))
    values = half.encode(x).values
    assert (values[values > 0].float() > mlsae.threshold).all()


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"activation": "topk"}, {}, "--sae.k_max is for --sae.activation batchtopk, got 12"),
        ({"k_max": 3}, {}, r"--sae.k_max must be at least 4 \(--sae.k"),
        ({}, {"shard_latents": 2}, "--shard_latents must be 1 with --sae.activation batchtopk"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, change, options, said):
    with pytest.raises(InputError, match=said):
        check_config(settings(tmp_path, dataclasses.replace(SAE, **change), **options))


def test_a_cap_above_the_number_of_latents_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--sae.k_max must be in \[4, 256\]"):
        train(settings(tmp_path / "run", dataclasses.replace(SAE, k_max=300)))


def test_the_estimate_of_memory_counts_the_candidates():
    topk = MLSAEConfig(d_in=512, n_latents=32768, k=32, layers=tuple(range(6)))
    batch = dataclasses.replace(topk, k_max=128)
    more = memory.estimate([batch], 16384, torch.float32) - memory.estimate(
        [topk], 16384, torch.float32
    )
    assert more >= 6 * 16384 * 60 * (128 - 32)
