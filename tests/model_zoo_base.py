"""What the small configurations share: sizes under every name they go by, and rope variants.

``BASE`` holds every common field once: a family's ``ModelArgs.from_dict`` keeps the fields it
declares and drops the rest, so an entry elsewhere lists only what is particular to its family.
Windows are 24 tokens and yarn's original context is 64, so that prompts of a few hundred tokens
cross both.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

VOCAB = 160
WINDOW = 24
SLIDING, FULL = "sliding_attention", "full_attention"
ALTERNATING = [SLIDING, FULL, SLIDING, FULL]

BASE: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": True,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 0.5,
    "sliding_window": WINDOW,
    "rope_scaling": None,
    # each spelling of the epsilon
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    # the GPT-2 spelling of the sizes
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 96,
    "n_ctx": 1024,
    "n_positions": 1024,
    # mixture of experts: four, two of them active
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    # multi-head latent attention
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}

LLAMA3_ROPE: Config = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN: Config = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}
DEEPSEEK_YARN: Config = {**YARN, "type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7}
MSCALED_YARN: Config = {**YARN, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0}
LONGROPE: Config = {
    "type": "longrope",
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.02 * i for i in range(8)],
    "long_factor": [1.0 + 0.3 * i for i in range(8)],
}
PER_TYPE_ROPE: Config = {
    FULL: {**YARN, "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
}


def text(config: Config) -> Config:
    """Wrap a text configuration as the multimodal families nest it."""
    return {"text_config": BASE | config}
