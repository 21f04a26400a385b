"""The residual stream that hooks read, against Hugging Face's hidden states.

Legend: L layers, B rows, T positions, D width of the residual stream.
"""

import pytest
import torch
import transformers

from mlsae.data import residuals as reading
from mlsae.data.blocks import find_blocks
from mlsae.data.residuals import ResidualReader
from mlsae.errors import InputError
from mlsae.evaluation.patching import check_substitution
from tests.helpers.models import CONFIGS, SMALL, gemma3

FINAL_NORMS = {
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "phi": "model.final_layernorm",
    "opt": "model.decoder.final_layer_norm",
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def test_every_layer_is_the_output_of_its_block(model):
    input_ids = torch.randint(0, 64, (2, 7))
    residuals = ResidualReader(model)(input_ids)
    assert residuals.shape == (3, 2, 7, 24)
    with torch.no_grad():
        hidden = model(input_ids=input_ids, output_hidden_states=True).hidden_states
    for layer in range(2):
        torch.testing.assert_close(residuals[layer], hidden[layer + 1])
    # Hugging Face's last hidden state is after the final norm; ours is before it.
    norm = model.get_submodule(FINAL_NORMS.get(model.config.model_type, "model.norm"))
    assert not torch.allclose(residuals[2], hidden[3])
    torch.testing.assert_close(norm(residuals[2]), hidden[3])


def test_many_rows_go_through_the_model_a_few_at_a_time(model, monkeypatch):
    ids = torch.randint(0, 64, (7, 5), generator=torch.Generator().manual_seed(1))
    reader, seen = ResidualReader(model), []
    whole = reader(ids)
    handle = reader.blocks[0].register_forward_hook(
        lambda _module, _args, output: seen.append(
            (output if isinstance(output, torch.Tensor) else output[0]).shape[0]
        )
    )
    monkeypatch.setattr(reading, "_TOKENS_AT_ONCE", 17)
    parts = reader(ids)
    handle.remove()
    assert seen == [3, 3, 1]
    torch.testing.assert_close(parts, whole)


def test_the_forward_pass_ends_after_the_last_layer_that_is_read(model):
    ran = []
    for i, block in enumerate(find_blocks(model)):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.get_output_embeddings().register_forward_hook(lambda *_: ran.append("logits"))
    input_ids = torch.randint(0, 64, (1, 5))
    reader, lower_reader = ResidualReader(model), ResidualReader(model, [0, 1])
    ran.clear()
    all_layers = reader(input_ids)
    assert ran == [0, 1, 2]
    ran.clear()
    lower = lower_reader(input_ids)
    assert ran == [0, 1]
    torch.testing.assert_close(lower, all_layers[:2])
    assert all(len(block._forward_hooks) == 1 for block in find_blocks(model)), "hooks left behind"


def test_bad_layers_are_named(model):
    with pytest.raises(InputError, match=r"--layers must be in \[0, 2\] .* got 1 3"):
        ResidualReader(model, [1, 3])
    with pytest.raises(InputError, match=r"--layers must be in .* got none"):
        ResidualReader(model, [])
    with pytest.raises(InputError, match=r"--layers must ascend without repeats, got 1 1"):
        ResidualReader(model, [1, 1])


def causal(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_an_encoder_decoder_is_refused():
    t5 = transformers.T5Config(
        vocab_size=64, d_model=24, num_layers=3, num_decoder_layers=3, num_heads=2, d_ff=32, d_kv=12
    )
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_blocks(transformers.T5ForConditionalGeneration(t5))


@pytest.mark.parametrize("vision_layers", [2, 3])
def test_the_blocks_are_those_of_the_text(vision_layers):
    """Not those of the vision tower, whatever its depth."""
    model = causal(gemma3(vision_layers, text_layers=3))
    assert find_blocks(model) is model.model.language_model.layers
    assert ResidualReader(model, [0, 2])(torch.ones(1, 4, dtype=torch.int64)).shape[0] == 2


def test_a_list_of_rotary_embeddings_is_no_list_of_blocks():
    """This one has as many as the model has blocks."""
    model = causal(
        transformers.GraniteSWAConfig(**SMALL | {"num_hidden_layers": 1}, layer_rope_theta=[1e4])
    )
    assert any(
        isinstance(module, torch.nn.ModuleList) and module is not model.model.layers
        for module in model.modules()
    )
    assert find_blocks(model) is model.model.layers


def test_two_lists_of_blocks_are_named():
    """The blocks of this model are in two stacks, which run in turn and more than once."""
    config = transformers.HrmTextConfig(**SMALL | {"num_layers_per_stack": 3})
    with pytest.raises(InputError, match=r"one list of 3 .* has 2 \(L_module\S*, H_module"):
        find_blocks(causal(config))


def test_blocks_that_return_several_streams_are_refused():
    config = transformers.Gemma3nTextConfig(
        **SMALL, head_dim=12, vocab_size_per_layer_input=64, hidden_size_per_layer_input=4,
        num_kv_shared_layers=0, layer_types=["sliding_attention"] * 2 + ["full_attention"],
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 3,
    )  # fmt: skip
    message = r"block 0 returns a tensor \(4, 1, 4, 24\) where a residual stream is \(1, 4, 24\)"
    with pytest.raises(InputError, match=rf"Gemma3nForCausalLM cannot be read: {message}"):
        ResidualReader(causal(config))


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (lambda x: (None, x), "a NoneType"),
        (lambda x: {"hidden": x}, "a dict"),
        (lambda x: x.transpose(0, 1), r"a tensor \(4, 1, 24\)"),
        (lambda x: x[..., :12], r"a tensor \(1, 4, 12\)"),
    ],
)
def test_a_block_that_returns_something_else_is_refused(output, found):
    model = causal(CONFIGS["llama"])
    last, inside = find_blocks(model)[2], find_blocks(model)[2].forward
    last.forward = lambda *args, **kwargs: output(inside(*args, **kwargs))
    model.model.norm.forward = lambda _: torch.zeros(1, 4, 24)  # whatever the block returns
    with pytest.raises(InputError, match=f"block 2 returns {found} where"):
        ResidualReader(model)
    ResidualReader(model, [0, 1])  # only what is read must be a residual


def test_blocks_that_run_in_another_order_are_refused():
    model = causal(CONFIGS["llama"])
    _, second, last = find_blocks(model)
    model.model.layers = torch.nn.ModuleList([second, second, last])
    with pytest.raises(InputError, match="its blocks run in the order 0 1 0 1 2"):
        ResidualReader(model)


def test_blocks_that_do_not_run_on_text_are_named():
    """The second block of this model attends to images, and is left out without one."""
    config = transformers.models.mllama.MllamaTextConfig(
        **SMALL,
        cross_attention_layers=[1],
        pad_token_id=0,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
    )
    model = transformers.MllamaForCausalLM(config).eval()
    with pytest.raises(InputError, match=r"--layers must be .* 1 do not; those that do are 0 2"):
        ResidualReader(model)
    input_ids = torch.randint(0, 64, (2, 7))
    reader = ResidualReader(model, [0, 2])
    assert reader(input_ids).shape == (2, 2, 7, 24)
    check_substitution(reader, input_ids)


def test_a_model_that_does_not_run_on_text_is_refused():
    model = causal(CONFIGS["llama"])
    inside = model.forward

    def forward(*args, pixel_values, **kwargs):
        return inside(*args, **kwargs)

    model.forward = forward
    with pytest.raises(InputError, match=r"must run on text alone.* missing .* 'pixel_values'"):
        ResidualReader(model)
