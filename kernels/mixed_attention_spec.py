"""Decodes, one query row per sequence, and the prompt chunks beside them in one step."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from itertools import accumulate, pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.attention_problem import (
    NO_SOFTCAP,
    PAGED_LIMITS,
    PagedProblem,
    Pages,
    head_numbers,
    spread,
    surveyed_shapes,
)
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Float64Array, ints
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.choice.spec import (
    ANYWHERE,
    HALF,
    Default,
    Group,
    Kind,
    Limit,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.decode_plan import default_settings, plan_on_device
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prompt import paged_prompt, tile_chunks
from quire.kernels.prompt_attention import prompt_attention
from quire.kernels.prompt_plan import PromptVariant, plan_prompts
from quire.kernels.ragged import DecodeGroup, PromptChunk, RaggedBatch
from quire.kernels.tree import to_device

_PROMPTS = 85, 40  # rows


class MixedVariant(Enum):
    FUSED = "fused"  # the decodes as chunks of one row, in the same launch as the prompts
    SEPARATE = "separate"  # by the kernels of both, whose results are then joined


class MixedShape(NamedTuple):
    rows: int  # of decodes
    context: int  # tokens that the longest of them sees
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    window: bool = False
    sinks: bool = False
    softcap: bool = False

    def bucket(self) -> MixedShape:
        return MixedShape(round_up(self.rows), round_up(self.context), *self[2:])


class MixedProblem(PagedProblem):
    def __init__(self, shape: MixedShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        self.shape = shape
        lengths = spread(shape.context, shape.rows, ragged)
        num_rows = shape.rows + sum(_PROMPTS)
        pages = self.pages = Pages(shape, [*lengths, *_PROMPTS], dtype, seed, num_rows)
        self.num_bytes = pages.num_bytes
        self.firsts = list(accumulate([1] * shape.rows + list(_PROMPTS), initial=0))
        self.chunks = [
            PromptChunk(first, end - first, n, table[: -(-n // shape.block_size)])
            for (first, end), n, table in zip(
                pairwise(self.firsts), pages.lengths, pages.tables, strict=True
            )
        ]
        prompts = self.chunks[shape.rows :]
        contexts = np.array(lengths, np.int32)
        self.tables = ints(pages.tables[: shape.rows])
        mx.eval(self.tables)
        self.tiles = tile_chunks(self.chunks, pages.heads)
        group = DecodeGroup(0, contexts, pages.tables[: shape.rows])
        self.batch = RaggedBatch([group], prompts)
        settings = default_settings(
            contexts, pages.window, shape.kv_heads, shape.heads // shape.kv_heads
        )
        self.decodes = plan_on_device(contexts, pages.window, settings)
        is_half = dtype != mx.float32
        variant = PromptVariant.PAGED_KERNEL if is_half else PromptVariant.SDPA_PER_CHUNK
        plan = plan_prompts(
            prompts, pages.heads, shape.block_size, lambda _: variant, num_before=shape.rows
        )
        self.prompts = to_device(plan)

    def expected(self) -> list[Float64Array]:
        rows = [range(first, end) for first, end in pairwise(self.firsts)]
        positions = [range(chunk.start, chunk.context_length) for chunk in self.chunks]
        parts = map(self.pages.attention, range(len(self.chunks)), rows, positions)
        return [np.concatenate(list(parts))]


def _fused(problem: MixedProblem, settings: Settings) -> list[mx.array]:
    pages = problem.pages
    return [paged_prompt(pages.queries, pages.arrays, problem.tiles, pages.scoring)]


def _separate(problem: MixedProblem, settings: Settings) -> list[mx.array]:
    pages, rows = problem.pages, problem.shape.rows
    queries, arrays, scoring = pages.queries, pages.arrays, pages.scoring
    if mx.default_device() == mx.cpu:
        return [paged_attention(queries, arrays, problem.batch, scoring)]
    decoded = paged_decode(queries[:rows], arrays, problem.tables, problem.decodes, scoring)
    return [prompt_attention(queries, arrays, problem.prompts, scoring, before=decoded)]


def _tuned(sizes: ModelSizes, device: DeviceName, block_size: int) -> Iterator[MixedShape]:
    if sizes.attention is None:
        return
    on_gpus = (16, 512), (64, 512), (64, 2048)
    for rows, context in ((8, 512),) if device == "cpu" else on_gpus:
        yield MixedShape(rows, context, *head_numbers(sizes.attention, block_size))


_COMMON = MixedShape(8, 512, 32, 8, 128, 128, 16)

MIXED_ATTENTION = Spec(
    name="mixed_attention",
    shape=MixedShape,
    variants={
        MixedVariant.FUSED: Variant(
            _fused, dtypes=HALF, limits={**PAGED_LIMITS, **NO_SOFTCAP}, needs=Group.PAGES
        ),
        MixedVariant.SEPARATE: Variant(_separate, Kind.STEPS, ANYWHERE, limits=NO_SOFTCAP),
    },
    reference=MixedVariant.SEPARATE,
    # On an H200, 32 and 8 heads of 128, bfloat16, GPU time in us by CUPTI, separate and fused,
    # beside 3 prompts of 85 rows: 64 x 130 tokens 40 and 23, 64 x 500 68 and 55, 64 x 1,024 103 and
    # 99, 128 x 130 58 and 36; 16 x 500 beside 2 x 200 rows 77 and 27.
    defaults=(Default(MixedVariant.FUSED, ("cuda",), {"context": Limit(max=1024)}),),
    problem=MixedProblem,
    checked=(
        MixedShape(3, 70, 8, 2, 128, 128, 16),
        MixedShape(5, 90, 4, 4, 64, 64, 8, window=True),
        MixedShape(2, 1100, 4, 2, 192, 128, 16, sinks=True),
    ),
    surveyed=surveyed_shapes(_COMMON),
    tuned=_tuned,
    untimed=("sinks", "softcap"),
)
