"""mlx-lm families that paged attention alone cannot serve: why, and a small configuration of each.

The layers of a recurrent family carry a state that every token overwrites, so neither a block of
the past nor a shared prefix can be read back from it. The others compute attention in ways that
never reach ``scaled_dot_product_attention``, or keep something other than keys and values.
"""

from __future__ import annotations

from model_zoo_base import ALTERNATING, FULL, VOCAB, WINDOW, Config, text
from model_zoo_dense import GEAR

RECURRENT = "recurrent layers: their state is one value per sequence, not keys and values per token"
OWN_SOFTMAX = "writes out its softmax instead of calling scaled_dot_product_attention"
INDEXER = "an indexer layer selects keys by reading the cached keys themselves"
NEEDS_METAL = "its layers call Metal kernels, which need a Metal device"

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
SPARSE_INDEX: Config = {
    "num_key_value_heads": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 16,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}

RECURRENT_FAMILIES: dict[str, Config] = {
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
}

# name, which is also the model file's -> (reason, configuration)
UNPAGED_FAMILIES: dict[str, tuple[str, Config]] = {
    **{name: (RECURRENT, config) for name, config in RECURRENT_FAMILIES.items()},
    "afm7": (
        "its last layers reuse the keys of an earlier layer and read their length",
        {
            "hidden_dim": 64,
            "num_layers": 4,
            "num_kv_reuse_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
    ),
    "bitnet": (NEEDS_METAL, {}),
    "deepseek_v32": (INDEXER, SPARSE_INDEX),
    "deepseek_v41": (
        "keeps compressed keys and index state in a cache class of its own",
        {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "o_groups": 2,
            "o_lora_rank": 16,
            "compress_ratios": [0, 4, 0],
            "kv_source_layer_ids": [1],
            "index_source_layer_ids": [1],
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 16,
            "hc_mult": 2,
            "rms_norm_eps": 1e-6,
        },
    ),
    "gemma2": (OWN_SOFTMAX, {"query_pre_attn_scalar": 16.0}),
    "glm_moe_dsa": (INDEXER, SPARSE_INDEX),
    "gpt_bigcode": (
        "builds its position ids on the host from one offset for the whole batch",
        {"attention_bias": True, "mlp_bias": True},
    ),
    "llama4": (
        "attention chunks: a layer sees only the tokens of its own chunk of the context",
        text(
            {
                "model_type": "llama4_text",
                "num_hidden_layers": 4,
                "num_experts_per_tok": 1,
                "attention_chunk_size": 32,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 96,
                "floor_scale": 16,
            }
        ),
    ),
    "muse_spark": (
        NEEDS_METAL,
        text(
            {
                "num_hidden_layers": 4,
                "post_norm_eps": 1e-5,
                "rope_parameters": {"rope_theta": 10000.0},
                "layer_rope_theta": [10000.0, 0, 10000.0, 0],
                "layer_types": ALTERNATING,
                "final_logit_softcapping": 20.0,
                "output_multiplier": 1.0,
                "moe_hidden_size": 32,
                "num_shared_experts": 0,
            }
        ),
    ),
    "olmo": (
        OWN_SOFTMAX,
        {
            "d_model": 64,
            "n_layers": 3,
            "mlp_hidden_size": 192,
            "n_heads": 4,
            "embedding_size": VOCAB,
        },
    ),
    "phi3small": (
        OWN_SOFTMAX,
        {
            "dense_attention_every_n_layers": 2,
            "ff_intermediate_size": 96,
            "gegelu_limit": 20.0,
            "blocksparse_block_size": 32,
            "blocksparse_num_local_blocks": 2,
            "blocksparse_vert_stride": 2,
        },
    ),
    "plamo": ("tiles the cached keys itself before attention", {"n_shared_head": 2}),
    "prism_hadamard_qwen35": (
        RECURRENT,
        {
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
    ),
}

DYNAMIC_ROPE = "dynamic rope: the rotation of every token changes with the length of its sequence"

# name -> (reason, model file, configuration): settings that turn a paged family into another
UNPAGED_VARIANTS: dict[str, tuple[str, str, Config]] = {
    "gear_softcap": (OWN_SOFTMAX, "gear", {**GEAR, "attn_logit_softcapping": 20.0}),
    "internlm2_dynamic_rope": (
        DYNAMIC_ROPE,
        "internlm2",
        {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "llama_dynamic_rope": (
        DYNAMIC_ROPE,
        "llama",
        {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "minimax_m3_vl_sparse": (
        INDEXER,
        "minimax_m3_vl",
        text(
            {
                "model_type": "minimax_m3_vl",
                "dense_intermediate_size": 96,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "layer_types": [FULL, "sparse", "sparse"],
                "index_n_heads": 2,
                "index_head_dim": 16,
                "index_block_size": 8,
                "index_topk_blocks": 4,
            }
        ),
    ),
}
