"""SAEs of other libraries that are active above thresholds, or do not subtract b_dec: files written
by hand in their layouts, outputs by their definition in float64.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import json

import numpy as np
import pytest
import torch

from mlsae import MLSAE, DenseSAE, formats, load_sae
from mlsae.convert import ConvertConfig, convert
from mlsae.errors import InputError
from mlsae.jumprelu import JumpReLUSAE
from tests.helpers import peer_files
from tests.helpers.peer_files import D, K, M, load, sae, save
from tests.helpers.threshold_files import (
    GEMMA,
    GEMMA_2,
    LLAMA,
    QWEN,
    SCALE,
    dictionary_learning,
    gemma,
    gemma_2,
    llama,
    norm_1,
    qwen,
    saelens,
    thresholds,
)  # fmt: skip

N = 60


def inputs():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(9)) * 2 + 0.5


# How each is written, and what it computes: is b_dec subtracted, θ, k, the scale of its inputs.
WAYS = {
    "saelens jumprelu": (lambda f, w: saelens(f, w), True, thresholds(), None, 1),
    "saelens standard": (lambda f, w: saelens(f, w, architecture="standard"), True, 0, None, 1),
    "saelens, b_dec not subtracted": (
        lambda f, w: saelens(f, w, apply_b_dec_to_input=False), False, thresholds(), None, 1,
    ),
    "saelens topk, b_dec not subtracted": (
        lambda f, w: saelens(f, w, apply_b_dec_to_input=False, architecture="topk", k=K),
        False, 0, K, 1,
    ),
    "batchtopk": (
        lambda f, w: dictionary_learning(f, w, "BatchTopKSAE", torch.tensor(1.5)),
        True, 1.5, None, 1,
    ),
    "batchtopk, untrained": (
        lambda f, w: dictionary_learning(f, w, "BatchTopKSAE", torch.tensor(-1.0)),
        True, 0, None, 1,
    ),
    "matryoshka": (
        lambda f, w: dictionary_learning(f, w, "MatryoshkaBatchTopKSAE", torch.tensor(1.5)),
        True, 1.5, None, 1,
    ),
    "dictionary_learning jumprelu": (
        lambda f, w: dictionary_learning(f, w, "JumpReluAutoEncoder", thresholds()),
        False, thresholds(), None, 1,
    ),
    "gemma scope": (lambda f, w: gemma(f / GEMMA, w), False, thresholds(), None, 1),
    "gemma scope 2": (lambda f, w: gemma_2(f / GEMMA_2, w), False, thresholds(), None, 1),
    "qwen-scope": (lambda f, w: qwen(f / QWEN, w), False, 0, K, 1),
    "llama scope": (lambda f, w: llama(f / LLAMA, w), False, 0.7 * SCALE, None, SCALE),
    "llama scope topk": (lambda f, w: llama(f / LLAMA, w, act_fn="topk"), False, 0, K, SCALE),
}  # fmt: skip


def by_definition(w, x, subtracts, theta, k, scale):
    """h (N, M) and x̂ (N, D), float64."""
    w = {name: weight.double() for name, weight in w.items()}
    x = x.double() * scale
    z = (x - w["b_dec"] if subtracts else x) @ w["W_enc"].T + w["b_enc"]
    theta = torch.as_tensor(theta, dtype=torch.float64)
    h = torch.where(z > theta, z, 0).relu()
    if k is not None:
        values, indices = z.topk(k, dim=1)
        h = torch.zeros_like(z).scatter(1, indices, values.relu())
    return h, (h @ w["W_dec"] + w["b_dec"]) / scale


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_those_of_the_definition(tmp_path, way):
    write, *how = WAYS[way]
    w, x = sae(), inputs()
    loaded = load_sae(write(tmp_path / "theirs", w))
    h, x_hat = by_definition(norm_1(w) if "llama" in way else w, x, *how)
    assert isinstance(loaded, JumpReLUSAE) == (how[2] is None)
    found = loaded.reconstruct(x)
    f = torch.zeros(N, M).scatter(1, found.indices, found.values)
    for actual, expected in ((f, h), (DenseSAE(loaded).encode(x), h), (found.x_hat, x_hat)):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(f > 0, h > 0)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_converted_computes_the_same(tmp_path, way):
    theirs = WAYS[way][0](tmp_path / "theirs", sae())
    for to in ("mlsae", "saelens"):
        convert(ConvertConfig(theirs, tmp_path / to, to=to))
        assert torch.equal(load_sae(tmp_path / to)(inputs()), load_sae(theirs)(inputs())), to
    if WAYS[way][3] is None:
        with pytest.raises(InputError, match=r"--to sparsify must not .* jumprelu"):
            convert(ConvertConfig(theirs, tmp_path / "sparsify", to="sparsify"))


def test_the_files_of_saelens_come_back_bit_by_bit(tmp_path):
    theirs = saelens(tmp_path / "theirs", sae())
    convert(ConvertConfig(theirs, tmp_path / "ours"))
    convert(ConvertConfig(tmp_path / "ours", tmp_path / "back", to="saelens"))
    for file in theirs.iterdir():
        assert peer_files.same(load(file), load(tmp_path / "back" / file.name)), file.name


def test_one_that_standardizes_is_an_mlsae(tmp_path):
    theirs = saelens(tmp_path / "theirs", sae(), normalize_activations="layer_norm")
    mlsae, x = MLSAE.from_saved(formats.read(theirs)), inputs()
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    _, x_hat = by_definition(sae(), (x - mean) / (std + 1e-5), True, thresholds(), None, 1)
    torch.testing.assert_close(mlsae(x).double(), x_hat * std + mean, rtol=1e-5, atol=2e-5)
    mlsae.save_pretrained(tmp_path / "ours")
    loaded = MLSAE.from_pretrained(tmp_path / "ours")
    assert loaded.config == mlsae.config
    assert torch.equal(loaded(x), mlsae(x))
    assert "(JumpReLU)" in (tmp_path / "ours" / "README.md").read_text()


def test_what_folders_and_files_name_is_kept(tmp_path):
    for write, layers, model, mean in (
        (lambda f: gemma(f / GEMMA, sae()), (20,), "google/gemma-2-2b", 5),
        (lambda f: gemma(f / GEMMA.replace("pt-res", "it-mlp"), sae()),
         (), "google/gemma-2-2b-it", 5),
        (lambda f: gemma(f / "layer_20/width_16k/average_l0_5", sae()), (), "", 5),
        (lambda f: gemma_2(f / GEMMA_2, sae()), (12,), "google/gemma-3-1b-pt", M),
        (lambda f: qwen(f / QWEN, sae()), (12,), "Qwen/Qwen3-8B-Base", K),
        (lambda f: llama(f / LLAMA, sae()), (15,), "meta-llama/Llama-3.1-8B", M),
        (lambda f: dictionary_learning(f / "ae", sae(), "BatchTopKSAE", torch.tensor(1.0)), (3,),
         "EleutherAI/pythia-70m-deduped", K),
    ):  # fmt: skip
        saved = formats.read(write(tmp_path / str(len(list(tmp_path.iterdir())))))
        assert (saved.layers, saved.model, saved.k) == (layers, model, mean)
    about = formats.read(tmp_path / "1" / GEMMA.replace("pt-res", "it-mlp")).about
    assert about["place"] == "blocks.20.hook_mlp_out"


def test_a_code_has_room_for_four_times_the_mean(tmp_path):
    w = sae(M=3000)
    wide = {name: t.expand(3000).clone() if name == "threshold" else t for name, t in w.items()}
    for mean, k_max in ((5, 512), (200, 800), (1000, 3000)):
        folder = tmp_path / f"average_l0_{mean}"
        folder.mkdir()
        arrays = {**wide, "W_enc": w["W_enc"].T, "threshold": torch.ones(3000)}
        np.savez(folder / "params.npz", **{name: t.numpy() for name, t in arrays.items()})
        assert (load_sae(folder).k, load_sae(folder).k_max) == (mean, k_max)


def test_the_sae_wanted_is_named_by_its_hookpoint(tmp_path):
    for width, mean in (("16k", 5), ("16k", 9), ("65k", 5)):
        gemma(tmp_path / "gemma" / f"layer_2/width_{width}/average_l0_{mean}", sae())
    with pytest.raises(InputError, match=r"--hookpoint, one of: layer_2/width_16k/average_l0_5, "):
        load_sae(tmp_path / "gemma")
    with pytest.raises(InputError, match=r"SAEs are: layer_2/width_65k/average_l0_5$"):
        load_sae(tmp_path / "gemma", hookpoint="layer_2/width_65k")
    assert load_sae(tmp_path / "gemma", hookpoint="layer_2/width_16k/average_l0_9").k == 9
    for layer in (2, 10):
        qwen(tmp_path / QWEN, sae()).rename(tmp_path / QWEN / f"layer{layer}.sae.pt")
        llama(tmp_path / "llama" / f"L{layer}R", sae())
    with pytest.raises(InputError, match=r"one of: layer2\.sae\.pt, layer10\.sae\.pt$"):
        load_sae(tmp_path / QWEN)
    assert load_sae(tmp_path / QWEN, hookpoint="layer10.sae.pt").k == K
    with pytest.raises(InputError, match=r"one of: L2R, L10R$"):
        load_sae(tmp_path / "llama")


def damaged(folder, file, change):
    save(folder / file, {**load(folder / file), **change})
    return folder


def bad(folder, what):
    w = sae()
    cfg, weights = "cfg.json", "sae_weights.safetensors"
    if what == "no threshold":
        folder = saelens(folder, w, architecture="standard")
        return damaged(
            folder, cfg, {"architecture": "jumprelu"}
        ), "threshold in .* must be a tensor"
    if what == "a threshold of topk":
        return damaged(
            saelens(folder, w), cfg, {"architecture": "topk", "k": K}
        ), "also has threshold"
    if what == "NaN":
        nan = {"threshold": torch.full((M,), torch.nan)}
        return damaged(saelens(folder, w), weights, nan), "threshold in .* must be finite"
    if what == "too few":
        few = {"threshold": torch.arange(M - 1.0)}
        return damaged(saelens(folder, w), weights, few), "threshold must have the shape"
    if what == "gated":
        return dictionary_learning(folder, w, "GatedAutoEncoder", thresholds()), "dict_class"
    if what == "npz":
        (gemma(folder, w) / "params.npz").write_bytes(b"PK\x03\x04 and no more")
        return folder, r"params\.npz must be a readable \.npz"
    if what == "transcoder":
        out = {"hf_hook_point_out": "model.layers.12.post_feedforward_layernorm.output"}
        return gemma_2(folder, w, **out), "transcoders"
    if what == "no k":
        return qwen(folder / "elsewhere", w), "name tells k, such as SAE-Res"
    if what == "norms":
        return llama(folder, w | {"W_dec": w["W_dec"]}, use_glu_encoder=True), "use_glu_encoder"
    return llama(folder, w, dataset_average_activation_norm={"in": 0}), "in in .* must be a number"


@pytest.mark.parametrize(
    "what",
    ["no threshold", "a threshold of topk", "NaN", "too few", "gated", "npz",
     "transcoder", "no k", "norms", "scale"],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(tmp_path, what):
    path, told = bad(tmp_path / "theirs", what)
    with pytest.raises(InputError, match=told):
        load_sae(path)


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_arrays_is_not_run(tmp_path):
    folder = gemma(tmp_path / "theirs", sae())
    np.savez(folder / "params.npz", W_enc=np.array([Evil(tmp_path / "owned")], dtype=object))
    with pytest.raises(InputError, match=r"params\.npz must be a readable \.npz"):
        load_sae(folder)
    assert not (tmp_path / "owned").exists()


def test_our_own_files_that_disagree_are_refused(tmp_path):
    saelens(tmp_path / "theirs", sae())
    convert(ConvertConfig(tmp_path / "theirs", tmp_path / "ours"))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for change, told in (
        ({"activation": "topk"}, "threshold must be in .* if and only if"),
        ({"k_max": 0}, "k_max must be in"),
        ({"activation": "relu"}, "must be topk, batchtopk or jumprelu, got 'relu'"),
    ):
        (tmp_path / "ours" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=told):
            load_sae(tmp_path / "ours")
