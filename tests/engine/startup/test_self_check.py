"""Models that compute something else over pages are noticed before they serve anybody."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from model_zoo import build

from quire.engine.errors import UnsupportedModel
from quire.engine.model.flat_linear import FlatQuantizedLinear, flatten_quantized_linears
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.startup.self_check import check_against_plain_forward

NUM_BLOCKS = 16


def paged(name: str) -> PagedModel:
    model = page_model(build(name), name)
    model.allocate(NUM_BLOCKS, 8)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "nanbeige"])
def test_a_model_that_agrees_passes(name: str) -> None:
    assert check_against_plain_forward(paged(name), NUM_BLOCKS) < 1e-4


def test_a_model_that_sees_too_little_context_is_refused() -> None:
    model = paged("llama")
    for layer in model.layers:
        layer.window = 3
    with pytest.raises(UnsupportedModel, match=r"llama.*off by"):
        check_against_plain_forward(model, NUM_BLOCKS)


def test_flattened_quantized_linears_give_the_same_rows() -> None:
    layer = nn.Sequential(nn.QuantizedLinear(64, 32, bias=True, group_size=32, bits=4))
    rows = mx.random.normal((9, 1, 64))
    expected = layer(rows)
    flatten_quantized_linears(layer)
    assert type(layer.layers[0]) is FlatQuantizedLinear
    got = layer(rows)
    assert got.shape == expected.shape
    assert mx.allclose(got, expected, atol=1e-5)
