"""Recurrent layers as on a GPU: kernels, simulated, write states in place, one step ahead."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import model_zoo
import pytest
from metal_sim import simulated_kernels
from model_zoo import FAMILIES, Family, build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.paging import page_model
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.conv_window_spec import ConvShape

# Sizes that the kernels take.
WIDE: dict[str, dict[str, Any]] = {
    "qwen3_next": {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "kimi_linear": {
        "linear_attn_config": {
            **FAMILIES["kimi_linear"].config["linear_attn_config"],
            "head_dim": 32,
        }
    },
    "nemotron_h": {"ssm_state_size": 32},
    "lfm2": {},
}


@pytest.fixture(autouse=True)
def gpu_paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the GPU's paths on the CPU."""
    for name, wide in WIDE.items():
        family = Family(name, {**FAMILIES[name].config, **wide})
        monkeypatch.setitem(model_zoo.FAMILIES, name, family)
    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        simulated_kernels(orders=1),
        selecting(Selector("metal", None)),
    ):
        yield


def run(engine: Engine, requests: dict[int, tuple[list[int], int]]) -> dict[int, list[int]]:
    """Greedy outputs of (prompt, length) requests that arrive one step after another."""
    waiting = list(requests.items())
    tokens: dict[int, list[int]] = {index: [] for index in requests}
    while waiting or engine.has_work:
        if waiting:
            index, (prompt, length) = waiting.pop(0)
            engine.submit(GenerateRequest(index, prompt, length, SamplingParams(temperature=0)))
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return tokens


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("lfm2", "qwen3_next") else pytest.param(name, marks=pytest.mark.long)
        for name in WIDE
    ],
)
def test_tokens_equal_those_of_mlx_lm(name: str) -> None:
    model = page_model(build(name), name)
    config = EngineConfig(
        num_blocks=13,
        block_size=8,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        encode_ahead=True,
    )
    engine = Engine(model, config)
    assert model.states is not None
    assert model.states.in_place
    assert model.in_place
    convolutions = [u.shape for u in model.states.uses if isinstance(u.shape, ConvShape)]
    assert any(shape.heads for shape in convolutions) == (name == "qwen3_next")
    draw = random.Random(0)
    prompts = [[draw.randrange(100) for _ in range(n)] for n in (37, 3, 1, 44)]
    requests = {index: (prompt, 22) for index, prompt in enumerate(prompts)}
    tokens = run(engine, requests)
    assert engine.stats().preemptions > 0
    # The next turn goes on behind a snapshot.
    requests[4] = prompts[3] + tokens[3] + [7] * 9, 4
    tokens |= run(engine, {4: requests[4]})
    assert engine.scheduler.lookups.hits == 64
    reference = build(name)
    for index, found in tokens.items():
        assert found == reference_generate(reference, *requests[index])[0], index
