"""mlx-lm families that cannot be served over pages: why, and a small configuration of each.

They compute attention in ways that never reach ``scaled_dot_product_attention``, or keep something
other than keys and values.
"""

from __future__ import annotations

from model_zoo_base import ALTERNATING, FULL, VOCAB, Config, text
from model_zoo_dense import GEAR

OWN_SOFTMAX = "writes out its softmax instead of calling scaled_dot_product_attention"
INDEXER = "an indexer layer selects keys by reading the cached keys themselves"
NEEDS_METAL = "its layers call Metal kernels, which need a Metal device"

SPARSE_INDEX: Config = {
    "num_key_value_heads": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 16,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}

# name, which is also the model file's -> (reason, configuration)
UNPAGED_FAMILIES: dict[str, tuple[str, Config]] = {
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
    "glm_moe_dsa": (INDEXER, SPARSE_INDEX),
    "gpt_bigcode": (
        "builds its position ids on the host from one offset for the whole batch",
        {"attention_bias": True, "mlp_bias": True},
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
