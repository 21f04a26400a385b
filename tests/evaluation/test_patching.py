"""Substituted residuals against the model's plain forward pass, and against hooks set by hand.

Legend: B rows, T positions, D width of the residual stream.
"""

import pytest
import torch
import transformers

from mlsae.data.blocks import find_blocks
from mlsae.data.residuals import ResidualReader
from mlsae.errors import InputError
from mlsae.evaluation.patching import check_substitution, substituted_logits
from tests.helpers.models import CONFIGS, SMALL, forward_with_hook, make

B, T, D = 2, 12, 24
MODELS = {
    **CONFIGS,
    # Every other block has a window shorter than a row; the caps are low enough to take effect.
    "gemma2, windows and caps": transformers.Gemma2Config(
        **SMALL, head_dim=12, sliding_window=3, final_logit_softcapping=0.5,
        attn_logit_softcapping=0.5,
    ),
    "gpt_neo, whose blocks return tuples": transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=D, num_layers=3, num_heads=2, max_position_embeddings=32,
        attention_types=[[["global", "local", "global"], 1]], window_size=4,
    ),
    "opt, projected": transformers.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request):
    return make(MODELS[request.param])


def random_ids():
    return torch.randint(0, 64, (B, T), generator=torch.Generator().manual_seed(1))


def test_the_true_residual_gives_the_true_logits(model):
    reader, input_ids = ResidualReader(model), random_ids()
    plain = model(input_ids=input_ids).logits
    residuals, logits = reader.with_logits(input_ids)
    torch.testing.assert_close(logits, plain)
    assert torch.equal(torch.stack(residuals), reader(input_ids))
    for layer in range(3):
        substituted = substituted_logits(reader, input_ids, layer, residuals[layer])
        torch.testing.assert_close(substituted, plain)


def test_another_residual_gives_the_logits_of_a_hook_set_by_hand(model):
    reader, input_ids = ResidualReader(model), random_ids()
    residuals, plain = reader.with_logits(input_ids)
    for layer in range(3):
        other = residuals[layer].flip(1) + torch.randn(B, T, D)
        substituted = substituted_logits(reader, input_ids, layer, other)
        expected = forward_with_hook(model, input_ids, layer, other)
        torch.testing.assert_close(substituted, expected)
        assert (expected - plain).abs().max() > 0.1, "the substitution changes too little to tell"


def test_only_the_blocks_above_run_and_the_model_is_left_as_it_was(model):
    ran = []
    blocks = find_blocks(model)
    reader, input_ids = ResidualReader(model), random_ids()
    residuals, plain = reader.with_logits(input_ids)
    for i, block in enumerate(blocks):
        inner = next(m for m in block.modules() if isinstance(m, torch.nn.LayerNorm) or
                     type(m).__name__.endswith("RMSNorm"))  # fmt: skip
        inner.register_forward_hook(lambda *_, i=i: ran.append(i))
    for layer in range(3):
        ran.clear()
        substituted_logits(reader, input_ids, layer, residuals[layer])
        assert ran == list(range(layer + 1, 3))
    assert not any("forward" in vars(block) for block in blocks)
    assert torch.equal(model(input_ids=input_ids).logits, plain)


def test_a_wrapped_forward_is_put_back():
    """Accelerate wraps the forward of a block that it offloads."""
    model = make(CONFIGS["gpt_neox"])
    reader, input_ids = ResidualReader(model), random_ids()
    (residual, *_), plain = reader.with_logits(input_ids)
    block = find_blocks(model)[0]
    inside = block.forward
    block.forward = wrapper = lambda *args, **kwargs: inside(*args, **kwargs) * 2
    substituted = substituted_logits(reader, input_ids, 0, residual)
    torch.testing.assert_close(substituted, plain)
    assert vars(block)["forward"] is wrapper


def test_a_model_in_bfloat16():
    model = make(CONFIGS["llama"]).bfloat16()
    reader, input_ids = ResidualReader(model), random_ids()
    residuals, plain = reader.with_logits(input_ids)
    assert residuals[1].dtype == torch.bfloat16
    assert torch.equal(substituted_logits(reader, input_ids, 1, residuals[1]), plain)


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda memory: memory.pop(), "layer 0, it fails: pop from empty list"),
        (lambda memory: dict(enumerate(memory))[0], "layer 0, it fails: 0"),
        (lambda memory: memory[0] if memory else int("?"), "layer 0, it fails: invalid literal"),
        (lambda memory: sum(memory, 0.0), r"layer 0, its logits change by \d"),
    ],
)
def test_a_model_that_passes_on_more_than_the_residual_is_refused(take, message):
    """The last block adds the first one's output, as if keys and values were shared."""
    model, memory = make(CONFIGS["llama"]), []
    check_substitution(ResidualReader(model), random_ids())
    blocks = find_blocks(model)
    first, last = blocks[0].forward, blocks[2].forward

    def remember(*args, **kwargs):
        memory.append(first(*args, **kwargs))
        return memory[-1]

    blocks[0].forward = remember
    blocks[2].forward = lambda *args, **kwargs: last(*args, **kwargs) + take(memory)
    model.register_forward_pre_hook(lambda *_: memory.clear())
    with pytest.raises(InputError, match=f"MODEL must pass only the residual stream .* {message}"):
        check_substitution(ResidualReader(model), random_ids())


def test_a_lack_of_memory_is_no_fault_of_the_model(monkeypatch):
    reader = ResidualReader(make(CONFIGS["llama"]))

    def fail(*_args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("mlsae.evaluation.patching.substituted_logits", fail)
    with pytest.raises(torch.OutOfMemoryError):
        check_substitution(reader, random_ids())
