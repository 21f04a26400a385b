"""`python -m mlsae.lens`, and the programs with --lens, on a small model and the built-in text."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers

from mlsae import MLSAE, builtin, formats
from mlsae.analysis.beside import runs_beside
from mlsae.analysis.run import AnalyzeConfig, analyze, show_prompt
from mlsae.config import SAEConfig, TrainConfig
from mlsae.data.config import DataConfig
from mlsae.errors import InputError
from mlsae.evaluation.run import EvaluateConfig, evaluate
from mlsae.intervention.command_line import SteerConfig
from mlsae.intervention.run import steer
from mlsae.lens.__main__ import find_and_print
from mlsae.lens.affine import SecondMoments, affine_maps
from mlsae.lens.run import LensConfig, find_lens
from mlsae.report import layer_plots
from mlsae.report.run_data import read_run_data
from mlsae.training import checkpoint
from mlsae.training.run import train
from tests.helpers.lenses import random_lens
from tests.helpers.models import make

D = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("lens")


@pytest.fixture(scope="module")
def data(root):
    """A random model whose blocks change much, with the built-in tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)
    shape = {"n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **shape, **ids)
    make(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return DataConfig(str(root / "model"), seq_len=64)


@pytest.fixture(scope="module")
def found(root, data):
    """A tuned lens, of the first layer only, as the last one has the identity."""
    return find_lens(small(data, root / "tuned"))


def small(data, out, **options):
    chosen = {"tokens": 4096, "batch_tokens": 128, "eval_tokens": 256, "lr": 1e-2} | options
    return LensConfig(data, out=out, **chosen)


def settings(root, data, out, **options):
    chosen = {"lens": root / "tuned", "tokens": 1500, "batch_tokens": 512, "eval_tokens": 256,
              "checkpoint_tokens": 500, "keep_checkpoints": 9} | options  # fmt: skip
    return TrainConfig(data, sae=SAEConfig(n_latents=64, k=4), out=root / out, **chosen)


@pytest.fixture(scope="module")
def run(root, data, found):
    train(settings(root, data, "run"))
    return root / "run"


def test_a_tuned_lens_predicts_better_than_the_affine_one_and_that_than_none(root, data, found):
    affine = find_lens(small(data, root / "affine", kind="affine"))
    assert found.kl[0] < affine.kl[0] < affine.kl_logit_lens[0] == found.kl_logit_lens[0]
    assert found.lens.layers == (0,)
    kept = formats.read_lens(root / "tuned")
    assert kept.digest == found.lens.digest
    assert (kept.about["kind"], kept.about["model"]) == ("tuned", data.model)
    assert kept.about["kl"] == found.kl


def test_the_program_prints_each_layer(root, data, capsys):
    find_and_print(small(data, root / "printed", kind="affine", tokens=2048))
    printed = capsys.readouterr().out
    for shown in ("logit lens", "condition number", "next: python -m mlsae.train --lens"):
        assert shown in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be greater than 0"),
        ({}, "--out must have no lens, and .* has one"),
        ({"layers": (1,)}, "--layers must name a layer below the last, 1"),
    ],
)
def test_what_gives_no_lens_is_named(root, data, found, options, message):
    options = dict(options)
    if "layers" in options:
        data = replace(data, layers=options.pop("layers"))
        options["overwrite"] = True
    with pytest.raises(InputError, match=message):
        find_lens(small(data, root / "tuned", **options))


def test_the_affine_maps_carry_mean_and_covariance_and_undo_a_rotation():
    torch.manual_seed(0)
    spread = torch.randn(6, 6).double() + 3 * torch.eye(6)
    last = torch.randn(4000, 6).double() @ spread + 5
    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
    x = torch.stack([last @ turn.T * 2 - 1, last])
    moments = SecondMoments(2, 6, CPU)
    for part in x.split(1000, dim=1):
        moments.update(part)
    A, b = affine_maps(moments)
    torch.testing.assert_close(A[1], torch.eye(6).double())
    torch.testing.assert_close(A[0], turn.T / 2)
    torch.testing.assert_close(x[0] @ A[0].T + b[0], last)
    noisy = torch.stack([x[0] + torch.randn(4000, 6), last])
    moments = SecondMoments(2, 6, CPU)
    moments.update(noisy)
    A, b = affine_maps(moments)
    z = noisy[0] @ A[0].T + b[0]
    torch.testing.assert_close(z.mean(0), last.mean(0))
    torch.testing.assert_close(torch.cov(z.T), torch.cov(last.T), rtol=0.05, atol=0.5)


def test_no_other_rotation_correlates_more():
    """The whitened last residual and the whitened z have a symmetric positive cross-covariance,
    which no rotation of one of them makes larger in trace."""
    torch.manual_seed(1)
    last = torch.randn(3000, 5).double() @ torch.randn(5, 5).double()
    x = torch.stack([last @ torch.randn(5, 5).double() + torch.randn(3000, 5), last])
    moments = SecondMoments(2, 5, CPU)
    moments.update(x)
    A, _ = affine_maps(moments)
    own = torch.cov(last.T, correction=0)
    values, vectors = torch.linalg.eigh(own + 0.01 * own.trace() / 5 * torch.eye(5))
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    centered = x - x.mean(1, keepdim=True)
    cross = whiten @ (centered[1].T @ centered[0] / 3000) @ A[0].T @ whiten
    torch.testing.assert_close(cross, cross.T)
    assert torch.linalg.eigvalsh(cross).min() > 0


def test_a_run_carries_its_lens_and_says_both_fvus(run, found):
    config = json.loads((run / "config.json").read_text())
    assert config["lens"]["sha256"] == found.lens.digest
    heldout = config["heldout"]
    assert heldout["fvu_lens_layers"][1] == pytest.approx(heldout["fvu_layers"][1])
    assert heldout["fvu_lens_layers"][0] != pytest.approx(heldout["fvu_layers"][0])
    assert MLSAE.from_pretrained(run).lens.digest == found.lens.digest


def test_a_resumed_run_has_the_same_bits_and_no_other_lens(root, data, run):
    again = root / "again"
    shutil.copytree(run, again)
    checkpoint.newest(again, print).unlink()
    (again / "model.safetensors").unlink()
    moved = root / "moved.safetensors"
    shutil.copy(root / "tuned" / formats.LENS, moved)
    resumed = settings(root, data, "again", resume=True, lens=moved)
    train(resumed)
    for name in ("model.safetensors", formats.LENS):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    (root / "other.safetensors").write_bytes(formats.lens_bytes(random_lens(2, D)))
    for lens, message in (
        (root / "other.safetensors", "--lens must be that which this run began with"),
        (None, "--lens must be that which this run began with .* got none"),
    ):
        with pytest.raises(InputError, match=message):
            train(replace(resumed, lens=lens))


def test_a_run_goes_on_from_another_only_in_its_basis(root, data, run):
    started = settings(root, data, "from", init_from=str(run))
    with pytest.raises(InputError, match=r"--lens must be that of --init_from .* another lens"):
        train(replace(started, lens=None))
    train(replace(started, lens=run))


def test_evaluate_analyze_and_steer_take_the_run_s_own_lens(run, tmp_path):
    shared = {"tokens": 512, "resamples": 20, "out": tmp_path}
    result = evaluate(EvaluateConfig(run, **shared))
    heldout = json.loads((run / "config.json").read_text())["heldout"]
    figures = result.as_dict()["figures"]
    assert result.provenance.lens["kind"] == "tuned"
    assert figures["fvu_lens"]["layers"][1] == pytest.approx(figures["fvu"]["layers"][1], rel=1e-4)
    assert figures["fvu"]["mean"] == pytest.approx(heldout["fvu"], rel=0.5)
    assert any("in the basis of a lens (tuned)" in note for note in result.notes())
    assert "FVU, lens's basis" in [column.header for column in result.tables()[0].columns]
    analysis = analyze(AnalyzeConfig(run, **shared, examples=0, groups=4))
    assert analysis.directions.tokens["in"] is None  # of another basis
    assert analysis.directions.tokens["out"] is not None
    table, _ = show_prompt(AnalyzeConfig(run, out=tmp_path), "def main(")
    assert table.row_count
    config = SteerConfig(
        run=run, prompt="def main(", latent=5, add=9.0, layers=(0,), max_new_tokens=2
    )
    assert steer(config).effects.kl().max() > 0


def test_the_report_tells_the_basis_and_mixes_none(run):
    assert "by a lens (tuned)" in (run / "report.html").read_text()
    heldout = json.loads((run / "config.json").read_text())["heldout"]
    data = read_run_data(run)
    figure = layer_plots.training(data.training, data.validation, data.layers)
    (dots,) = [trace for trace in figure.data if trace.name == "mean, held-out"]
    assert dots.y[-1] == heldout["fvu_lens"] != heldout["fvu"]


def test_another_basis_is_no_run_beside(root, data, run):
    train(settings(root, data, "plain", lens=None))
    with pytest.raises(InputError, match="with the lens of RUN, or none as it"):
        runs_beside(run, [root / "plain"])


def test_a_lens_of_another_model_or_width_is_refused_before_training(root, data, found):
    for lens, message in (
        (random_lens(6, 192), "--lens must be of MODEL's width, 32, and has 192"),
        (random_lens(2, D, model="gpt2"), "and is of gpt2, with other weights"),
        (random_lens(3, D, layers=(0,)), "and has none of 1"),
    ):
        (root / "wrong.safetensors").write_bytes(formats.lens_bytes(lens))
        with pytest.raises(InputError, match=message):
            train(settings(root, data, "wrong", lens=root / "wrong.safetensors"))
    assert not (root / "wrong").exists()
