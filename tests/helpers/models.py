"""Small random transformers of every supported family, and a forward pass patched by a hook."""

import torch
import transformers

from mlsae import builtin
from mlsae.data.blocks import find_blocks
from mlsae.data.config import DataConfig

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


_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
STATE_SPACE = {
    "mamba": transformers.MambaConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=3, state_size=8, **_IDS
    ),
    "jamba": transformers.JambaConfig(
        **SMALL, **_IDS, num_experts=2, num_experts_per_tok=1, attn_layer_period=2,
        attn_layer_offset=1, mamba_d_state=8,
    ),
    "falcon_h1": transformers.FalconH1Config(
        **SMALL, **_IDS, mamba_d_ssm=24, mamba_n_heads=4, mamba_d_head=6, mamba_d_state=8
    ),
    "recurrent_gemma": transformers.RecurrentGemmaConfig(
        **SMALL, **_IDS, attention_window_size=16, lru_width=24
    ),
}  # fmt: skip
UNCUT = {  # no model of their first two blocks can be built, or its blocks would be others
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=24, num_layers=3, num_heads=2, max_position_embeddings=32,
        attention_types=[[["global", "local", "global"], 1]], window_size=4,
    ),
    "gpt_neox_japanese": transformers.GPTNeoXJapaneseConfig(**SMALL),
}  # fmt: skip


def gemma3(vision_layers, text_layers):
    """The configuration of a small model that also sees images."""
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **SMALL | {"num_hidden_layers": text_layers}, head_dim=12
        ),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=vision_layers,
            num_attention_heads=2, image_size=28, patch_size=14,
        ),
        mm_tokens_per_image=4, image_token_index=63, boi_token_index=62, eoi_token_index=61,
    )  # fmt: skip


_VISION = transformers.CLIPVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    image_size=28, patch_size=14, projection_dim=16,
)  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
_QWEN_IDS = {
    "image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61,
    "vision_end_token_id": 60,
}  # fmt: skip
WITH_IMAGES = {
    "gemma3": gemma3(vision_layers=3, text_layers=3),
    "llava": transformers.LlavaConfig(
        text_config=CONFIGS["llama"], vision_config=_VISION, image_token_index=63
    ),
    "mistral3": transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**SMALL),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
            image_size=28, patch_size=14,
        ),
        image_token_index=63,
    ),
    "paligemma": transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**SMALL, head_dim=12),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
            image_size=28, patch_size=14, projection_dim=24,
        ),
        image_token_index=63, projection_dim=24,
    ),
    "qwen2_vl": transformers.Qwen2VLConfig(
        text_config={**SMALL, "rope_parameters": _MROPE},
        vision_config={"depth": 3, "embed_dim": 16, "hidden_size": 24, "num_heads": 2},
        **_QWEN_IDS,
    ),
    "qwen2_5_vl": transformers.Qwen2_5_VLConfig(
        text_config={**SMALL, "rope_parameters": _MROPE},
        vision_config={
            "depth": 3, "hidden_size": 16, "out_hidden_size": 24, "num_heads": 2,
            "intermediate_size": 16, "fullatt_block_indexes": [2],
        },
        **_QWEN_IDS,
    ),
    "qwen3_vl": transformers.Qwen3VLConfig(
        text_config={**SMALL, "head_dim": 12, "rope_parameters": _MROPE},
        vision_config={
            "depth": 3, "hidden_size": 16, "out_hidden_size": 24, "num_heads": 2,
            "intermediate_size": 16, "deepstack_visual_indexes": [2],
        },
        **_QWEN_IDS,
    ),
}  # fmt: skip


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


def saved(config, folder):
    """A random model of `config`, and the training config that loads it from `folder`."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model, DataConfig(str(folder))
