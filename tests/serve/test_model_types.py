"""What is told of a model before its weights are there."""

from __future__ import annotations

from typing import Any

import pytest
from model_zoo import _UNPAGED_BUILDERS, FAMILIES, UNPAGED, Family
from model_zoo_base import BASE
from model_zoo_unpaged import NEEDS_METAL

from quire.serve.model_types import check_type, why_unserved
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


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mistral", "rope_scaling": {"type": "dynamic"}}, "dynamic rope"),
        ({"model_type": "deepseek_v41_text"}, "a cache class of its own"),
        ({"model_type": "no_such_model"}, "knows no model of type 'no_such_model'"),
        ({"model_type": None}, "does not say model_type"),
        ({}, "does not say model_type"),
    ],
)
def test_other_names(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFilesError, match=said):
        check_type(config)
