"""Small random transformers of every supported family, and a forward pass patched by a hook."""

import torch
import transformers

from mlsae import builtin
from mlsae.data.residuals import find_blocks

SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=24, n_layer=3, n_head=2, n_positions=32),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "llama": transformers.LlamaConfig(**SMALL),
    "gemma2": transformers.Gemma2Config(**SMALL, head_dim=12),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "phi": transformers.PhiConfig(**SMALL),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=24),
}


def make(config):
    """A random model whose weights are large enough for its blocks to matter."""
    torch.manual_seed(0)
    config = type(config).from_dict({**config.to_dict(), "initializer_range": 0.3})
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def forward_with_hook(model, input_ids, layer, residual):
    """The oracle of patching: the whole model runs, and a hook replaces one block's output."""

    def replace(_module, _args, output):
        return residual if isinstance(output, torch.Tensor) else (residual, *output[1:])

    handle = find_blocks(model)[layer].register_forward_hook(replace)
    try:
        return model(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()


def save_gpt2(folder, massive=0.0, token=None, late=False):
    """Save a random GPT-2 with the built-in tokenizer, in which the first position, or a token id,
    has a vector `massive` times as long as others; with `late`, the first position has it at the
    last layer only."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        tokens, positions = model.transformer.wte.weight, model.transformer.wpe.weight
        tokens.mul_(50)
        positions.mul_(5)
        length = tokens.norm(dim=1).mean()
        (positions[0] if token is None else tokens[token])[3] += (4 if late else massive) * length
        if late:  # a neuron that fires where one dimension is all of the norm
            mlp = model.transformer.h[1].mlp
            mlp.c_fc.weight[3, 0], mlp.c_fc.bias[0] = 10, -45
            mlp.c_proj.weight[0, 5] = massive * length
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
