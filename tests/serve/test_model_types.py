"""What is told of a model before its weights are there."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
from model_zoo import _UNPAGED_BUILDERS, FAMILIES, UNPAGED, Family
from model_zoo_base import BASE
from model_zoo_unpaged import NEEDS_METAL

from quire.engine.errors import UnsupportedModel
from quire.engine.model.paging import page_model
from quire.serve.model_types import _SCALED, check_type, why_unserved
from quire.serve.served_model import ModelFilesError


def config_of(family: Family) -> dict[str, Any]:
    return {"model_type": family.module, **BASE, **family.config}


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_held_against_what_is_served(name: str) -> None:
    config = config_of(FAMILIES[name])
    check_type(config)
    assert why_unserved(config) is None


@pytest.mark.parametrize("name", UNPAGED)
def test_what_is_not_served_is_told(name: str) -> None:
    config, reason = config_of(_UNPAGED_BUILDERS[name]), UNPAGED[name]
    if reason == NEEDS_METAL:  # which a Mac has
        check_type(config)
        return
    with pytest.raises(ModelFilesError, match="cannot be served") as refused:
        check_type(config)
    assert reason in str(refused.value)


@pytest.mark.parametrize("name", sorted({*FAMILIES} & _SCALED))
def test_the_engine_refuses_dynamic_rope_too(name: str) -> None:
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}
    config = {**config_of(FAMILIES[name]), **scaling}
    assert why_unserved(config) is not None
    module = importlib.import_module(f"mlx_lm.models.{FAMILIES[name].module}")
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    with pytest.raises(UnsupportedModel):
        page_model(model, name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mistral", "rope_scaling": {"type": "dynamic"}}, "dynamic rope"),
        ({"model_type": "qwen3", "rope_scaling": {"rope_type": "dynamic"}}, "dynamic rope"),
        ({"model_type": "deepseek_v41_text"}, "a cache class of its own"),
        ({"model_type": "no_such_model"}, "knows no model of type 'no_such_model'"),
        ({"model_type": None}, "does not say model_type"),
        ({}, "does not say model_type"),
    ],
)
def test_other_names(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFilesError, match=said):
        check_type(config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "rope_scaling": "none"},
        {"model_type": "llama", "rope_scaling": ["dynamic"]},
        {"model_type": "llama", "rope_scaling": {"type": "linear", "rope_type": "dynamic"}},
        {"model_type": "mamba", "rope_scaling": {"type": "dynamic"}},
        {"model_type": "qwen3_5", "text_config": "x"},
        {"model_type": "qwen3_5", "text_config": None},
        {"model_type": "minimax_m3_vl", "sparse_attention_freq": 1},
        {"model_type": "minimax_m3_vl", "layer_types": 5},
        {"model_type": "minimax_m3_vl", "sparse_attention_freq": [1, 1]},  # blocks of no size
        {
            "model_type": "minimax_m3_vl",
            "sparse_attention_config": {"sparse_block_size": 8, "sparse_attention_freq": [0, 0]},
        },
    ],
)
def test_what_is_odd_is_left_to_the_engine(config: dict[str, Any]) -> None:
    check_type(config)


@pytest.mark.parametrize(
    "text", [{"index_block_size": 8}, {"sparse_attention_config": {"sparse_block_size": 8}}]
)
def test_sparse_layers_need_not_be_listed(text: dict[str, Any]) -> None:
    with pytest.raises(ModelFilesError, match="an indexer layer"):
        check_type({"model_type": "minimax_m3_vl", "text_config": text})
