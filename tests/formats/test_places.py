"""Where SAEs of other libraries were trained, and where they are found."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import HfApi, constants, snapshot_download

from mlsae import MLSAE, formats, load_sae
from mlsae.config import SAEConfig, TrainConfig
from mlsae.convert import ConvertConfig, convert
from mlsae.errors import InputError
from mlsae.evaluation.run import EvaluateConfig, evaluate
from mlsae.formats import remote
from mlsae.formats.places import layer_of
from mlsae.training.run import train
from tests.helpers.hub_server import hub
from tests.helpers.peer_files import D, K, M, build, sae, save


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.5.hook_resid_post", 5), ("layers.5", 5), ("h.11", 11), ("transformer.h.0", 0),
        ("gpt_neox.layers.3", 3), ("model.layers.31", 31), ("model.language_model.layers.2", 2),
        ("resid_post_layer_3", 3), ("blocks.5.hook_resid_pre", 4), ("resid_pre_layer_1", 0),
        ("blocks.0.hook_resid_pre", None), ("blocks.5.hook_mlp_out", None),
        ("blocks.5.hook_resid_mid", None), ("blocks.5.attn.hook_z", None), ("layers.5.mlp", None),
        ("layers.5.attention", None), ("embed_in", None), ("", None), (None, None),
        ("mylayers.5", None), (3, None), ([5], None), ({"layers": 5}, None),
    ],
)  # fmt: skip
def test_names_of_the_residual_stream_are_known(name, layer):
    assert layer_of(name) == layer


def saelens_before_6(folder, **changes):
    """As sae-lens 5 saved a TopK SAE."""
    w = sae()
    folder.mkdir()
    cfg = {
        "architecture": "standard", "d_in": D, "d_sae": M, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "context_size": 128, "model_name": "gpt2-small",
        "hook_name": "blocks.8.hook_resid_post", "hook_layer": 8, "hook_head_index": None,
        "prepend_bos": True, "normalize_activations": "none", "dtype": "torch.float32",
        "device": "cpu", "sae_lens_training_version": "5.3.1",
    }  # fmt: skip
    save(folder / "cfg.json", cfg | changes)
    save(folder / "sae_weights.safetensors", {**w, "W_enc": w["W_enc"].T.contiguous()})
    return folder, w


def test_saelens_before_6_is_read(tmp_path):
    folder, w = saelens_before_6(tmp_path / "old")
    saved = formats.read(folder)
    assert (saved.k, saved.layers, saved.model) == (K, (8,), "gpt2-small")
    x = torch.randn(5, D)
    scores = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    values, indices = scores.topk(K)
    f = torch.zeros_like(scores).scatter(1, indices, values.relu())
    torch.testing.assert_close(load_sae(folder)(x), f @ w["W_dec"] + w["b_dec"])
    formats.write(saved, tmp_path / "new", "saelens")
    new = json.loads((tmp_path / "new" / "cfg.json").read_text())
    assert (new["architecture"], new["k"]) == ("topk", K)


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({"architecture": "topk"}, ()),
        ({"architecture": "topk"}, ("activation_fn_str",)),
        ({"activation_fn": "topk"}, ("activation_fn_str", "architecture")),
        ({"normalize_activations": None}, ()),
        ({"normalize_activations": False}, ()),
        ({"normalize_activations": "layer_norm"}, ()),
        ({}, ("normalize_activations", "apply_b_dec_to_input")),
        ({"hook_point": "blocks.8.hook_resid_post"}, ("hook_name",)),
    ],
)
def test_other_ways_in_which_it_was_written(tmp_path, changes, without):
    folder, w = saelens_before_6(tmp_path / "old", **changes)
    cfg = json.loads((folder / "cfg.json").read_text())
    save(folder / "cfg.json", {name: v for name, v in cfg.items() if name not in without})
    path = folder / "sae_weights.safetensors"
    factor = {"scaling_factor": torch.ones(M)}  # which changes nothing
    save(path, safetensors.torch.load_file(path) | factor)
    saved = formats.read(folder)
    assert (saved.k, saved.layers, saved.model) == (K, (8,), "gpt2-small")
    assert saved.standardize == (changes.get("normalize_activations") == "layer_norm")
    assert torch.equal(saved.weights["W_enc"], w["W_enc"])


def test_a_scale_per_latent_is_not_lost(tmp_path):
    folder, _ = saelens_before_6(tmp_path / "old")
    path = folder / "sae_weights.safetensors"
    save(path, safetensors.torch.load_file(path) | {"scaling_factor": torch.full((M,), 2.0)})
    with pytest.raises(InputError, match="also has scaling_factor"):
        formats.read(folder)


def test_the_name_of_a_place_is_kept_where_it_is_right(tmp_path):
    name = "blocks.8.hook_resid_pre"
    folder, _ = saelens_before_6(tmp_path / "old", hook_name=name)
    saved = formats.read(folder)
    assert saved.layers == (7,)
    formats.write(saved, tmp_path / "new", "saelens")
    cfg = json.loads((tmp_path / "new" / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == name
    assert formats.read(tmp_path / "new").layers == (7,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str"),
        ({"architecture": "gated"}, "activation_fn_str .* gated"),
        ({"architecture": "jumprelu"}, "jumprelu"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"activation_fn_kwargs": {}}, "k must be in"),
        ({"activation_fn_str": None}, "activation_fn_str"),
        ({"normalize_activations": True}, "normalize_activations .* 'expected_average"),
        ({"activation_fn_kwargs": {"k": K, "postact_fn": "Identity"}}, "activation_fn_kwargs"),
        ({"hook_name": "blocks.8.attn.hook_z"}, "reshape_activations"),
        ({"activation_fn_kwargs": [K]}, "activation_fn_kwargs in .* must be an object"),
        ({"activation_fn_kwargs": "k"}, "activation_fn_kwargs in .* must be an object"),
    ],
)
def test_what_of_it_cannot_be_computed_is_named(tmp_path, changes, message):
    folder, _ = saelens_before_6(tmp_path / "old", **changes)
    with pytest.raises(InputError, match=message):
        formats.read(folder)


@pytest.mark.parametrize(
    ("form", "file", "owner", "key"),
    [
        ("saelens", "cfg.json", "metadata", "hook_name"),
        ("dictionary_learning", "config.json", "trainer", "submodule_name"),
    ],
)
@pytest.mark.parametrize("wrong", [None, 3, [5], {"layers": 5}])
def test_what_is_no_name_is_no_place(tmp_path, form, file, owner, key, wrong):
    folder = build(form, tmp_path / "theirs", sae())
    cfg = json.loads((folder / file).read_text())
    cfg[owner][key] = wrong
    save(folder / file, cfg)
    saved = formats.read(folder)
    assert saved.layers == ()
    assert "place" not in saved.about


@pytest.mark.parametrize("form", ["saelens", "dictionary_learning", "sparsify", "released"])
def test_settings_of_another_library_that_are_damaged_are_named(tmp_path, form):
    convert(ConvertConfig(build("sparsify", tmp_path / "theirs", sae()), tmp_path / "ours"))
    path = tmp_path / "ours" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({n: w for n, w in weights.items() if n != "b_enc"}, path)
    path = tmp_path / "ours" / "config.json"
    config = json.loads(path.read_text())
    inner = {"saelens": "metadata", "dictionary_learning": "trainer"}.get(form)
    for wrong in (3, None, [], *([{inner: "x"}] if inner else [])):
        save(path, config | {form: wrong})
        told = inner if isinstance(wrong, dict) else form
        with pytest.raises(InputError, match=f"{told} among the settings .* must be an object"):
            convert(ConvertConfig(tmp_path / "ours", tmp_path / "new", to=form))
    assert not (tmp_path / "new").exists()


def test_an_sae_of_another_place_is_used_there_only(tmp_path):
    folder, _ = saelens_before_6(tmp_path / "mlp", hook_name="blocks.8.hook_mlp_out")
    assert load_sae(folder).k == K
    saved = formats.read(folder)
    assert saved.layers == ()
    MLSAE.from_saved(saved).save_pretrained(tmp_path / "run")
    message = "residual stream after a block, .* blocks.8.hook_mlp_out"
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateConfig(tmp_path / "run", "builtin", model="builtin"))
    config = TrainConfig(
        sae=SAEConfig(n_latents=M, k=K, standardize=False), init_from=str(folder),
        out=tmp_path / "new",
    )  # fmt: skip
    with pytest.raises(InputError, match=message):
        train(config)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub with a repository of two SAEs, and one of a single SAE at its top."""
    with hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        here = {"endpoint": server.address, "cache_dir": tmp_path / "cache"}
        monkeypatch.setattr(remote, "snapshot_download", partial(snapshot_download, **here))
        monkeypatch.setattr(remote, "HfApi", partial(HfApi, endpoint=server.address))
        for layer in (2, 10):
            folder = build("sparsify", tmp_path / f"layers.{layer}", sae(layer))
            for file in folder.iterdir():
                files = server.repos.setdefault("lab/two", {})
                files[f"layers.{layer}/{file.name}"] = file.read_bytes()
                if layer == 2:
                    server.repos.setdefault("lab/one", {})[file.name] = file.read_bytes()
        yield server


def test_one_of_several_saes_on_the_hub(server, tmp_path):
    found = load_sae("lab/two", hookpoint="layers.10")
    torch.testing.assert_close(found.W_enc, sae(10)["W_enc"])
    assert formats.read("lab/two", "layers.2").layers == (2,)
    torch.testing.assert_close(load_sae("lab/one").W_enc, sae(2)["W_enc"])
    with pytest.raises(InputError, match=r"several SAEs; .*--hookpoint.*: layers.2, layers.10"):
        load_sae("lab/two")
    with pytest.raises(InputError, match=r"must be a folder of lab/two, .*layers.2, layers.10"):
        load_sae("lab/two", hookpoint="layers.3")
    with pytest.raises(InputError, match="lab/none cannot be loaded"):
        load_sae("lab/none")


def cached(tmp_path):
    """The files that were downloaded, by their names in the repository."""
    found = (tmp_path / "cache").rglob("snapshots/*/**/*")
    return {str(path).split("snapshots/")[1].split("/", 1)[1] for path in found if path.is_file()}


def test_only_what_is_asked_for_is_downloaded(server, tmp_path):
    load_sae("lab/two", hookpoint="layers.2")
    assert cached(tmp_path) == {"layers.2/cfg.json", "layers.2/sae.safetensors"}
    server.repos["lab/one"]["layers.9/sae.safetensors"] = b"another"
    load_sae("lab/one")
    assert "layers.9/sae.safetensors" not in cached(tmp_path)


@pytest.mark.parametrize("wrong", ["layers.*", "layers.[12]*", "..", "../../x", "/tmp", "layers"])
def test_what_is_no_folder_of_a_repository_downloads_nothing(server, tmp_path, wrong):
    with pytest.raises(InputError, match=r"must be a folder of lab/two, .*: layers.2, layers.10"):
        load_sae("lab/two", hookpoint=wrong)
    assert not cached(tmp_path)


def test_what_was_downloaded_is_found_without_a_network(server, tmp_path, monkeypatch):
    first = load_sae("lab/two", hookpoint="layers.2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_sae("lab/two", hookpoint="layers.2").W_enc, first.W_enc)
    for hookpoint in ("layers.10", "..", None):
        with pytest.raises(InputError, match="lab/two cannot be loaded"):
            load_sae("lab/two", hookpoint=hookpoint)


def test_convert_takes_a_hookpoint(server, tmp_path):
    config = ConvertConfig(Path("lab/two"), tmp_path / "ours", hookpoint="layers.2")
    convert(config)
    assert MLSAE.from_pretrained(tmp_path / "ours").config.layers == (2,)
    with pytest.raises(InputError, match="several SAEs"):
        convert(dataclasses.replace(config, hookpoint=None, dst=tmp_path / "other"))


def test_one_of_several_saes_in_a_folder(tmp_path):
    for layer in (2, 10):
        build("sparsify", tmp_path / f"layers.{layer}", sae(layer))
    (tmp_path / "resid").mkdir()
    build("dictionary_learning", tmp_path / "resid" / "trainer_0", sae(7))
    for name, seed in (("layers.2", 2), ("layers.10", 10), ("resid/trainer_0", 7)):
        assert torch.equal(formats.read(tmp_path, name).weights["W_dec"], sae(seed)["W_dec"])
    there = "layers.2, layers.10, resid/trainer_0$"
    with pytest.raises(InputError, match=rf"give --hookpoint, one of: {there}"):
        formats.read(tmp_path)
    with pytest.raises(InputError, match=r"got 'resid'; its SAEs are: resid/trainer_0$"):
        formats.read(tmp_path, "resid")
    for wrong in ("layers.3", "", "..", "../x", "layers.2/", str(tmp_path)):
        with pytest.raises(InputError, match=rf"must be a folder of .* its SAEs are: {there}"):
            formats.read(tmp_path, wrong)
    with pytest.raises(InputError, match="its SAEs are: none"):
        formats.read(tmp_path / "layers.2" / "sae.safetensors", "layers.2")
    with pytest.raises(InputError, match="its SAEs are: none"):
        formats.read(tmp_path / "nowhere", "layers.2")
