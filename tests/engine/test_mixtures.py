"""Mixtures of experts whose choice and sum are kernels, which are simulated."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from launches import launches
from metal_sim import simulated_kernels
from model_zoo import build

from quire.engine.model.experts import adapt_experts
from quire.engine.model.flat_linear import flatten_linears
from quire.engine.model.joined import join_linears
from quire.engine.model.mixtures import (
    DeepseekMixture,
    GemmaRouter,
    KernelGate,
    KernelMixture,
    adapt_mixtures,
    mixture_shapes,
)
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.routing_spec import MixtureShape, RoutingShape
from quire.loadtest.random_models import model_of
from quire.loadtest.small_model import shrunk

TOKENS = mx.array([[5, 9, 3, 7, 7, 40, 2]])


def built(family: str) -> nn.Module:
    """As the zoo has it, where it has experts there."""
    others = {"nemotron_h": "Nemotron-3-Nano-30B-A3B", "gemma4_text": "Gemma 4 26B-A4B"}
    if family not in others:
        return build(family)
    mx.random.seed(0)
    model, _ = model_of(shrunk(others[family], 8))
    model.set_dtype(mx.float32)
    return model


def mixtures(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "gpt_oss", "lfm2_moe"]
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("times", [1, 9])  # more than so many pairs are sorted by their experts
def test_whole_blocks(family: str, device: Any, times: int) -> None:
    tokens = mx.tile(TOKENS, (1, times))
    expected = build(family)(tokens)
    model = build(family)
    join_linears(model)
    adapt_experts(model)
    adapt_mixtures(model)
    adapt_mixtures(model)  # once more changes nothing
    blocks = mixtures(model, KernelMixture)
    assert blocks
    with simulated_kernels(orders=1), selecting(Selector(device, None)), launches() as launched:
        found = model(tokens)
        mx.eval(found)
    assert mx.abs(found - expected).max() < 1e-5 * mx.abs(expected).max()
    kernels = len(blocks) if device == "cuda" else 0
    assert (launched["top_experts"], launched["weigh_experts"]) == (kernels, kernels)


@pytest.mark.parametrize("family", ["glm4_moe_lite", "nemotron_h", "glm4_moe", "deepseek_v3"])
def test_gates_of_sigmoids(family: str) -> None:
    reference, model = built(family), built(family)
    for each in (reference, model):  # which is zero, and then decides nothing
        for module in each.modules():
            if "e_score_correction_bias" in module:
                size = module.e_score_correction_bias.shape
                module.e_score_correction_bias = mx.linspace(0.4, -0.4, size[0])
    expected = reference(TOKENS)
    flatten_linears(model)
    adapt_mixtures(model)
    gates, blocks = mixtures(model, KernelGate), mixtures(model, DeepseekMixture)
    assert gates
    with simulated_kernels(orders=1), selecting(Selector("cuda", None)), launches() as launched:
        found = model(TOKENS)
        mx.eval(found)
    assert mx.allclose(found, expected, atol=1e-5)
    assert launched["top_experts"] == launched["weigh_experts"] == len(gates) == len(blocks)


def test_routers_with_a_factor_for_each_expert() -> None:
    reference, model = built("gemma4_text"), built("gemma4_text")
    for each in (reference, model):
        for module in each.modules():
            if "per_expert_scale" in module:
                size = module.per_expert_scale.shape
                module.per_expert_scale = mx.linspace(0.5, 1.5, size[0])
    adapt_mixtures(model)
    routers = mixtures(model, GemmaRouter)
    assert routers
    with simulated_kernels(orders=1), selecting(Selector("cuda", None)), launches() as launched:
        found = model(TOKENS)
        mx.eval(found)
    assert mx.allclose(found, reference(TOKENS), atol=1e-5)
    assert launched["top_experts"] == launched["weigh_experts"] == len(routers)


def test_gates_over_groups_of_experts_stay_as_they_are() -> None:
    model = build("deepseek_v3")
    for module in model.modules():
        if "e_score_correction_bias" in module:
            module.n_group = 2
    expected = model(TOKENS)
    adapt_mixtures(model)
    assert not mixtures(model, KernelGate)
    assert mixtures(model, DeepseekMixture)
    with simulated_kernels(orders=1), selecting(Selector("cuda", None)):
        found = model(TOKENS)
        mx.eval(found)
    assert mx.allclose(found, expected, atol=1e-5)


def test_a_block_of_other_code_stays_as_it_is() -> None:
    model = build("qwen3_moe")
    for module in model.modules():
        if "switch_mlp" in module:
            module.__class__ = type("Block", (type(module),), {"__call__": lambda _, x: x})
    adapt_mixtures(model)
    assert not mixtures(model, KernelMixture)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3_next", {RoutingShape(1, 4, 2), MixtureShape(1, 64, 2, shared=True, gated=True)}),
        (
            "glm4_moe_lite",
            {RoutingShape(1, 4, 2, sigmoid=True), MixtureShape(1, 64, 2, shared=True)},
        ),
        ("gemma4_text", {RoutingShape(1, 16, 2, factored=True), MixtureShape(1, 256, 2)}),
    ],
)
def test_what_is_checked_at_the_start(family: str, expected: set[object]) -> None:
    model = built(family)
    adapt_mixtures(model)
    assert set(mixture_shapes(model)) == expected
