"""Configurations of the families with recurrent layers: state spaces, delta rules, convolutions."""

from __future__ import annotations

from model_zoo_base import FULL, WINDOW, Config, text

MAMBA: Config = {
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "conv_kernel": 4,
    "n_groups": 1,
    "time_step_rank": 4,
    "use_conv_bias": True,
}
GATED_DELTA: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "num_hidden_layers": 4,
}
SHORT_CONV: Config = {
    "num_hidden_layers": 4,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", FULL, "conv", FULL],
    "use_expert_bias": True,
    "num_dense_layers": 1,
}
KIMI_LINEAR: Config = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "model_max_length": 1024,
    "linear_attn_config": {
        "kda_layers": [1, 3],
        "full_attn_layers": [2, 4],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
}
BAILING_LINEAR: Config = {
    "num_hidden_layers": 4,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "num_key_value_heads": 4,
}
RECURRENT: dict[str, Config] = {
    "baichuan_m1": {"sliding_window_layers": [1], "conv_window": 2},
    "bailing_hybrid": BAILING_LINEAR,
    "bailing_moe_linear": BAILING_LINEAR,
    "bailing_moe_v3": {"num_hidden_layers": 4, "layer_group_size": 2},
    "falcon_h1": MAMBA,
    "granitemoehybrid": {
        **MAMBA,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 1.0,
        "residual_multiplier": 0.5,
    },
    "jamba": {
        **MAMBA,
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": text({**KIMI_LINEAR, "model_type": "kimi_linear", "hidden_act": "situ"}),
    "kimi_linear": KIMI_LINEAR,
    "lfm2": SHORT_CONV,
    "lfm2-vl": text({**SHORT_CONV, "model_type": "lfm2"}),
    "lfm2_moe": SHORT_CONV,
    "longcat_flash_ngram": {
        "ffn_hidden_size": 96,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "num_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 4,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba": MAMBA,
    "mamba2": {**MAMBA, "num_heads": 8, "time_step_limit": [0.001, 100.0]},
    "nemotron_h": {
        **MAMBA,
        "hybrid_override_pattern": ["M", "*", "-", "M", "*", "-"],
        "use_bias": False,
        "time_step_limit": [0.001, 100.0],
    },
    "olmo_hybrid": {
        **GATED_DELTA,
        "linear_num_key_heads": 4,
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", FULL] * 2,
    },
    "plamo2": {
        **MAMBA,
        "num_hidden_layers": 4,
        "hidden_size_per_head": 16,
        "mamba_step": 2,
        "attention_window_size": 1024,
    },
    "qwen3_5": text({**GATED_DELTA, "model_type": "qwen3_5_text", "num_experts": 0}),
    "qwen3_5_moe": text({**GATED_DELTA, "model_type": "qwen3_5_moe_text"}),
    "qwen3_next": GATED_DELTA,
    "recurrent_gemma": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "prism_hadamard_qwen35": {
        **text({**GATED_DELTA, "num_experts": 0, "hidden_size": 128}),
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.0.mlp.gate_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 0,
            }
        ],
    },
}
