"""The residual stream that hooks read, against Hugging Face's hidden states.

Legend: L layers, B rows, T positions, D width of the residual stream.
"""

import pytest
import torch
import transformers

from mlsae.data.residuals import ResidualReader, find_blocks
from mlsae.errors import InputError
from tests.helpers.models import CONFIGS

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


def test_the_forward_pass_ends_after_the_last_layer_that_is_read(model):
    ran = []
    for i, block in enumerate(find_blocks(model)):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.get_output_embeddings().register_forward_hook(lambda *_: ran.append("logits"))
    input_ids = torch.randint(0, 64, (1, 5))
    all_layers = ResidualReader(model)(input_ids)
    assert "logits" not in ran
    ran.clear()
    lower = ResidualReader(model, [0, 1])(input_ids)
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


def test_a_model_without_one_list_of_blocks_is_refused():
    t5 = transformers.T5Config(
        vocab_size=64, d_model=24, num_layers=3, num_decoder_layers=3, num_heads=2, d_ff=32, d_kv=12
    )
    with pytest.raises(InputError, match="has 2"):
        find_blocks(transformers.T5ForConditionalGeneration(t5))
