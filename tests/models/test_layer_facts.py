"""What config.json says that layers keep, against what they keep once the model runs over pages."""

from __future__ import annotations

from typing import Any

import pytest
from model_zoo import FAMILIES, build
from model_zoo_base import BASE
from model_zoo_experts import LATENT

from quire.engine.model.paging import page_model
from quire.serve.layer_facts import NO_ATTENTION
from quire.serve.memory_plan import memory
from quire.serve.model_facts import facts_of

# Whose configurations say nothing of key and value heads, but the one for all families does.
NO_KV_HEADS = {
    *("gpt2", "gpt_neox", "gpt_neox_sequential", "gptj", "phixtral", "talkie"),
}
NO_HEADS = ("num_attention_heads", "n_head", "num_key_value_heads")  # where nothing has attention
# Refused: its own configuration has none of the common names.
OTHERS = {"openelm"}
RECURRENT_LATENT = (
    "kimi_linear",
    "kimi_k3",
    "kimi_k25",
    "kimi_vl",
    "bailing_hybrid",
    "bailing_moe_v3",
    "longcat_flash_ngram",
)
FEW = [
    *("gemma3_text", "gemma4_text", "gemma4_k_eq_v", "gemma3n", "gpt_oss", "cohere2", "exaone4"),
    *("mimo_v2_flash", "step3p5", "qwen3_5", "qwen3_next", "lfm2", "nemotron_h", "kimi_linear"),
    *(
        "granitemoehybrid",
        "falcon_h1",
        "mamba2",
        "bailing_moe_v3",
        "olmo_hybrid",
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    ),
    *("mixtral", "llama4", "gemma", "phi3", "olmo2", "deepseek_v3", "jamba", "baichuan_m1"),
]
KNOWN = sorted(n for n, f in FAMILIES.items() if n not in OTHERS)


def config_of(name: str) -> dict[str, Any]:
    """Without what only other families have."""
    family = FAMILIES[name]
    config = {"model_type": family.module, **BASE, **family.config}
    if not (name in LATENT or family.module in LATENT or name in RECURRENT_LATENT):
        config.pop("kv_lora_rank")
        if text := config.get("text_config"):
            config["text_config"] = {k: v for k, v in text.items() if k != "kv_lora_rank"}
    if name in NO_KV_HEADS:
        config.pop("num_key_value_heads")
    if family.module in NO_ATTENTION:
        config = {field: value for field, value in config.items() if field not in NO_HEADS}
    return config


def assert_as_it_runs(name: str) -> None:
    paged = page_model(build(name), name)
    facts = facts_of(config_of(name), {})
    needs = memory(facts, "cpu", 1, 1)
    assert needs.kv_per_token == paged.bytes_per_token
    assert 4 * facts.kept.window_token == paged.bytes_per_window_token
    assert facts.kept.window == (paged.window or 0)
    assert needs.states == 3 * paged.bytes_per_state


@pytest.mark.parametrize("name", FEW)
def test_what_layers_keep(name: str) -> None:
    assert_as_it_runs(name)


@pytest.mark.models
@pytest.mark.parametrize("name", sorted(set(KNOWN) - set(FEW)))
def test_what_layers_keep_in_any_family(name: str) -> None:
    assert_as_it_runs(name)
