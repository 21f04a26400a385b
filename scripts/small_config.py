"""Small configurations of any architecture of transformers, by what their fields are named."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

VOCABULARY = 128
_LAYERS, _WIDTH, _HEAD_DIM, _HEADS = 4, 32, 8, 4

_SIZES = (
    (_LAYERS, """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth
        layers num_blocks num_decoder_layers conf_num_hidden_layers num_layers_per_stack"""),
    (_WIDTH, """hidden_size d_model n_embd embed_dim dim emb_dim embedding_size embedding_dim
        lru_width word_embed_proj_dim projection_dim out_hidden_size output_dim
        attention_hidden_size vision_output_dim projector_hidden_size text_hidden_size
        encoder_hidden_size input_dim num_pos_feats attention_dim image_token_embed_dim
        hidden_size_global projection_hidden_size vision_hidden_size projector_output_dim
        projection_hidden_dim backbone_hidden_size mamba_d_ssm"""),
    (2 * _WIDTH, """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff dff
        dim_ff mlp_dim d_inner moe_intermediate_size shared_expert_intermediate_size
        ffn_hidden_size shared_intermediate_size intermediate_size_mlp dense_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size
        expert_ffn_hidden_size merged_hidden_size projector_input_dim
        projection_intermediate_size alignment_intermediate_size
        max_position_embeddings n_positions n_ctx max_seq_len context_length
        max_sequence_length original_max_position_embeddings max_window_layers
        local_attention"""),
    (_HEADS, """num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads attention_heads swa_num_attention_heads linear_num_heads
        index_n_heads linear_num_key_heads linear_num_value_heads num_sliding_attention_heads
        num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num
        mamba_n_heads num_kv_heads"""),
    (2, """num_key_value_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k
        num_experts_per_token num_query_groups num_kv_shared_layers swa_num_kv_heads
        top_k_experts"""),
    (1, "n_group topk_group num_expert_group"),
    (_HEAD_DIM, """head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim d_kv d_head dim_head
        swa_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        kv_channels query_pre_attn_scalar rotary_dim mamba_d_head mamba_head_dim
        attention_head_dim q_lora_rank kv_lora_rank o_lora_rank mamba_d_state state_size
        ssm_state_size laurel_rank hidden_size_per_layer_input mamba_headdim adapter_rank
        gated_norm_rank num_query_tokens time_step_rank mamba_dt_rank d_rel hc_lowrank
        global_head_dim"""),
    (VOCABULARY, """vocab_size vocab_size_per_layer_input decoder_vocab_size
        unpadded_vocab_size additional_vocab_size ngram_vocab_size_base
        pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"""),
    (16, """sliding_window attention_window_size sliding_window_size window_size chunk_size
        mamba_chunk_size block_size attention_chunk_size"""),
    (28, "image_size img_size"),
    (14, "patch_size"),
)  # fmt: skip
_SIZE_OF = {name: size for size, names in _SIZES for name in names.split()}

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_ROPE_BY_TYPE = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_ALL_HEADS = {"num_key_value_heads": _HEADS}
_IMAGE_ROPE = {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}}
_HALF_ROPE = _ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8}  # their product is 2 · hidden_size
_ZAMBA = {
    "layers_block_type": ["mamba", "hybrid"] * (_LAYERS // 2), "attention_hidden_size": 64,
    "attention_head_dim": 16,  # attention reads the residual beside the embedding
}  # fmt: skip
# What the rules leave wrong: fields that must fit to one another, or whose default is unusable.
_CORRECTIONS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA_HEADS,
    "chameleon": {"vocabulary_map": {"<image>": 120}},
    "cohere_compass": {"text_config": _ROPE_BY_TYPE},
    "cohere_compass_text": _ROPE_BY_TYPE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _EXPERTS,
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] * _LAYERS}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    },
    "dots1": _EXPERTS,
    "dots3_note": {"text_config": _ALL_HEADS},
    "dots3_note_text": _ALL_HEADS,
    "emu3": {
        "vocabulary_map": {"<|extra_200|>": 120, "<image>": 121},
        "vq_config": {"base_channels": 32, "codebook_size": 64},
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "reformer": {"axial_pos_embds": False, "num_buckets": 4},
    "ernie4_5_vl_moe": _IMAGE_ROPE,
    "glm46v": _IMAGE_ROPE,
    "glm4v": _IMAGE_ROPE,
    "glm4v_moe": {"text_config": {"rope_parameters": _HALF_ROPE}},
    "glm_ocr": _IMAGE_ROPE,
    "glmga": _IMAGE_ROPE,
    "glm5_next": {"text_config": _ALL_HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], _LAYERS // 2]]},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [],
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": _MAMBA_HEADS,
    "hunyuan_vl": _IMAGE_ROPE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (_LAYERS // 2)},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mistral4": {"head_dim": 2 * _HEAD_DIM},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "nemotron": _ALL_HEADS,
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _IMAGE_ROPE,
    "paligemma": {"text_config": {"num_key_value_heads": 2}},
    "qwen2_5_omni_thinker": _IMAGE_ROPE,
    "qwen2_5_vl": _IMAGE_ROPE,
    "qwen2_vl": _IMAGE_ROPE,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "step3p7": {"text_config": {"sliding_window": 16}},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
}


def small_config(name: str) -> Any:
    """A configuration of the model type `name`, of a few blocks, 32 wide."""
    config_class = transformers.CONFIG_MAPPING[name]
    return config_class(**_arguments(config_class(), _CORRECTIONS.get(name, {})))


def _arguments(config: PreTrainedConfig, corrections: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a small configuration of the type of `config`, the default one."""
    arguments: dict[str, Any] = {}
    fields = vars(config)
    token_id = VOCABULARY  # the special ones are the last
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            arguments[name] = _arguments(value, corrections.get(name, {}))
            arguments[name].setdefault("model_type", value.model_type)
        elif name in _SIZE_OF and type(value) is int and value > 1:
            arguments[name] = _SIZE_OF[name]
        elif name == "head_dim" and value is None:
            arguments[name] = _HEAD_DIM
        elif name == "is_decoder":
            arguments[name] = True
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            arguments[name] = value | {"mrope_section": _sections(value)}
        elif name.endswith(("_id", "_index")) and type(value) is int and value >= 3:
            token_id -= 1
            arguments[name] = token_id
    if "kv_lora_rank" in fields:  # its keys are as many as its queries
        arguments |= _ALL_HEADS
    nested = {name for name in corrections if isinstance(fields.get(name), PreTrainedConfig)}
    return arguments | {k: v for k, v in corrections.items() if k not in nested}


def _sections(rope: dict[str, Any]) -> list[int]:
    """How small heads share their rotated pairs among time, height and width."""
    pairs = int(_HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    return [1, 1, pairs - 2]
