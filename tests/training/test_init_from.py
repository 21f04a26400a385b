"""Training that starts from trained weights: --init_from."""

import json

import pytest
import torch

from mlsae import MLSAE, formats
from mlsae.config import SAEConfig, TrainConfig
from mlsae.data.config import DataConfig
from mlsae.errors import InputError
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
    out, _ = trained
    train(settings(tmp_path / "run", init_from=str(out), tokens=700))
    train(settings(tmp_path / "run", init_from="gone", tokens=1500, resume=True))
    assert MLSAE.from_pretrained(tmp_path / "run").config.n_latents == 256


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (SAEConfig(n_latents=512, k=8), r"--sae.n_latents must be 256, as in --init_from .* 512"),
        (SAEConfig(n_latents=256, k=4), r"--sae.k must be 8.*--sae.n_latents 256 --sae.k 8"),
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
