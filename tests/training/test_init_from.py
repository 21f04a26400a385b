"""Training that starts from trained weights: --init_from."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mlsae import MLSAE, compare, formats
from mlsae.config import SAEConfig, TrainConfig
from mlsae.data.config import DataConfig
from mlsae.errors import InputError
from mlsae.train import parse
from mlsae.training.run import train
from sparse_topk import SparseTopKSAE


def settings(out, sae=None, **options):
    chosen = {"tokens": 1500, "batch_tokens": 512, "eval_tokens": 512, "lr": 1e-12} | options
    data = DataConfig(seq_len=64, layers=(1, 3))
    return TrainConfig(data, sae=sae or SAEConfig(n_latents=256, k=8), out=out, **chosen)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    (mlsae,) = train(settings(out, lr=None)).values()
    return out, mlsae


def test_it_starts_where_the_run_ended(trained, tmp_path):
    """At a rate of next to nothing, so the weights stay: b_pre too, which no median replaces."""
    out, mlsae = trained
    (again,) = train(settings(tmp_path / "run", init_from=str(out))).values()
    for name, p in mlsae.sae.named_parameters():
        torch.testing.assert_close(dict(again.sae.named_parameters())[name], p)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["training"]["init_from"] == str(out)


def test_it_starts_from_another_format_with_its_bias(tmp_path):
    torch.manual_seed(0)
    sae = SparseTopKSAE(192, 256, 8)
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.W_dec.mul_(torch.rand(256, 1) + 0.5)
    weights = {name: p.detach().clone() for name, p in sae.state_dict().items()}
    saved = formats.SavedSAE(weights, 8, standardize=False)
    formats.write(saved, tmp_path / "theirs", "sparsify")
    start = settings(
        tmp_path / "run", SAEConfig(n_latents=256, k=8, standardize=False),
        init_from=str(tmp_path / "theirs"),
    )  # fmt: skip
    (mlsae,) = train(start).values()
    loaded = MLSAE.from_pretrained(tmp_path / "run")
    sae.fold_norms_()
    for model in (mlsae, loaded):
        for name, p in sae.named_parameters():
            torch.testing.assert_close(dict(model.sae.named_parameters())[name], p)


def test_it_resumes_without_the_first_weights(trained, tmp_path):
    """By the name it began with, so that config.json names what it did begin with."""
    out, _ = trained
    first = Path(shutil.copytree(out, tmp_path / "first"))
    start = settings(tmp_path / "run", init_from=str(first), tokens=700)
    train(start)
    shutil.rmtree(first)
    start = dataclasses.replace(start, tokens=1500, resume=True)
    train(start)
    assert MLSAE.from_pretrained(tmp_path / "run").config.n_latents == 256
    for other in (None, str(out)):
        with pytest.raises(InputError, match=rf"--init_from must be {first} to resume this run"):
            train(dataclasses.replace(start, init_from=other))
    with pytest.raises(InputError, match="--init_from must be None to resume this run"):
        train(settings(out, init_from=str(tmp_path / "run"), lr=None, resume=True))


def test_a_command_line_takes_its_sizes_from_there(trained, tmp_path):
    out, _ = trained
    for parse_one in (lambda line: parse(line)[0], compare.parse):
        sae = parse_one(["--init_from", str(out)]).sae
        assert (sae.n_latents, sae.k, sae.standardize) == (256, 8, True)
        sae = parse_one([f"--init-from={out}", "--sae.k", "4", "--sae.expansion", "2"]).sae
        assert (sae.n_latents, sae.expansion, sae.k) == (None, 2, 4), (
            "what is given is not overruled"
        )
    weights = {name: torch.randn(384, 192) for name in ("W_enc", "W_dec")}
    even = formats.SavedSAE(weights | {"b_dec": torch.zeros(192)}, 5, standardize=False)
    formats.write(even, tmp_path / "even", "sparsify")
    (config,) = parse(["--init_from", str(tmp_path / "even")])
    assert (config.sae.expansion, config.sae.k, config.sae.standardize) == (2, 5, False)
    assert parse(["--init_from", str(tmp_path / "none")])[0].sae == parse([])[0].sae


def test_the_run_that_is_replaced_is_no_start(trained):
    out, _ = trained
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="--init_from must be elsewhere than --out"):
        train(settings(out, init_from=str(out), overwrite=True))
    assert (out / "model.safetensors").read_bytes() == before


def test_weights_that_are_not_finite_are_refused(trained, tmp_path):
    out, _ = trained
    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["W_enc"][3, 1] = torch.nan
    safetensors.torch.save_file(weights, broken / "model.safetensors")
    with pytest.raises(InputError, match=r"W_enc in .* must be finite"):
        train(settings(tmp_path / "run", init_from=str(broken)))


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (
            SAEConfig(n_latents=512, k=8),
            r"--sae.n_latents .* must be 256, as in --init_from .* 512",
        ),
        (SAEConfig(n_latents=256, k=4), r"--sae.k must be 8.* got 4; .*leave it out"),
        (SAEConfig(n_latents=256, k=8, standardize=False), r"--sae.standardize must be True"),
    ],
)
def test_another_size_is_named(trained, tmp_path, sae, message):
    out, _ = trained
    with pytest.raises(InputError, match=message):
        train(settings(tmp_path / "run", sae, init_from=str(out)))
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_cannot_be_loaded_is_named(tmp_path):
    for name in (str(tmp_path / "none"), "nobody/nothing-of-this-name"):
        with pytest.raises(InputError, match="cannot be loaded"):
            train(settings(tmp_path / "run", init_from=name))
