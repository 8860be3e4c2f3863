"""Configurations of the attention-only families with dense feed-forward layers."""

from __future__ import annotations

from model_zoo_base import (
    ALTERNATING,
    FULL,
    LLAMA3_ROPE,
    MSCALED_YARN,
    SLIDING,
    VOCAB,
    WINDOW,
    YARN,
    Config,
)

GEMMA3: Config = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16.0,
}
GEMMA4: Config = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "sliding_window_pattern": 2,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}

GEAR: Config = {"num_hidden_layers": 4, "layer_types": ALTERNATING, "conv_L_cache": 3}

MINISTRAL3: Config = {
    "num_hidden_layers": 4,
    "layer_types": ALTERNATING,
    "rope_parameters": {**MSCALED_YARN, "llama_4_scaling_beta": 0.1},
}

DENSE: dict[str, Config] = {
    "apertus": {"post_norm": True, "qk_norm": True, "rope_scaling": LLAMA3_ROPE},
    "cohere": {"use_qk_norm": True, "logit_scale": 1.0},
    "cohere2": {"num_hidden_layers": 4, "sliding_window_pattern": 2, "logit_scale": 1.0},
    "ernie4_5": {},
    "exaone": {"num_layers": 3},
    "exaone4": {
        "num_hidden_layers": 4,
        "sliding_window_pattern": "LG",
        "rope_scaling": LLAMA3_ROPE,
    },
    "gear": GEAR,
    "gemma": {"num_key_value_heads": 1},
    # A soft-cap that scores of such a small model reach.
    "gemma2": {
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 16.0,
        "attn_logit_softcapping": 20.0,
    },
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "glm": {},
    "glm4": {"attention_bias": True},
    "gpt2": {},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gptj": {"rotary_dim": 8},
    "granite": {
        "logits_scaling": 1.5,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.6,
    },
    "helium": {},
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0}},
    "internlm2": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "internlm3": {"qkv_bias": True},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "lille-130m": {"block_size": 1024, "n_kv_heads": 2},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 0]},
    "mimo": {},
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0},
    "ministral3": MINISTRAL3,
    "muse_glimmer": {"num_hidden_layers": 4, "output_multiplier": 1.0},
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
        "rope_scaling": LLAMA3_ROPE,
    },
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "rope_scaling": YARN},
    "openelm": {
        "num_transformer_layers": 3,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4, 8],
        "num_kv_heads": [2, 2, 4],
        "ffn_multipliers": [1.0, 1.5, 2.0],
    },
    "phi": {},
    "phi3": {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 64},
    "plamo3": {"num_hidden_layers": 4, "sliding_window_pattern": 2, "window_size": WINDOW},
    "qwen": {"kv_channels": 16, "num_key_value_heads": 4},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {"attention_bias": True},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "spark2_5": {
        "num_hidden_layers": 4,
        "rope_parameters": {
            FULL: {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            SLIDING: {"rope_theta": 1000.0},
        },
    },
    "stablelm": {"qk_layernorm": True, "partial_rotary_factor": 0.25},
    "starcoder2": {},
    "talkie": {},
    "telechat3": {"rope_scaling": {**YARN, "rope_type": "telechat3-yarn"}},
}
