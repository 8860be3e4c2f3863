"""On CUDA each kernel text takes seconds to compile: a start has to meet all that a load will."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma3_text, qwen3

from quire.engine.engine import Engine, EngineConfig
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.flat_linear import flatten_quantized_linears
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.startup.warm_up import warm_up
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue

VOCAB = 256
BUDGET = 2048
FILTERED = SamplingParams(0.7, top_k=5, top_p=0.9, min_p=0.1)


@pytest.fixture
def texts() -> Iterator[set[tuple[object, ...]]]:
    """What tells the texts of launches apart; the launches themselves return zeros."""
    met: set[tuple[object, ...]] = set()

    def call(
        kernel: GpuKernel,
        inputs: Sequence[mx.array],
        *,
        template: dict[str, TemplateValue],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        **grid: object,
    ) -> list[mx.array]:
        dtypes = tuple(str(dtype) for dtype in (*(x.dtype for x in inputs), *output_dtypes))
        met.add((kernel.name, *map(str, template.items()), dtypes))
        pairs = zip(output_shapes, output_dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in pairs]

    mx.disable_compile()
    with (
        selecting(Selector("cuda", None)),
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        mock.patch.object(GpuKernel, "launch", call),
    ):
        yield met
    mx.enable_compile()


def make_model(kind: str) -> PagedModel:
    sizes = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": VOCAB,
    }  # fmt: skip
    model: Any
    if kind == "windows":
        window = {"sliding_window": 40, "sliding_window_pattern": 2}
        args = gemma3_text.ModelArgs("gemma3_text", num_hidden_layers=2, **sizes, **window)
        model = gemma3_text.Model(args)
    else:
        others = {"max_position_embeddings": 4096, "rope_theta": 1e4, "tie_word_embeddings": True}
        model = qwen3.Model(qwen3.ModelArgs("qwen3", num_hidden_layers=1, **sizes, **others))
    model.set_dtype(mx.bfloat16)
    if kind == "quantised":
        nn.quantize(model, group_size=64, bits=4)
        flatten_quantized_linears(model)
    return page_model(model, model.model_type)


@pytest.mark.parametrize("kind", ["dense", "quantised", "windows"])
@pytest.mark.parametrize("max_num_seqs", [8, 64])
def test_a_load_meets_no_text_that_a_start_has_not(
    kind: str, max_num_seqs: int, texts: set[tuple[object, ...]]
) -> None:
    config = EngineConfig(num_blocks=5000, max_num_seqs=max_num_seqs, max_num_batched_tokens=BUDGET)
    engine = Engine(make_model(kind), config)
    warm_up(engine, BUDGET, VOCAB, every_kernel=True)
    at_start = set(texts)
    names = {str(text[0]) for text in at_start}
    assert {"paged_decode", "paged_merge", "paged_prompt", "take_rows", "join_rows"} <= names
    draw = random.Random(0)
    prompts: list[list[int]] = [[1]]
    for request_id in range(200):
        length = draw.choice([1, 5, 30, 100, 100, 300, 900, 1500])
        shared = draw.choice(prompts)[: draw.choice([0, 0, 50, 600])]
        prompts.append([*shared, *(draw.randrange(VOCAB) for _ in range(length))])
        sampling = draw.choice([SamplingParams(0.0), SamplingParams(), FILTERED])
        max_tokens = draw.choice([1, 4, 60])
        engine.submit(GenerateRequest(request_id, prompts[-1], max_tokens, sampling))
        for _ in range(draw.choice([0, 0, 0, 1, 3, 20])):
            engine.step()
    while engine.has_work:
        engine.step()
    # Long contexts of the same length, of the same tokens and of others, and a short prompt beside.
    for is_same in (True, False):
        for _ in range(max_num_seqs - 1):
            request_id += 1
            first = 1 if is_same else request_id
            tokens = [first * i % VOCAB for i in range(1100)]
            engine.submit(GenerateRequest(request_id, [*tokens, request_id % VOCAB], 30, FILTERED))
        for _ in range(60):
            engine.step()
        request_id += 1
        engine.submit(GenerateRequest(request_id, [2, 1], 4, FILTERED))
        while engine.has_work:
            engine.step()
    assert sorted(map(str, texts - at_start)) == []
