"""The page of what popular models keep is what `quire estimate` computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quire.engine.memory.budget import STEP_TOKENS
from quire.engine.memory.fit import Demand
from quire.serve.memory_plan import memory
from quire.serve.model_facts import facts_of

PAGE = Path(__file__).parents[2] / "docs/models.md"
TOKENS = 32_768

QWEN: dict[str, Any] = {
    **{"hidden_size": 4096, "num_attention_heads": 16, "head_dim": 256, "vocab_size": 248_320},
    **{"linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128},
    **{"linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4},
}
GEMMA: dict[str, Any] = {
    **{"model_type": "gemma4_text", "hidden_size": 5376, "head_dim": 256, "global_head_dim": 512},
    **{"attention_k_eq_v": True, "sliding_window": 1024, "sliding_window_pattern": 6},
    **{"vocab_size": 262_144, "num_attention_heads": 32},
}
# Of their configurations what memory depends on.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3.5-9B": {
        **{**QWEN, "model_type": "qwen3_5_text", "num_hidden_layers": 32},
        "num_key_value_heads": 4,
    },
    "Qwen3.6-35B-A3B": {
        **{**QWEN, "model_type": "qwen3_5_moe_text", "num_hidden_layers": 40},
        **{"num_key_value_heads": 2, "hidden_size": 2048},
    },
    "Nemotron-3-Nano-30B-A3B": {
        **{"model_type": "nemotron_h", "hidden_size": 2688, "num_hidden_layers": 52},
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        **{"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128},
        **{"mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8},
        **{"conv_kernel": 4, "vocab_size": 131_072},
    },
    "Gemma 4 31B": {
        **{**GEMMA, "num_hidden_layers": 60, "num_key_value_heads": 16},
        "num_global_key_value_heads": 4,
    },
    "Gemma 4 26B-A4B": {
        **{**GEMMA, "num_hidden_layers": 30, "num_key_value_heads": 8},
        **{"num_global_key_value_heads": 2, "hidden_size": 2816},
    },
    "gpt-oss-20b": {
        **{"model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64},
        **{"sliding_window": 128, "vocab_size": 201_088},
    },
}


def row(name: str) -> str:
    facts = facts_of(MODELS[name], {})
    kept, width = facts.kept, facts.number_bytes
    needs = memory(facts, "metal", TOKENS, STEP_TOKENS["metal"])
    demand = Demand(
        *(TOKENS, 1, 0, 16, needs.kv_per_token, ""),
        window=kept.window,
        bytes_per_window_token=width * kept.window_token,
    )
    decoding = needs.kv_cache + demand.window_bytes(1) + needs.states
    pools = needs.kv_cache + needs.windows + needs.states
    whole = needs.kv_cache + TOKENS * width * kept.window_token + needs.states
    columns = [
        f"{needs.kv_per_token / 1024:.0f}",
        f"{width * kept.window_token / 1024:.0f}" if kept.window else "",
        f"{kept.window:,}" if kept.window else "",
        f"{needs.states / 3e6:.1f}" if needs.states else "",
        *(f"{size / 1e9:.2f}" for size in (decoding, pools, whole)),
    ]
    return " | ".join([f"| {name}", *columns]) + " |"


def test_the_page_has_what_the_estimate_says() -> None:
    page = PAGE.read_text()
    rows = [row(name) for name in MODELS]
    assert [
        line for line in page.splitlines() if line.startswith(tuple(f"| {n}" for n in MODELS))
    ] == rows


def test_windows_save_what_they_should() -> None:
    """At 32,768 tokens, in GB: 3.5 instead of 29.5, 0.9 instead of 7.4, 0.8 instead of 1.6."""
    found = {name: [float(c) for c in row(name).split(" | ")[-3:][:1]] for name in MODELS}
    assert 3.4 < found["Gemma 4 31B"][0] < 3.6
    assert 0.85 < found["Gemma 4 26B-A4B"][0] < 0.95
    assert 0.75 < found["gpt-oss-20b"][0] < 0.85
