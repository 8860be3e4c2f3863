"""Multimodal wrappers with a paged text model, and further paths through a family's file."""

from __future__ import annotations

from model_zoo_base import (
    ALTERNATING,
    FULL,
    LLAMA3_ROPE,
    LONGROPE,
    SLIDING,
    VOCAB,
    YARN,
    Config,
    text,
)
from model_zoo_dense import GEMMA3, GEMMA4, MINISTRAL3
from model_zoo_experts import DEEPSEEK

GEMMA3N: Config = {
    "model_type": "gemma3n",
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL] * 3,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "rope_local_base_freq": 1000.0,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0, 0.0],
    "intermediate_size": [96] * 6,
    "altup_num_inputs": 3,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}

LLAMA4: Config = {
    "model_type": "llama4_text",
    "num_hidden_layers": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 32,
    "layer_types": ["chunked_attention"] * 3 + [FULL],
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 96,
    "floor_scale": 16,
}

WRAPPERS: dict[str, Config] = {
    "gemma3": text(GEMMA3),
    "gemma3n": text(GEMMA3N),
    "gemma4": text(GEMMA4),
    "kimi_k25": text({"model_type": "deepseek_v3", **DEEPSEEK}),
    "kimi_vl": text({"model_type": "deepseek_v3", **DEEPSEEK}),
    "mistral3": text({"model_type": "llama"}),
    "llama4": text(LLAMA4),
    "minimax_m3_vl": text(
        {
            "model_type": "minimax_m3_vl",
            "dense_intermediate_size": 96,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        }
    ),
    "pixtral": text({"model_type": "llama"}),
    "qwen2_vl": text({"model_type": "qwen2"}),
    "qwen3_vl": text({"model_type": "qwen3"}),
    "qwen3_vl_moe": text({"model_type": "qwen3_moe"}),
}

# name -> (model file, configuration): another path through a file than its entry above takes
VARIANTS: dict[str, tuple[str, Config]] = {
    "llama_tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama_multi_head": ("llama", {"num_key_value_heads": 4}),
    "llama_llama3_rope": ("llama", {"rope_scaling": LLAMA3_ROPE}),
    "llama_linear_rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama_sliding": ("llama", {"num_hidden_layers": 4, "layer_types": ALTERNATING}),
    "llama_traditional_rope": ("llama", {"rope_traditional": True}),
    "qwen3_yarn": ("qwen3", {"rope_scaling": YARN}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "phi3_longrope": (
        "phi3",
        {
            "partial_rotary_factor": 1.0,
            "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 64,
        },
    ),
    "phi3_partial": ("phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "gpt_neox_sequential": (
        "gpt_neox",
        {"rotary_emb_base": 10000, "rotary_pct": 1.0, "use_parallel_residual": False},
    ),
    "gemma4_k_eq_v": (
        "gemma4_text",
        {
            **GEMMA4,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "top_k_experts": 2,
        },
    ),
    "deepseek_v2_no_q_lora": (
        "deepseek_v2",
        {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"},
    ),
    "deepseek_v3_grouped": (
        "deepseek_v3",
        {**DEEPSEEK, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    ),
    # without its recurrent layers, as the small Granite 4.0 models are
    "granitemoehybrid_attention": (
        "granitemoehybrid",
        {
            "layer_types": ["attention"] * 3,
            "num_local_experts": 0,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.25,
            "logits_scaling": 1.0,
            "residual_multiplier": 0.5,
        },
    ),
    "deepseek_v3_dense": ("deepseek_v3", {**DEEPSEEK, "first_k_dense_replace": 8}),
    "llama4_dense": (
        "llama4",
        text(
            {
                **LLAMA4,
                "interleave_moe_layer_step": 8,
                "attn_temperature_tuning": 0,
            }
        ),
    ),
    "mistral3_ministral3": ("mistral3", text({"model_type": "ministral3", **MINISTRAL3})),
    "nanbeige_norm_once": ("nanbeige", {"num_loops": 2, "skip_loop_final_norm": True}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True}),
}
