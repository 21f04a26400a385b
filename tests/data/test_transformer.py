"""Loading a transformer in part, on several devices, or in other dtypes, against loading it whole,
on one device, in float32."""

import dataclasses
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mlsae import builtin
from mlsae.config import SAEConfig, TrainConfig
from mlsae.data import dtypes, shortened, transformer
from mlsae.data.blocks import find_blocks
from mlsae.data.config import DataConfig
from mlsae.data.residuals import ResidualReader
from mlsae.data.stream import DataStream, read_shape
from mlsae.data.transformer import load_transformer
from mlsae.errors import InputError
from mlsae.evaluation.patching import check_substitution
from mlsae.evaluation.run import EvaluateConfig, evaluate
from mlsae.training.run import train
from tests.helpers.models import CONFIGS, STATE_SPACE, UNCUT, WITH_IMAGES, saved

CPU = torch.device("cpu")
MULTIPLIES_BFLOAT16 = dtypes.multiplies_bfloat16  # conftest stands in for it
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_blocks_above_the_last_one_that_is_read_are_not_loaded(name, tmp_path):
    model, settings = saved(CONFIGS[name], tmp_path)
    part = load_transformer(settings, CPU, n_layers=2)
    assert len(find_blocks(part)) == 2
    assert part.num_parameters() < model.num_parameters()
    assert torch.equal(ResidualReader(part)(IDS), ResidualReader(model, [0, 1])(IDS))
    whole = load_transformer(settings, CPU)
    assert torch.equal(whole(IDS).logits, model(IDS).logits)


def test_all_blocks_are_loaded_if_they_depend_on_their_number(tmp_path):
    """The last two blocks of this model share the keys of earlier ones; in a model cut short, the
    last two would be different blocks."""
    config = transformers.Gemma4TextConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=32, head_dim=12,
        global_head_dim=12, num_kv_shared_layers=2, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=64, layer_types=["sliding_attention", "full_attention"] * 3,
    )  # fmt: skip
    model, settings = saved(config, tmp_path)
    part = load_transformer(settings, CPU, n_layers=5)
    assert len(find_blocks(part)) == 6
    layers = [0, 4]
    assert torch.equal(ResidualReader(part, layers)(IDS), ResidualReader(model, layers)(IDS))


@pytest.mark.parametrize("name", UNCUT)
def test_all_blocks_are_loaded_if_a_shorter_model_cannot_be_made(name, tmp_path, capsys):
    model, settings = saved(UNCUT[name], tmp_path)
    part = load_transformer(settings, CPU, n_layers=2)
    assert len(find_blocks(part)) == 3
    assert torch.equal(ResidualReader(part, [0, 1])(IDS), ResidualReader(model, [0, 1])(IDS))
    lines = [line for line in capsys.readouterr().err.splitlines() if "loading all blocks" in line]
    assert len(lines) == 1, "said once"


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, RuntimeError("meta")])
def test_any_failure_to_shorten_a_model_loads_all_blocks(error, tmp_path, monkeypatch, capsys):
    _, settings = saved(CONFIGS["llama"], tmp_path)

    def fail(*_args):
        raise error

    monkeypatch.setattr(shortened, "_cut", fail)
    assert len(find_blocks(load_transformer(settings, CPU, n_layers=2))) == 3
    assert "loading all blocks of the model, not only the 2 to read" in capsys.readouterr().err


@pytest.mark.parametrize("name", STATE_SPACE)
def test_blocks_of_derived_types_can_be_left_out(name, tmp_path):
    """The configurations of these derive the types of the blocks, and refuse to have them set."""
    model, settings = saved(STATE_SPACE[name], tmp_path)
    part = load_transformer(settings, CPU, n_layers=2)
    assert len(find_blocks(part)) == 2
    expected = ResidualReader(model, [0, 1])(IDS)
    # Weights in files are aligned in another way, and so is the order of a product's sums.
    torch.testing.assert_close(ResidualReader(part)(IDS), expected)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_the_text_side_of_a_model_that_sees_images_is_read(name, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(WITH_IMAGES[name]).eval()
    model.save_pretrained(tmp_path)
    ids = IDS.clamp(max=55)  # those of images are above
    blocks = model.model.language_model.layers
    expected = []
    handles = [b.register_forward_hook(lambda *_: expected.append(first(_[2]))) for b in blocks]
    logits = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    for n_layers in (None, 2):
        loaded = load_transformer(DataConfig(str(tmp_path)), CPU, n_layers)
        reader = ResidualReader(loaded, [0, 1])
        assert torch.equal(reader(ids), torch.stack(expected[:2]))
        if n_layers is None:
            torch.testing.assert_close(reader.logits(ids), logits)
            check_substitution(reader, ids)
        assert len(find_blocks(loaded)) == (n_layers or 3)


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def test_weights_that_the_files_lack_are_named(tmp_path):
    """Transformers draws them at random."""
    _, settings = saved(CONFIGS["llama"], tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight \(1 "):
        load_transformer(settings, CPU)
    load_transformer(settings, CPU, n_layers=1)  # that block is not read


def test_an_encoder_decoder_is_named(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path)
    for load in (transformer.load_config, lambda config: load_transformer(config, CPU)):
        with pytest.raises(InputError, match=r"decoder-only .* is an encoder-decoder \(t5\)"):
            load(DataConfig(str(tmp_path)))


def test_a_configuration_without_a_width_is_named(tmp_path):
    transformers.CLIPConfig().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blt"}')
    with pytest.raises(InputError, match=r"configuration of .* \(blt\) has no num_hidden_layers"):
        transformer.load_config(DataConfig(str(tmp_path)))


def builtin_settings(**options):
    return DataConfig(builtin.NAME, **options)


def test_a_model_may_be_spread_over_devices():
    """Here over the CPU and the disk. Each part is moved in when it runs, and residuals out."""
    plain = ResidualReader(load_transformer(builtin_settings(), CPU))
    room = 6_000_000  # the weights have 13.8 MB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "_free_memory", lambda device, reserved: {"cpu": room})
        spread = load_transformer(builtin_settings(model_device_map="auto"), CPU)
    assert set(map(str, spread.hf_device_map.values())) == {"cpu", "disk"}
    reader = ResidualReader(spread)
    for _ in range(2):
        assert torch.equal(reader(IDS), plain(IDS))
    residuals, logits = reader.with_logits(IDS)
    assert torch.equal(torch.stack(residuals), plain(IDS))
    assert torch.equal(logits, plain.logits(IDS))


def test_reserved_memory_is_left_free():
    device_map = builtin_settings(model_device_map="auto")
    assert load_transformer(device_map, CPU).device == CPU
    free = transformer._free_memory(CPU, 0)["cpu"]
    offloaded = load_transformer(device_map, CPU, reserved=2 * free)
    assert set(offloaded.hf_device_map.values()) == {"disk"}


def test_residuals_have_the_model_s_dtype():
    for name in ("bfloat16", "float16"):
        model = load_transformer(builtin_settings(model_dtype=name), CPU)
        assert ResidualReader(model)(IDS).dtype == getattr(torch, name)


SAVED = [  # in what, and what a GPU computes in
    ("float32", torch.bfloat16),
    (None, torch.bfloat16),
    ("bfloat16", torch.bfloat16),
    ("float16", torch.float16),
]


@pytest.mark.parametrize(("saved", "on_a_gpu"), SAVED)
def test_float32_on_a_gpu_is_for_those_who_ask_for_it(saved, on_a_gpu):
    config = transformers.GPT2Config(dtype=saved)
    for whole in (True, False):
        assert dtypes.dtype_of(DataConfig(), config, "cuda", whole) == on_a_gpu
        asked = DataConfig(model_dtype="float32")
        assert dtypes.dtype_of(asked, config, "cuda", whole) == torch.float32


@pytest.mark.parametrize(("saved", "on_a_gpu"), SAVED)
@pytest.mark.parametrize("units", [True, False])
def test_a_cpu_reads_residuals_in_bfloat16_only_by_matrix_units(
    saved, on_a_gpu, units, monkeypatch
):
    """Logits are in float32, and so is what a GPU would run in float16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units}, raising=False)
    monkeypatch.setattr(dtypes, "multiplies_bfloat16", MULTIPLIES_BFLOAT16)
    config = transformers.GPT2Config(dtype=saved)
    read = dtypes.dtype_of(DataConfig(), config, "cpu", whole=False)
    assert (read == torch.bfloat16) == (units and on_a_gpu == torch.bfloat16)
    others = [
        dtypes.dtype_of(DataConfig(), config, "cpu", whole=True),
        dtypes.dtype_of(DataConfig(), config, "mps", whole=False),
        dtypes.dtype_of(DataConfig(model_dtype="float32"), config, "cpu", whole=False),
    ]
    assert others == [torch.float32] * 3


def test_training_has_its_transformer_in_bfloat16_and_an_evaluation_has_not(monkeypatch):
    monkeypatch.setattr(dtypes, "multiplies_bfloat16", lambda: True)
    settings = builtin_settings()
    streams = [
        DataStream(settings, read_shape(settings), CPU, micro_rows=1, whole=whole)
        for whole in (True, False)
    ]
    assert [stream.dtype for stream in streams] == [torch.float32, torch.bfloat16]
    whole, part = (next(stream.residuals(IDS)) for stream in streams)
    error = (part - whole).square().sum() / (whole - whole.mean(1, keepdim=True)).square().sum()
    assert 0 < error < 2**-8


def test_attention_is_torch_s_own_kernel():
    model = load_transformer(builtin_settings(), CPU)
    assert model.config._attn_implementation == "sdpa"


def test_training_and_evaluation_are_the_same_on_a_spread_model(tmp_path, monkeypatch):
    config = TrainConfig(
        DataConfig(layers=(1, 3), seq_len=64), sae=SAEConfig(expansion=2, k=8), tokens=1500,
        batch_tokens=512, eval_tokens=512, out=tmp_path / "plain",
    )  # fmt: skip
    train(config)
    room = {"cpu": 2_000_000}
    monkeypatch.setattr(transformer, "_free_memory", lambda device, reserved: room)
    spread = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, model_device_map="auto"),
        out=tmp_path / "spread",
    )
    train(spread)
    for name in ("model.safetensors", "latents.safetensors"):
        assert (spread.out / name).read_bytes() == (config.out / name).read_bytes()
    metrics = [
        evaluate(EvaluateConfig(out, tokens=512, resamples=2)).as_dict()["figures"]
        for out in (config.out, spread.out)
    ]
    assert metrics[0]["delta_ce"]["layers"][0] > 0
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("options", "package"),
    [
        ({"model_device_map": "auto"}, "accelerate"),
        ({"model_quantize": "8bit"}, "bitsandbytes"),
    ],
)
def test_a_package_that_is_not_installed_is_named(monkeypatch, options, package):
    monkeypatch.setitem(sys.modules, package, None)
    (argument,) = options
    with pytest.raises(InputError, match=rf"--{argument} needs .* pip install {package}"):
        load_transformer(builtin_settings(**options), CPU)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_is_smaller_and_near(bits):
    """Needs bitsandbytes, whose CPU backend is enough."""
    pytest.importorskip("bitsandbytes")
    plain = load_transformer(builtin_settings(), CPU)
    small = load_transformer(builtin_settings(model_quantize=bits), CPU)
    assert small.get_memory_footprint() < 0.5 * plain.get_memory_footprint()
    exact, quantized = ResidualReader(plain)(IDS), ResidualReader(small)(IDS).float()
    error = (quantized - exact).norm() / exact.norm()
    assert 0 < error < (0.05 if bits == "8bit" else 0.3)


def test_an_unknown_model_is_named(tmp_path):
    for load in (transformer.load_config, transformer.load_tokenizer):
        with pytest.raises(InputError, match=r"MODEL must be 'builtin', .* cannot be loaded"):
            load(DataConfig(str(tmp_path)))


def test_an_unknown_device_map_is_named():
    with pytest.raises(InputError, match=r"--model_device_map must be auto, .* got 'nowhere'"):
        load_transformer(builtin_settings(model_device_map="nowhere"), CPU)
