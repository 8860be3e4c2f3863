"""Configurations of models that people run, as far as sizes and layers depend on them."""

from __future__ import annotations

from typing import Any

_QWEN: dict[str, Any] = {
    "num_attention_heads": 16,
    "head_dim": 256,
    "vocab_size": 248_320,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 262_144,
}
_GEMMA: dict[str, Any] = {
    "model_type": "gemma4_text",
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "vocab_size": 262_144,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3.5-9B": {
        **_QWEN,
        "model_type": "qwen3_5_text",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
    },
    "Qwen3.6-35B-A3B": {
        **_QWEN,
        "model_type": "qwen3_5_moe_text",
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "Nemotron-3-Nano-30B-A3B": {
        "model_type": "nemotron_h",
        "hidden_size": 2688,
        "intermediate_size": 1856,
        "num_hidden_layers": 52,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": False,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "mamba_proj_bias": False,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "mlp_bias": False,
        "use_bias": False,
        "layer_norm_epsilon": 1e-5,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "vocab_size": 131_072,
        "max_position_embeddings": 262_144,
    },
    "Gemma 4 31B": {
        **_GEMMA,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
    "Gemma 4 26B-A4B": {
        **_GEMMA,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "GLM-4.7-Flash": {
        "model_type": "glm4_moe_lite",
        "num_hidden_layers": 47,
        "hidden_size": 2048,
        "num_attention_heads": 20,
        "kv_lora_rank": 512,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "vocab_size": 154_880,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "rope_theta": 150_000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        "vocab_size": 201_088,
    },
}


def published(name: str, layers: int | None = None) -> dict[str, Any]:
    """The configuration under ``name``, of its first ``layers`` layers only if that is given.

    Raises:
        ValueError: there is no such model here, or it has fewer layers.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name!r} is none of {', '.join(PUBLISHED)}")
    config = dict(PUBLISHED[name])
    if layers is not None:
        if not 0 < layers <= config["num_hidden_layers"]:
            raise ValueError(f"{name} has {config['num_hidden_layers']} layers, not {layers}")
        config["num_hidden_layers"] = layers
        if pattern := config.get("hybrid_override_pattern"):
            config["hybrid_override_pattern"] = pattern[:layers]
    return config
