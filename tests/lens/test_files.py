"""Lenses on disk: this project's file, the tuned-lens package's, and the paper's checkpoints with
them.

Legend: L layers, N tokens, D width of the residual stream, M latents, K active latents per token.
"""

import json
import warnings
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from mlsae import MLSAE, MLSAEConfig, formats, load_sae
from mlsae.config import TrainConfig
from mlsae.data.config import DataConfig
from mlsae.data.model_id import check_lens_model, model_id
from mlsae.data.residuals import ResidualReader
from mlsae.data.stream import Shape
from mlsae.errors import InputError
from mlsae.evaluation.trained import load_run
from mlsae.training.start import lens_of
from tests.helpers.lenses import random_lens, save_tuned_lens, translators
from tests.helpers.models import CONFIGS, make

L, N, D, M, K = 3, 9, 8, 32, 4
CPU = torch.device("cpu")


def same(a, b):
    return a.digest == b.digest and a.n_layers == b.n_layers and a.about == b.about


def with_lens(lens):
    torch.manual_seed(0)
    return MLSAE(MLSAEConfig(D, M, K, (0, 1, 2), model="lab/model"), lens=lens)


def test_a_lens_is_read_back_from_its_file_its_folder_and_a_run(tmp_path):
    lens = random_lens(L, D, model="lab/model", revision=None)
    (tmp_path / formats.LENS).write_bytes(formats.lens_bytes(lens))
    with_lens(lens).save_pretrained(tmp_path / "run")
    for path in (tmp_path / formats.LENS, tmp_path, tmp_path / "run"):
        assert same(formats.read_lens(path), lens)


def test_an_mlsae_is_saved_with_its_lens(tmp_path):
    saved = with_lens(random_lens(L, D, model="lab/model"))
    saved.save_pretrained(tmp_path)
    loaded = MLSAE.from_pretrained(tmp_path)
    assert same(loaded.lens, saved.lens)
    x = torch.randn(L, N, D)
    assert torch.equal(loaded(x, (0, 1, 2)), saved(x, (0, 1, 2)))
    assert "the layers of `residuals`" in (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match="has its own lens; leave it out"):
        MLSAE.from_pretrained(tmp_path, lens=tmp_path)
    plain = replace(saved.config, standardize=False)
    MLSAE(plain, lens=saved.lens).save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="has a lens; load it with"):
        load_sae(tmp_path / "plain")
    with pytest.raises(InputError, match="for an SAE with a lens"):
        formats.write(loaded.to_saved(), tmp_path / "x", "saelens")


def test_a_run_s_lens_that_is_not_its_own_or_missing_is_refused(tmp_path):
    with_lens(random_lens(L, D)).save_pretrained(tmp_path)
    (tmp_path / formats.LENS).write_bytes(formats.lens_bytes(random_lens(L, D, seed=5)))
    with pytest.raises(InputError, match="maps have another SHA-256"):
        MLSAE.from_pretrained(tmp_path)
    (tmp_path / formats.LENS).unlink()
    with pytest.raises(InputError, match=r"--lens must be a file lens\.safetensors, .* not exist"):
        MLSAE.from_pretrained(tmp_path)


def test_a_translator_of_tuned_lens_belongs_to_the_layer_below_its_number(tmp_path):
    """Translator i is of the input of block i: h + W_i h + b_i. So ours of layer ℓ is ℓ + 1."""
    lens = formats.read_lens(save_tuned_lens(tmp_path / "lens", L, D))
    weights, biases = translators(L, D)
    x = torch.randn(L, N, D)
    for layer in (0, 1):
        W, b = weights[layer + 1], biases[layer + 1]
        torch.testing.assert_close(lens(x[layer], layer), x[layer] + x[layer] @ W.T + b)
    assert lens.layers == (0, 1)
    assert torch.equal(lens(x[2], 2), x[2])
    assert (lens.about["model"], lens.about["revision"]) == ("lab/model", None)


def test_the_class_of_the_tuned_lens_package_agrees(tmp_path):
    """Their class, on their files, given hidden states as their training gives them."""
    lenses = pytest.importorskip("tuned_lens.nn.lenses")
    model = make(CONFIGS["gpt_neox"])
    folder = save_tuned_lens(tmp_path / "lens", 3, 24)
    theirs = lenses.TunedLens.from_model_and_pretrained(model, str(folder))
    ours = formats.read_lens(folder)
    ids = torch.randint(0, 64, (2, 12))
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
    x = ResidualReader(model)(ids)
    for i in range(1, 3):
        torch.testing.assert_close(ours(x[i - 1], i - 1), theirs.transform_hidden(hidden[i], i))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"lens_type": "other"}, "lens_type in .* must be linear_tuned_lens, got 'other'"),
        ({"num_hidden_layers": "3"}, "must be integers, 2 and 1 or more, got '3' and 8"),
        ({"num_hidden_layers": 4}, "must hold 3.weight of the shape"),
        ({"d_model": 9}, r"must hold 1.weight of the shape \(9, 9\), .* got \(8, 8\)"),
    ],
)
def test_damaged_files_of_tuned_lens_are_named(tmp_path, damage, message):
    with pytest.raises(InputError, match=message):
        formats.read_lens(save_tuned_lens(tmp_path / "lens", L, D, **damage))


class _Harmful:
    def __reduce__(self):
        return (print, ("code from a pickle has run",))


def test_no_code_of_a_pickle_runs(tmp_path, capsys):
    folder = save_tuned_lens(tmp_path / "lens", L, D)
    torch.save({"0.weight": _Harmful()}, folder / "params.pt")
    with pytest.raises(InputError, match="that holds tensors only"):
        formats.read_lens(folder)
    assert "has run" not in capsys.readouterr().out


def test_what_is_no_lens_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist; train one with"):
        formats.read_lens(tmp_path / "none")
    file = tmp_path / formats.LENS
    for tensors, about, message in (
        ({"A": torch.eye(3)[None], "b": torch.zeros(1, 3)}, None, "metadata names none"),
        ({"A": torch.eye(3)[None]}, {"layers": [0], "n_layers": 2}, "must hold the tensors A and"),
        ({"A": torch.eye(3)[None], "b": torch.zeros(1, 3)}, {"layers": [0]}, "must be integers"),
        ({"A": torch.eye(3)[None], "b": torch.zeros(1, 3)}, {"layers": [2], "n_layers": 2},
         r"must ascend in \[0, 1\], got 2"),
    ):  # fmt: skip
        metadata = None if about is None else {"lens": json.dumps(about)}
        safetensors.torch.save_file(tensors, file, metadata)
        with pytest.raises(InputError, match=message):
            formats.read_lens(file)


def released(folder, **changes):
    """A plain `-lens` checkpoint of the paper's code, whose config does not say so."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    config = {"auxk": 256, "dead_steps_threshold": 19, "dead_threshold": 0.001, "k": K,
              "n_inputs": D, "n_latents": M, "standardize": True, **changes}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        "encoder.weight": torch.randn(M, D, generator=generator),
        "decoder.weight": torch.randn(D, M, generator=generator),
        "pre_encoder_bias": torch.randn(D, generator=generator),
    }
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder, weights


def test_a_lens_checkpoint_of_the_paper_gives_its_own_outputs(tmp_path):
    """Its code gave translator ℓ the output of block ℓ, the last one's too: see its lightning.py,
    where hidden states begin after the first block."""
    folder, theirs = released(tmp_path / "mlsae-model-x4-k4-lens")
    lens = save_tuned_lens(tmp_path / "lens", L, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlsae = MLSAE.from_pretrained(folder, lens=lens)
    W, b = (part.double() for part in translators(L, D))
    x = torch.randn(L, N, D).double()
    z = x + torch.einsum("lij,lnj->lni", W, x) + b[:, None]
    std, mean = torch.std_mean(z, -1, keepdim=True)
    inner = (z - mean) / (std + 1e-5) - theirs["pre_encoder_bias"]
    top = (inner @ theirs["encoder.weight"].double().T).topk(K, sorted=False)
    dense = torch.zeros(L, N, M).double().scatter(-1, top.indices, top.values.relu())
    recons = dense @ theirs["decoder.weight"].double().T + theirs["pre_encoder_bias"]
    z_hat = recons * std + mean
    out = mlsae.reconstruct(x.float(), (0, 1, 2))
    found = torch.zeros(L, N, M).scatter(-1, out.codes.indices, out.codes.values)
    torch.testing.assert_close(found.double(), dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.error_in_basis.double(), z - z_hat, rtol=1e-4, atol=1e-4)
    A = torch.eye(D).double() + W
    x_hat = torch.linalg.solve(A, (z_hat - b[:, None]).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out.x_hat.double(), x_hat, rtol=1e-3, atol=1e-3)


def test_a_lens_checkpoint_without_its_lens_is_told(tmp_path):
    folder, _ = released(tmp_path / "mlsae-model-x4-k4-lens")
    with pytest.warns(UserWarning, match="a tuned lens had transformed: give lens="):
        MLSAE.from_pretrained(folder)
    with pytest.raises(InputError, match=r"--lens must be given for RUN .* got none; give the"):
        load_run(folder, CPU, None)
    given = load_run(folder, CPU, save_tuned_lens(tmp_path / "lens", L, D))
    given.save_pretrained(tmp_path / "kept")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(MLSAE.from_pretrained(tmp_path / "kept").lens, given.lens)
    with pytest.raises(InputError, match=r"--lens must be of the width of .*, 8, and has 9"):
        load_run(folder, CPU, save_tuned_lens(tmp_path / "wide", L, 9))
    with_lens(None).save_pretrained(tmp_path / "run", training={"dataset": "builtin"})
    with pytest.raises(InputError, match="was trained without one; leave it out"):
        load_run(tmp_path / "run", CPU, tmp_path / "lens")


def test_training_goes_on_from_a_lens_checkpoint_only_with_its_lens(tmp_path):
    folder, _ = released(tmp_path / "mlsae-model-x4-k4-lens")
    shape = Shape(D, (0, 1, 2), 64)
    config = TrainConfig(DataConfig("lab/model"), init_from=str(folder))
    with pytest.raises(InputError, match=r"--init_from must hold its lens, and .* does not; save"):
        lens_of(config, shape, formats.read(folder))
    lens = save_tuned_lens(tmp_path / "lens", L, D)
    MLSAE.from_pretrained(folder, lens=lens).save_pretrained(tmp_path / "run")
    kept = replace(config, init_from=str(tmp_path / "run"), lens=tmp_path / "run")
    assert lens_of(kept, shape, formats.read(tmp_path / "run")).layers == (0, 1, 2)


def test_a_lens_of_another_model_is_refused(tmp_path):
    lens = formats.read_lens(save_tuned_lens(tmp_path / "lens", L, D, "EleutherAI/pythia-70m"))
    for name in ("EleutherAI/pythia-70m", str(tmp_path / "pythia-70m")):
        check_lens_model(lens, DataConfig(name), D)
    with pytest.raises(InputError, match="MODEL EleutherAI/pythia-160m, and is of EleutherAI"):
        check_lens_model(lens, DataConfig("EleutherAI/pythia-160m"), D)
    with pytest.raises(InputError, match="must be of MODEL's width, 9, and has 8"):
        check_lens_model(lens, DataConfig("EleutherAI/pythia-70m"), 9)
    at = random_lens(L, D, model="EleutherAI/pythia-70m", revision="step3000")
    check_lens_model(at, DataConfig("EleutherAI/pythia-70m", revision="step3000"), D)
    with pytest.raises(InputError, match="and is of EleutherAI/pythia-70m at step3000, with other"):
        check_lens_model(at, DataConfig("EleutherAI/pythia-70m", revision="step1000"), D)
    own = random_lens(L, D, **model_id(DataConfig()))
    check_lens_model(own, DataConfig(), D)
    folder = tmp_path / "builtin"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"of other weights")
    with pytest.raises(InputError, match="and is of builtin, with other weights"):
        check_lens_model(own, DataConfig(str(folder)), D)
