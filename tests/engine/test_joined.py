"""Linears of the same input are one product, whatever model calls them, and change nothing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal_sim import simulated_kernels
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from model_zoo import build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model import joined
from quire.engine.model.flat_linear import flatten_linears
from quire.engine.model.joined import JoinedLinears, SwigluMlp, join_linears
from quire.engine.startup import start
from quire.engine.startup.loader import LoadedModel
from quire.engine.startup.start import page_loaded
from quire.kernels.choice.selection import Selector, selecting

IDS = mx.array([[5, 3, 7, 2, 9, 40, 11]])


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[JoinedLinears]:
    made: list[JoinedLinears] = []

    class Recorded(JoinedLinears):
        def __init__(self, linears: Any) -> None:
            super().__init__(linears)
            made.append(self)

    monkeypatch.setattr(joined, "JoinedLinears", Recorded)
    return made


def logits(model: Any) -> mx.array:
    return model(IDS, cache=make_prompt_cache(model)).astype(mx.float32)


def agree(a: mx.array, b: mx.array) -> bool:
    return float(mx.abs(a - b).max()) < 1e-4 * float(mx.abs(a).max())


@pytest.mark.parametrize(
    ("name", "num_groups", "num_alone", "num_mlps"),
    [
        ("qwen3_5", 4, 0, 4),
        ("qwen3_5_moe", 8, 0, 4),
        ("deepseek_v3", 3, 0, 3),
        ("gemma4_k_eq_v", 12, 0, 0),
        (
            "gemma3n",
            12,
            2,
            0,
        ),  # layers without keys of their own have those linears too
        ("rwkv7", 3, 3, 0),  # whose linears read mixtures of their own
    ],
)
def test_products_are_joined(
    groups: list[JoinedLinears], name: str, num_groups: int, num_alone: int, num_mlps: int
) -> None:
    model = build(name)
    expected = logits(model)
    names = {n for n, _ in tree_flatten(model.parameters())}
    join_linears(model)
    assert agree(logits(model), expected)
    assert agree(logits(model), expected)
    assert len(groups) == num_groups
    assert sum(not group.is_used for group in groups) == num_alone
    assert sum(isinstance(m, SwigluMlp) for _, m in model.named_modules()) == num_mlps
    assert {n for n, _ in tree_flatten(model.parameters())} == names


def test_a_pass_that_was_cut_short_changes_nothing(groups: list[JoinedLinears]) -> None:
    model = build("qwen3_5")
    join_linears(model)
    expected = logits(model)
    mx.eval(expected)
    [attention] = [m for _, m in model.named_modules() if "q_proj" in m][:1]
    attention.q_proj(mx.zeros((1, 1, attention.k_proj.weight.shape[1])))
    assert agree(logits(model), expected)
    assert all(group.is_used for group in groups)


def test_an_mlp_with_another_function_of_that_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_5")
    mlp = next(m for _, m in model.named_modules() if "gate_proj" in m)
    monkeypatch.setitem(type(mlp).__call__.__globals__, "swiglu", lambda gate, x: gate * x)
    expected = logits(model)
    join_linears(model)
    assert agree(logits(model), expected)


def test_quantised_linears_are_joined(groups: list[JoinedLinears]) -> None:
    model = build("qwen3_5")
    nn.quantize(model, group_size=32, bits=4)
    flatten_linears(model)
    expected = logits(model)
    join_linears(model)
    assert agree(logits(model), expected)
    assert groups
    assert all(group.is_used for group in groups)


def test_what_is_quantised_differently_is_not_joined(groups: list[JoinedLinears]) -> None:
    model = build("qwen3_moe")
    nn.quantize(
        model,
        class_predicate=lambda path, module: (
            isinstance(module, nn.Linear)
            and {"group_size": 32, "bits": 8 if "k_proj" in path else 4}
        ),
    )
    flatten_linears(model)
    expected = logits(model)
    join_linears(model)
    assert not groups
    assert agree(logits(model), expected)


@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3"])
def test_a_start_on_a_gpu_joins_and_tokens_stay(name: str) -> None:
    loaded = LoadedModel(build(name), name, 512, "float32", 1, widened=False)
    requests = {0: (list(range(5, 42)), 8), 1: ([3, 4, 5], 8), 2: (list(range(7, 30)), 8)}
    tokens: dict[int, list[int]] = {index: [] for index in requests}
    with (
        mock.patch.object(start, "check_kernels"),
        mock.patch.object(start, "avoid_dropped", return_value=[]),
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        simulated_kernels(orders=1),
        selecting(Selector("metal", None)),
    ):
        paged = page_loaded(loaded, 8, "metal", None, [], lambda *_: None)
        config = EngineConfig(
            num_blocks=40, block_size=8, max_num_seqs=4, max_num_batched_tokens=24
        )
        engine = Engine(paged, config)
        for index, (prompt, length) in requests.items():
            sampling = SamplingParams(temperature=0)
            engine.submit(GenerateRequest(index, prompt, length, sampling))
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
    assert any(isinstance(m, SwigluMlp) for _, m in paged.model.named_modules())
    reference = build(name)
    for index, request in requests.items():
        assert tokens[index] == reference_generate(reference, *request)[0], index
