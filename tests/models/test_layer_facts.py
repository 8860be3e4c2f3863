"""What config.json says that layers keep, against what they keep once the model runs over pages."""

from __future__ import annotations

from typing import Any

import pytest
from model_zoo import FAMILIES, build
from model_zoo_base import BASE
from model_zoo_experts import LATENT

from quire.engine.model.paging import page_model
from quire.serve.layer_facts import UNKNOWN
from quire.serve.memory_plan import memory
from quire.serve.model_facts import facts_of
from quire.serve.served_model import ModelFilesError

# Sizes of attention that their configurations do not have, but the one for all families has; and
# latents that mlx-lm keeps as keys and values.
OTHERS = {
    *("gpt2", "gpt_neox", "gpt_neox_sequential", "gptj", "nanbeige", "nanbeige_norm_once"),
    *("nemotron-nas", "openelm", "talkie", "phixtral", "deepseek_v2", "deepseek_v2_no_q_lora"),
    *("longcat_flash", "minicpm3", "youtu_llm"),
}
RECURRENT_LATENT = (
    "kimi_linear",
    "kimi_k3",
    "kimi_k25",
    "kimi_vl",
    "bailing_hybrid",
    "bailing_moe_v3",
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
    *("mixtral", "llama4", "gemma", "phi3", "olmo2", "deepseek_v3"),
]
KNOWN = sorted(n for n, f in FAMILIES.items() if f.module not in UNKNOWN and n not in OTHERS)


def config_of(name: str) -> dict[str, Any]:
    """Without a latent where the family has none."""
    family = FAMILIES[name]
    config = {"model_type": family.module, **BASE, **family.config}
    if not (name in LATENT or family.module in LATENT or name in RECURRENT_LATENT):
        config.pop("kv_lora_rank")
        if text := config.get("text_config"):
            config["text_config"] = {k: v for k, v in text.items() if k != "kv_lora_rank"}
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


@pytest.mark.parametrize("name", sorted({f.module for f in FAMILIES.values()} & set(UNKNOWN)))
def test_what_is_not_known_is_said(name: str) -> None:
    with pytest.raises(ModelFilesError, match=f"layers of {name} keep is not known"):
        facts_of(config_of(name), {})
