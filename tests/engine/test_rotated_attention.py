"""Attention of mlx-lm's files that kernels, here simulated, take over behind the projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from launches import launches
from metal_sim import simulated_kernels
from model_zoo import build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.memory.budget import DeviceName
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.joined import join_linears
from quire.engine.model.paging import page_model
from quire.engine.model.rotated_attention import RotatedAttention, adapt_attention
from quire.engine.startup.model_shapes import model_shapes
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.rotate_and_decode_spec import ROTATE_AND_DECODE
from quire.kernels.rotate_spec import ROTATE_AND_WRITE

PROMPTS = [[5 + i for i in range(37)], [3, 4, 5], [5 + i for i in range(20)] + [9, 9]]


@pytest.fixture(autouse=True)
def gpu_paths() -> Iterator[None]:
    """Take a GPU's paths on the CPU."""
    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        simulated_kernels(orders=1),
    ):
        yield


def adapted(family: str) -> tuple[Any, list[RotatedAttention]]:
    model = build(family, 0)
    adapt_attention(model)
    adapt_attention(model)  # once more changes nothing
    return model, [each for each in model.modules() if isinstance(each, RotatedAttention)]


def generated(model: Any, family: str, count: int = 5) -> list[list[int]]:
    config = EngineConfig(
        num_blocks=40,
        block_size=8,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        num_state_slots=12,
        encode_ahead=True,
    )
    engine = Engine(page_model(model, family), config)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for index, prompt in enumerate(PROMPTS):
        engine.submit(GenerateRequest(index, prompt, count, SamplingParams(temperature=0)))
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return tokens


@pytest.mark.parametrize(
    ("device", "join"), [("cuda", True), ("metal", True), ("cuda", False)], ids=str
)
@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        "glm4_moe",
        "lfm2",
        "qwen3_next",
        "qwen3_5",
        "granitemoe",
        "ernie4_5_moe",
        "mimo",
    ],
)
def test_tokens_equal_those_of_mlx_lm(family: str, device: DeviceName, join: bool) -> None:
    model, layers = adapted(family)
    if join:
        join_linears(model)
    assert layers
    with selecting(Selector(device, None)), launches() as launched:
        tokens = generated(model, family)
    reference = build(family, 0)
    assert tokens == [reference_generate(reference, prompt, 5)[0] for prompt in PROMPTS]
    assert launched["rotate_and_write"]
    assert not launched["kv_write"]


@pytest.mark.parametrize("family", ["olmoe", "glm4_moe_lite", "gemma3_text", "cohere", "phimoe"])
def test_other_code_and_other_embeddings_stay_as_they_are(family: str) -> None:
    assert not adapted(family)[1]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5"])
def test_a_model_that_no_kernel_pages_has_stays_what_it_is(family: str) -> None:
    model, layers = adapted(family)
    assert layers
    tokens = mx.array([[5, 9, 3, 7]])
    assert mx.array_equal(model(tokens), build(family, 0)(tokens))
    with (
        selecting(Selector("cuda", None)),
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=False),
    ):
        assert generated(model, family) == generated(build(family, 0), family)


@pytest.mark.parametrize(
    ("family", "norms", "gated"),
    [
        ("qwen3_moe", True, False),
        ("qwen3_5", True, True),
        ("granitemoe", False, False),
        ("gpt_oss", False, False),
    ],
)
def test_kernels_are_checked_at_these_shapes(family: str, norms: bool, gated: bool) -> None:
    model, layers = adapted(family)
    paged = page_model(model, family)
    shape = paged.layers[0].shape
    assert shape is not None
    for spec in (ROTATE_AND_WRITE, ROTATE_AND_DECODE):
        shapes: list[Any] = model_shapes(paged, 8)[spec]
        found = {(s.kv_heads, s.head_dim, s.rotary_dim, s.norms, s.gated) for s in shapes}
        dims = layers[0].rotary.dims
        assert found == {(shape.key_heads, shape.key_dim, dims, norms, gated)}
        assert {s.scaled for s in shapes} == {family == "gpt_oss"}


def test_a_kernel_that_is_wrong_here_is_not_used() -> None:
    model, _ = adapted("qwen3_moe")
    paged = page_model(model, "qwen3_moe")
    paged.allow_fused = False
    paged.allocate(10, 8)
    assert [layer.rotated for layer in paged.layers] == [None] * len(paged.layers)
    paged.allow_fused = True
    paged.allocate(10, 8)
    assert all(layer.rotated is not None for layer in paged.layers)
