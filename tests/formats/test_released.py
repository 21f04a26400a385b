"""The paper's released checkpoints, on files written in their layout.

Legend: D inputs, M latents, K active latents per token, L layers.
"""

import json

import pytest
import safetensors.torch
import torch

from mlsae import MLSAE
from mlsae.errors import InputError

D, M, K, L = 8, 32, 4, 3


def tensors(prefix=""):
    """Their tensors: the decoder's columns are latents, of norm only approximately 1."""
    generator = torch.Generator().manual_seed(3)
    decoder = torch.nn.functional.normalize(torch.randn(D, M, generator=generator), dim=0)
    return {
        prefix + "encoder.weight": torch.randn(M, D, generator=generator),
        prefix + "decoder.weight": decoder * (1 + 0.01 * torch.randn(1, M, generator=generator)),
        prefix + "pre_encoder_bias": torch.randn(D, generator=generator),
    }


def plain(folder, **changes):
    config = {"auxk": 256, "dead_steps_threshold": 19, "dead_threshold": 0.001, "k": K,
              "n_inputs": D, "n_latents": M, "standardize": True, **changes}  # fmt: skip
    return save(folder, config, tensors())


def with_transformer(folder, **changes):
    """A `-tfm` checkpoint: the SAE under "autoencoder.", the transformer beside it."""
    config = {"accumulate_grad_batches": 64, "auxk": 256, "auxk_coef": 0.03125, "batch_size": 1,
              "dead_steps_threshold": None, "dead_threshold": 0.001,
              "dead_tokens_threshold": 10000000, "expansion_factor": M // D, "k": K,
              "layers": None, "lr": 0.0001, "max_length": 2048,
              "model_name": "EleutherAI/pythia-70m-deduped", "skip_special_tokens": True,
              "standardize": True, **changes}  # fmt: skip
    blocks = {
        f"transformer.model.gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias": torch.zeros(4)
        for i in range(L)
    }
    head = {"transformer.model.embed_out.weight": torch.zeros(5, D)}
    return save(folder, config, {**tensors("autoencoder."), **blocks, **head})


def save(folder, config, content):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(content, folder / "model.safetensors")
    return folder


def forward(x, standardize):
    """Their forward pass, written out: linear maps of dense activations."""
    weights = {name: weight.double() for name, weight in tensors().items()}
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)  # unbiased
    inner = (x - mean) / (std + 1e-5) if standardize else x
    latents = (inner - weights["pre_encoder_bias"]) @ weights["encoder.weight"].T
    top = latents.topk(K, sorted=False)
    dense = torch.zeros_like(latents).scatter(-1, top.indices, top.values.relu())
    recons = dense @ weights["decoder.weight"].T + weights["pre_encoder_bias"]
    return recons * std + mean if standardize else recons


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("build", [plain, with_transformer])
def test_outputs_equal_theirs_up_to_rounding(tmp_path, build, standardize):
    mlsae = MLSAE.from_pretrained(build(tmp_path / "theirs", standardize=standardize))
    assert mlsae.config.standardize == standardize
    x = torch.randn(L, 20, D, generator=torch.Generator().manual_seed(0)) * 5 + 2
    torch.testing.assert_close(
        mlsae(x).double(), forward(x.double(), standardize), rtol=1e-5, atol=1e-5
    )


def test_decoder_rows_are_left_as_they_are(tmp_path):
    mlsae = MLSAE.from_pretrained(plain(tmp_path / "theirs"))
    assert torch.equal(mlsae.sae.W_dec, tensors()["decoder.weight"].T)
    assert (mlsae.sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3


def test_layers_and_model_if_the_files_name_them(tmp_path):
    """A -tfm checkpoint names both; a plain one neither, unless its model card names the model."""
    config = MLSAE.from_pretrained(with_transformer(tmp_path / "a")).config
    assert (config.layers, config.model) == ((0, 1, 2), "EleutherAI/pythia-70m-deduped")
    config = MLSAE.from_pretrained(with_transformer(tmp_path / "b", layers=[1])).config
    assert config.layers == (1,)
    folder = plain(tmp_path / "c")
    config = MLSAE.from_pretrained(folder).config
    assert (config.layers, config.model) == ((), "")
    card = "---\nbase_model: EleutherAI/pythia-70m-deduped\nlibrary_name: mlsae\n---\n# Card\n"
    (folder / "README.md").write_text(card)
    assert MLSAE.from_pretrained(folder).config.model == "EleutherAI/pythia-70m-deduped"


@pytest.mark.parametrize("how", ["config", "name"])
def test_a_tuned_lens_gives_a_warning(tmp_path, how):
    if how == "config":
        folder = with_transformer(tmp_path / "theirs", tuned_lens=True)
    else:
        folder = plain(tmp_path / "mlsae-gpt2-x4-k4-lens")
    with pytest.warns(UserWarning, match="a tuned lens had transformed"):
        MLSAE.from_pretrained(folder)


def test_a_tfm_checkpoint_without_its_transformer_is_an_error(tmp_path):
    config = {"expansion_factor": 4, "model_name": "gpt2", "k": K, "layers": None}
    folder = save(tmp_path / "theirs", config, tensors("autoencoder."))
    with pytest.raises(InputError, match="must contain the transformer's blocks"):
        MLSAE.from_pretrained(folder)
