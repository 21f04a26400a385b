"""Formats of other libraries: files written by hand in their layouts, outputs computed by hand.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae import MLSAE, formats, load_sae
from mlsae.convert import ConvertConfig, convert
from mlsae.errors import InputError
from mlsae.formats import SavedSAE
from tests.helpers.peer_files import D, K, M, build, load, sae, same, save

N = 40


def inputs():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(9)) * 3 + 1


def by_hand(weights, x, standardize):
    """x̂ in float64, vector by vector: scores, the K largest, ReLU, decode."""
    w = {name: weight.double() for name, weight in weights.items()}
    rows = []
    for vector in x.double():
        mean, std = vector.mean(), ((vector - vector.mean()).square().sum() / (D - 1)).sqrt()
        inner = (vector - mean) / (std + 1e-5) if standardize else vector
        scores = w["W_enc"] @ (inner - w["b_dec"]) + w.get("b_enc", 0)
        chosen = sorted(range(M), key=lambda j, scores=scores: -scores[j].item())[:K]
        out = w["b_dec"] + sum(max(scores[j], 0) * w["W_dec"][j] for j in chosen)
        rows.append(out * std + mean if standardize else out)
    return torch.stack(rows)


PEERS = ("released", "sparsify", "saelens", "dictionary_learning", "openai")
STANDARDIZED = {"released", "saelens", "openai"}


@pytest.mark.parametrize("name", PEERS)
def test_outputs_are_those_computed_by_hand(tmp_path, name):
    weights = sae()
    if name == "released":
        del weights["b_enc"]
    folder = build(name, tmp_path / name, sae())
    assert formats.detect(folder) == name
    mlsae = MLSAE.from_saved(formats.read(folder))
    assert mlsae.config.standardize == (name in STANDARDIZED)
    expected = by_hand(weights, inputs(), mlsae.config.standardize)
    torch.testing.assert_close(mlsae(inputs()).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PEERS)
def test_a_round_trip_keeps_every_bit(tmp_path, name, dtype):
    """Theirs to ours to theirs: weights, counters and settings are unchanged."""
    theirs = build(name, tmp_path / "theirs", sae(dtype=dtype))
    convert(ConvertConfig(theirs, tmp_path / "ours"))
    convert(ConvertConfig(tmp_path / "ours", tmp_path / "back", to=name))
    for file in theirs.iterdir():
        assert same(load(file), load(tmp_path / "back" / file.name)), file.name


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["mlsae", *PEERS]), st.integers(1, 9), st.integers(1, 20), st.data(),
    st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_ours_to_theirs_and_back(tmp_path_factory, name, D, M, data, bias, dtype):
    weights = sae(data.draw(st.integers(0, 99)), D, M, dtype)
    if not bias or name == "released":
        del weights["b_enc"]
    plain = name in ("sparsify", "dictionary_learning")
    standardize = name == "openai" or (not plain and data.draw(st.booleans()))
    about = {"training": {"lr": 1e-3}, "versions": {"torch": "2.13.0"}}
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, 30), max_size=4))))
    k = data.draw(st.integers(1, M))
    written = SavedSAE(
        weights, k, standardize, layers, "some/model", about, {"mine.dead": torch.arange(M)}
    )
    folder = tmp_path_factory.mktemp(name)
    formats.write(written, folder, name)
    assert formats.detect(folder) == name
    formats.write(formats.read(folder), folder / "ours", "mlsae")
    restored = formats.read(folder / "ours")
    assert same(restored.weights, written.weights)
    assert torch.equal(restored.carried["mine.dead"], written.carried["mine.dead"])
    assert (restored.k, restored.standardize, restored.layers) == (k, standardize, layers)
    assert restored.model == "some/model"
    assert {name: restored.about[name] for name in about} == about


def test_layers_and_model_named_in_the_files_are_kept(tmp_path):
    for name, layers, model in (
        ("saelens", (4,), "gpt2"),
        ("dictionary_learning", (3,), "EleutherAI/pythia-70m-deduped"),
    ):
        loaded = formats.read(build(name, tmp_path / name, sae()))
        assert (loaded.layers, loaded.model) == (layers, model)
    assert formats.read(build("sparsify", tmp_path / "layers.5", sae())).layers == (5,)
    assert formats.read(build("sparsify", tmp_path / "layers.5.mlp", sae())).layers == ()


@pytest.mark.parametrize("to", ["sparsify", "dictionary_learning"])
def test_standardization_is_refused_if_the_format_cannot_express_it(tmp_path, to):
    source = build("saelens", tmp_path / "a", sae())
    with pytest.raises(InputError, match=rf"--to {to} .*standardizes.*give --to saelens"):
        convert(ConvertConfig(source, tmp_path / "b", to=to))
    assert not (tmp_path / "b").exists()


def test_plain_inputs_and_biases_are_refused_if_the_format_cannot_express_them(tmp_path):
    source = build("sparsify", tmp_path / "a", sae())
    with pytest.raises(InputError, match=r"--to openai .*give --to sparsify"):
        convert(ConvertConfig(source, tmp_path / "b", to="openai"))
    with pytest.raises(InputError, match=r"--to released .*b_enc"):
        convert(ConvertConfig(source, tmp_path / "b", to="released"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("sparsify", "cfg.json", {"activation": "groupmax"}),
        ("sparsify", "cfg.json", {"transcode": True}),
        ("sparsify", "cfg.json", {"skip_connection": True}),
        ("sparsify", "cfg.json", {"k": M + 1}),
        ("saelens", "cfg.json", {"architecture": "gated"}),
        ("saelens", "cfg.json", {"normalize_activations": "constant_norm_rescale"}),
        ("saelens", "cfg.json", {"reshape_activations": "hook_z"}),
        ("saelens", "cfg.json", {"rescale_acts_by_decoder_norm": True}),
        ("dictionary_learning", "config.json", {"trainer": {"dict_class": "GatedAutoEncoder"}}),
        ("dictionary_learning", "config.json", {"trainer": {}}),
        ("dictionary_learning", "ae.pt", {"k": torch.tensor(K + 1)}),
        ("openai", "autoencoder.pt", {"activation": "ReLU"}),
        ("openai", "autoencoder.pt", {"activation_state_dict": {"k": K, "postact_fn": "Identity"}}),
        ("released", "config.json", {"lens": True}),
        ("sparsify", "sae.safetensors", {"W_skip": torch.zeros(D, D)}),
        ("saelens", "sae_weights.safetensors", {"W_dec": torch.zeros(M - 1, D)}),
        ("openai", "autoencoder.pt", {"pre_bias": torch.zeros(D, dtype=torch.int64)}),
        ("openai", "autoencoder.pt", {"pre_bias": 3}),
        ("openai", "autoencoder.pt", {"pre_bias": torch.zeros(D, 1)}),
        ("openai", "autoencoder.pt", {"activation_state_dict": [3]}),
        ("openai", "autoencoder.pt", {"activation_state_dict": None}),
        ("openai", "autoencoder.pt", {5: torch.zeros(2)}),
        ("dictionary_learning", "config.json", {"trainer": 10**30}),
        ("dictionary_learning", "ae.pt", {"k": torch.tensor([K, K])}),
        ("dictionary_learning", "ae.pt", {"k": "3"}),
        ("saelens", "cfg.json", {"metadata": "x"}),
        ("saelens", "cfg.json", {"k": True}),
        ("saelens", "cfg.json", {"k": float("nan")}),
        ("saelens", "sae_weights.safetensors", {"W_dec": torch.full((M, D), torch.nan)}),
        ("sparsify", "cfg.json", {"k": None}),
        ("sparsify", "cfg.json", {"k": "3"}),
        ("released", "config.json", {"layers": 3}),
        ("released", "config.json", {"layers": [0, "x"]}),
        ("released", "config.json", {"layers": {"x": 1}}),
        ("released", "config.json", {"standardize": "x"}),
        ("released", "config.json", {"k": []}),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path, name, file, change):
    folder = build(name, tmp_path / "theirs", sae())
    save(folder / file, {**load(folder / file), **change})
    wrong = next(iter(change))
    named = {"trainer": "trainer", "activation_state_dict": "k|postact_fn|activation_state",
             "pre_bias": "b_dec|pre_bias"}  # fmt: skip
    with pytest.raises(InputError, match=named.get(wrong, str(wrong))):
        formats.read(folder)


@pytest.mark.parametrize("name", PEERS)
def test_a_damaged_file_is_named(tmp_path, name):
    for file in build(name, tmp_path / "whole", sae()).iterdir():
        folder = build(name, tmp_path / file.name, sae())
        (folder / file.name).write_bytes(file.read_bytes()[:40])
        with pytest.raises(InputError, match=file.name):
            formats.read(folder)


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["openai", "dictionary_learning"])
@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, name, how):
    folder = build(name, tmp_path / "theirs", sae())
    path = folder / ("ae.pt" if name == "dictionary_learning" else "autoencoder.pt")
    content = {**load(path), "k": Evil(tmp_path / "owned")}
    if how == "torch.save":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="tensors only"):
        formats.read(folder)
    assert not (tmp_path / "owned").exists()


def test_a_single_file_is_read(tmp_path):
    folder = build("openai", tmp_path / "theirs", sae())
    path = (folder / "autoencoder.pt").rename(tmp_path / "6.pt")
    assert formats.read(path).k == K


def test_a_folder_of_folders_names_them(tmp_path):
    build("sparsify", tmp_path / "layers.0", sae())
    build("sparsify", tmp_path / "layers.1", sae())
    with pytest.raises(InputError, match=r"give --hookpoint, one of: layers\.0, layers\.1$"):
        formats.read(tmp_path)
    with pytest.raises(InputError, match="does not exist; check the path"):
        formats.read(tmp_path / "nowhere")


def test_a_full_folder_is_left_alone(tmp_path):
    source = build("sparsify", tmp_path / "a", sae())
    with pytest.raises(InputError, match="DST must be a new or empty folder"):
        convert(ConvertConfig(source, source))


def test_the_training_state_is_reported_as_not_converted(tmp_path):
    source = build("sparsify", tmp_path / "a", sae())
    (source / "checkpoints").mkdir()
    assert "not converted" in convert(ConvertConfig(source, tmp_path / "b"))


def test_their_sae_can_be_trained_here(tmp_path):
    """load_sae gives a SparseTopKSAE whose gradients equal autograd's through the dense formula."""
    weights = sae()
    loaded = load_sae(build("sparsify", tmp_path / "a", weights))
    x = inputs()
    (loaded(x) - x).square().mean().backward()
    w = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    scores = (x.double() - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    values, indices = scores.topk(K)
    f = torch.zeros_like(scores).scatter(1, indices, values.relu())
    (f @ w["W_dec"] + w["b_dec"] - x).square().mean().backward()
    for name, weight in w.items():
        gradient = getattr(loaded, name).grad.double()
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="standardizes them; load it with MLSAE"):
        load_sae(build("openai", tmp_path / "b", weights))


def test_weights_that_are_no_saes_are_refused():
    good = {name: w for name, w in sae().items() if name != "b_enc"}
    for change, told in (
        ({"extra": torch.ones(2)}, "also has extra"),
        (
            {"W_enc": torch.ones(0, D)},
            r"W_enc must have latents and inputs, \(M, D\), got \(0, 6\)",
        ),
        ({"W_enc": torch.ones(M, 0)}, "must have latents and inputs"),
        ({"W_enc": torch.ones(M)}, "must have latents and inputs"),
        ({"W_enc": torch.ones(M, D, dtype=torch.complex64)}, "W_enc must be floating-point"),
    ):
        with pytest.raises(InputError, match=told):
            SavedSAE({**good, **change}, K, standardize=False)


def test_a_model_card_that_cannot_be_read_is_named(tmp_path):
    folder = build("released", tmp_path / "a", sae())
    for content in (b"\xff\xfe\x00", b"---\n: [\n---\n", b"---\n- 1\n---\n"):
        (folder / "README.md").write_bytes(content)
        with pytest.raises(InputError, match=r"README\.md must be a readable model card"):
            formats.read(folder)


def test_settings_beside_the_files_that_are_damaged_are_named(tmp_path):
    folder = build("sparsify", tmp_path / "a", sae())
    for content, told in (
        ("[]", "must hold a JSON object"),
        ('{"layers": 3}', "layers in .* must be a list"),
        ('{"layers": [1.5]}', "layers must be integers"),
        ('{"about": []}', "about in .* must be an object"),
        ('{"model": 3}', "model must be a name"),
        ("[" * 100_000, "must be a readable JSON file"),
    ):
        (folder / "mlsae.json").write_text(content)
        with pytest.raises(InputError, match=told):
            formats.read(folder)


def test_a_path_that_cannot_be_looked_at_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot: File name too long"):
        formats.read(tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="SRC must"):
        formats.read(tmp_path / "loop")
