"""On a GPU each kernel text takes time to compile: a start has to meet all that a load will."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma3_text, gpt_oss, llama, qwen3, qwen3_moe

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.memory.budget import STEP_TOKENS, DeviceName
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.block_weights import standard_part
from quire.engine.model.experts import adapt_experts
from quire.engine.model.flat_linear import flatten_linears
from quire.engine.model.joined import join_linears
from quire.engine.model.mixtures import adapt_mixtures
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.model.residual import adapt_blocks
from quire.engine.startup.warm_up import make_ready
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue
from quire.kernels.padding import CONSTANT_SIZE

VOCAB = 256
FILTERED = SamplingParams(0.7, top_k=5, top_p=0.9, min_p=0.1)
PENALISED = SamplingParams(0.0, presence_penalty=0.5)

YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

Texts = set[tuple[object, ...]]


@contextmanager
def noted_texts(device: DeviceName) -> Iterator[Texts]:
    """What tells the texts of launches apart; the launches themselves return zeros."""
    met: Texts = set()

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
        small: tuple[str, ...] = ()
        if device == "metal":
            pairs = zip(kernel.inputs, inputs, strict=True)
            small = tuple(name for name, x in pairs if x.size < CONSTANT_SIZE)
        met.add((kernel.name, *map(str, template.items()), dtypes, small))
        shapes = zip(output_shapes, output_dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in shapes]

    mx.disable_compile()
    try:
        with (
            selecting(Selector(device, None)),
            mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
            mock.patch.object(GpuKernel, "launch", call),
        ):
            yield met
    finally:
        mx.enable_compile()


def make_model(kind: str) -> PagedModel:
    sizes = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": VOCAB,
    }  # fmt: skip
    longest = {"max_position_embeddings": 4096}
    rope = {"rope_theta": 1e4, "tie_word_embeddings": True, **longest}
    experts = {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    }  # fmt: skip
    model: Any
    if kind == "gemma3_text":
        window = {"sliding_window": 40, "sliding_window_pattern": 2}
        args = gemma3_text.ModelArgs(kind, num_hidden_layers=2, **sizes, **window)
        model = gemma3_text.Model(args)
    elif kind == "gpt_oss":
        model = gpt_oss.Model(
            gpt_oss.ModelArgs(
                kind,
                num_hidden_layers=2,
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=40,
                layer_types=["sliding_attention", "full_attention"],
                rope_scaling=YARN,
                **sizes,
            )
        )
    elif kind == "qwen3_moe":
        model = qwen3_moe.Model(
            qwen3_moe.ModelArgs(kind, num_hidden_layers=1, **sizes, **rope, **experts)
        )
    elif kind == "llama-4bit":
        model = llama.Model(llama.ModelArgs("llama", num_hidden_layers=1, **sizes, **rope))
    else:
        model = qwen3.Model(qwen3.ModelArgs(kind, num_hidden_layers=1, **sizes, **rope))
    if kind not in ("gpt_oss", "qwen3_moe"):  # MLX's CPU has no products of experts in bfloat16
        model.set_dtype(mx.bfloat16)
    if kind == "llama-4bit":
        nn.quantize(model, group_size=64, bits=4)
        flatten_linears(model)
    if standard_part(model) is None:  # as at a start
        for adapt in (join_linears, adapt_experts, adapt_mixtures, adapt_blocks):
            adapt(model)
    return page_model(model, model.model_type)


# The last two have no kind of layer that gpt_oss has not.
KINDS = ["qwen3", "gpt_oss", "llama-4bit"]
MORE_KINDS = [pytest.param(kind, marks=pytest.mark.long) for kind in ("gemma3_text", "qwen3_moe")]


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
@pytest.mark.parametrize(("device", "max_num_seqs"), [("metal", 16), ("cuda", 8), ("cuda", 64)])
def test_a_load_meets_no_text_that_a_start_has_not(
    kind: str, device: DeviceName, max_num_seqs: int
) -> None:
    if (device, max_num_seqs) == ("cuda", 64) and kind not in ("qwen3", "llama-4bit"):
        pytest.skip("its attention is that of cuda-8, and its products are MLX's own")
    budget = STEP_TOKENS[device]
    with noted_texts(device) as texts:
        config = EngineConfig(
            num_blocks=5000, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
        )
        engine = Engine(make_model(kind), config)
        engine.forget(make_ready(engine, budget, VOCAB, device))
        at_start = set(texts)
        assert {"paged_decode", "paged_merge", "take_rows"} <= {str(text[0]) for text in at_start}
        run_random_load(engine, random.Random(0), budget)
        run_long_contexts(engine, max_num_seqs)
        assert sorted(map(str, texts - at_start)) == []


def run_random_load(engine: Engine, draw: random.Random, budget: int) -> None:
    prompts: list[list[int]] = [[1]]
    lengths = [1, 1, 5, 30, 30, 100, 100, 100, budget // 4, 2 * budget // 3]
    for request_id in range(300):
        shared = draw.choice(prompts)[: draw.choice([0, 0, 0, 50, budget // 3])]
        rest = [draw.randrange(VOCAB) for _ in range(draw.choice(lengths))]
        prompts.append([*shared, *rest])
        sampling = draw.choice([SamplingParams(0.0), SamplingParams(), FILTERED, PENALISED])
        max_tokens = draw.choice([1, 4, 20])
        engine.submit(GenerateRequest(request_id, prompts[-1], max_tokens, sampling))
        for _ in range(draw.choice([0, 0, 0, 1, 3, 12])):
            engine.step()
    while engine.has_work:
        engine.step()


def run_long_contexts(engine: Engine, max_num_seqs: int) -> None:
    """Contexts of one length, of the same tokens and of others, and a short prompt beside."""
    request_id = 1000
    for is_same in (True, False):
        for _ in range(max_num_seqs - 1):
            request_id += 1
            first = 1 if is_same else request_id
            tokens = [first * i % VOCAB for i in range(1100)]
            engine.submit(GenerateRequest(request_id, [*tokens, request_id % VOCAB], 20, FILTERED))
        for _ in range(50):
            engine.step()
        request_id += 1
        engine.submit(GenerateRequest(request_id, [2, 1], 4, FILTERED))
        while engine.has_work:
            engine.step()
