"""Blocks that add and norm in one kernel, which is simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from launches import launches
from metal_sim import simulated_kernels
from model_zoo import build

from quire.engine.model.known_code import code_of, is_forward
from quire.engine.model.residual import PreNormBlock, SumNorm, adapt_blocks
from quire.kernels.choice.selection import Selector, selecting

TOKENS = mx.array([[5, 9, 3, 7, 7, 40, 2]])


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite", "qwen3_next", "qwen3_5", "phi3"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_blocks_give_what_mlx_lm_gives(family: str, device: Any) -> None:
    expected = build(family)(TOKENS)
    model = build(family)
    adapt_blocks(model)
    adapt_blocks(model)  # once more changes nothing
    blocks = [module for module in model.modules() if isinstance(module, PreNormBlock)]
    assert len(blocks) == len(model.layers)
    with simulated_kernels(orders=1), selecting(Selector(device, None)), launches() as launched:
        found = model(TOKENS)
        mx.eval(found)
    assert mx.allclose(found, expected, atol=1e-5)
    assert launched["add_rms_norm"] == (2 * len(blocks) - 1 if device == "cuda" else 0)


def test_a_norm_that_is_given_something_else_norms_that() -> None:
    """Such as a model that changes hidden states between its blocks."""
    plain, norm = nn.RMSNorm(8), nn.RMSNorm(8)
    norm.__class__ = SumNorm
    x, delta = mx.random.normal((2, 3, 8)), mx.random.normal((2, 3, 8))
    total = norm.add(x, delta)
    assert mx.allclose(norm(total), plain(x + delta), atol=1e-6)
    assert norm(total).tolist() == plain(total).tolist()  # asked for twice
    for _ in range(2):
        assert norm.add(x, delta).tolist() == (x + delta).tolist()
        assert norm(x).tolist() == plain(x).tolist()
    with simulated_kernels(orders=1), selecting(Selector("cuda", None)), launches() as launched:
        mx.eval(norm.add(x, delta))
    assert not launched


@pytest.mark.parametrize("family", ["gemma2", "starcoder2", "cohere"])
def test_other_blocks_and_norms_stay_as_they_are(family: str) -> None:
    model = build(family)
    adapt_blocks(model)
    assert not [module for module in model.modules() if isinstance(module, PreNormBlock)]


class Doubling:
    def __call__(self, x: int) -> int:  # what it does
        y = 2 * (
            x  # no less
        )
        return y


def doubled(function: Callable[..., int]) -> Callable[..., int]:
    return lambda *given: 2 * function(*given)


class Kept:
    @doubled
    def __call__(self, x: int) -> int:
        return 2 * x


def test_code_is_known_by_what_it_does() -> None:
    assert is_forward(Doubling(), "x", "y = 3 * x\nreturn y", "y = 2 * x; return y")
    assert not is_forward(Doubling(), "x", "y = x * 2\nreturn y")
    assert not is_forward(Doubling(), "z", "y = 2 * x\nreturn y")
    assert not is_forward(Kept(), "x", "return 2 * x")
    made: Any = type("Made", (), {"__call__": lambda self, x: 2 * x})
    assert code_of(made.__call__) == ""
    assert code_of(int) == ""
