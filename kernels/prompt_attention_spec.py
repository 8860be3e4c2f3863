"""Consecutive rows of one sequence over its pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from quire.kernels.attention_problem import (
    BY_SDPA,
    NO_SOFTCAP,
    WIDE_LIMITS,
    PagedProblem,
    Pages,
    head_numbers,
    surveyed_shapes,
    windows,
)
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Float64Array
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.choice.spec import (
    ANYWHERE,
    GPUS,
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
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import prompt_sdpa, prompt_tiles
from quire.kernels.prompt_attention import prompt_attention
from quire.kernels.prompt_plan import PromptPlan, PromptVariant, plan_prompts
from quire.kernels.ragged import PromptChunk
from quire.kernels.tree import to_device


class PromptShape(NamedTuple):
    rows: int
    context: int  # tokens, the rows included
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    from_start: bool = True  # nothing of the context precedes the rows
    window: bool = False
    sinks: bool = False
    softcap: bool = False
    extra_dim: int = 0  # of keys beside those whose pages hold the values too

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def bucket(self) -> PromptShape:
        """Heads count by their groups: every key head does the same work."""
        rows, context = round_up(self.rows), round_up(self.context)
        return PromptShape(rows, context, self.group, 1, *self[4:])


class PromptProblem(PagedProblem):
    def __init__(self, shape: PromptShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        start = shape.context - shape.rows
        if shape.from_start != (start == 0):
            raise ValueError(f"{shape.rows} rows of {shape.context} tokens: from_start is wrong")
        self.shape = shape
        self.pages = Pages(shape, [shape.context], dtype, seed, shape.rows)
        self.num_bytes = self.pages.num_bytes
        seen = sum(range(start + 1, shape.context + 1))
        self.flops = 4 * seen * shape.heads * shape.key_dim
        self.chunk = PromptChunk(0, shape.rows, shape.context, self.pages.tables[0])
        # Of whole prompts a step has keys and values at hand as it has just computed them.
        keys, values = self.pages.contiguous
        if (extra := self.pages.extra) is not None:  # whose keys they are then
            found = extra.key_pages[mx.array(self.pages.tables[0])].swapaxes(0, 1).flatten(1, 2)
            values = found[None, :, : shape.context]
        new = [mx.contiguous(x.transpose(2, 1, 0, 3)) for x in (keys, values)]
        mx.eval(new)
        at_hand = new if shape.from_start else (None, None)
        pages = self.pages
        self.in_place = PageArrays(*pages.arrays[:3], *at_hand)
        self._plans: dict[PromptVariant, PromptPlan] = {}

    def plan(self, variant: PromptVariant) -> PromptPlan:
        """One for all layers of a step."""
        if variant not in self._plans:
            heads, block_size = self.pages.heads, self.shape.block_size
            plan = plan_prompts([self.chunk], heads, block_size, lambda _: variant)
            self._plans[variant] = to_device(plan)
        return self._plans[variant]

    def expected(self) -> list[Float64Array]:
        rows = range(self.shape.rows)
        positions = range(self.chunk.start, self.shape.context)
        return [self.pages.attention(0, rows, positions)]


def _planned(variant: PromptVariant, problem: PromptProblem, settings: Settings) -> list[mx.array]:
    pages = problem.pages
    plan = problem.plan(variant)
    extra = pages.extra
    return [prompt_attention(pages.queries, problem.in_place, plan, pages.scoring, extra=extra)]


def _gathered(
    attention: Callable[..., list[mx.array]], problem: PromptProblem, settings: Settings
) -> list[mx.array]:
    pages, chunk, block_size = problem.pages, problem.chunk, problem.shape.block_size
    first = chunk.first_block(chunk.start, pages.window, block_size)
    blocks = chunk.blocks_from(first)
    keys, values = (
        array[blocks].swapaxes(0, 1).flatten(1, 2)[None] for array in (pages.keys, pages.values)
    )
    queries, scoring = pages.queries, pages.scoring
    if pages.extra is not None:
        extra = pages.extra.key_pages[blocks].swapaxes(0, 1).flatten(1, 2)[None]
        queries = mx.concatenate([queries * scoring.scale, pages.extra.queries], axis=-1)
        keys, scoring = mx.concatenate([keys, extra], axis=-1), scoring._replace(scale=1.0)
    parts = attention(queries, keys, values, chunk, first * block_size, scoring)
    return [mx.concatenate(parts)]


_NO_EXTRA = {"extra_dim": Limit(max=0)}


def _from_pages(variant: PromptVariant, device: DeviceName) -> Variant[PromptShape, PromptProblem]:
    """By MLX's fused attention, of pages that kernels write."""
    run = partial(_planned, variant)
    limits = {**NO_SOFTCAP, **_NO_EXTRA}
    return Variant(run, Kind.STEPS, (device,), limits=limits, needs=Group.PAGES)


# Rows of a prompt chunk, and the context they end.
_CPU_CHUNKS = (64, 64), (256, 256), (64, 512), (256, 1024)
_GPU_CHUNKS = (128, 128), (512, 512), (2048, 2048), (128, 4096), (512, 4096)


def _tuned(sizes: ModelSizes, device: DeviceName, block_size: int) -> Iterator[PromptShape]:
    if sizes.attention is None:
        return
    numbers = head_numbers(sizes.attention, block_size)
    for window in windows(sizes.attention):
        for rows, context in _CPU_CHUNKS if device == "cpu" else _GPU_CHUNKS:
            is_whole = rows == context
            yield PromptShape(rows, context, *numbers, from_start=is_whole, window=window)


_WHOLE = Limit(values=(True,))
_COMMON = PromptShape(256, 256, 32, 8, 128, 128, 16)

PROMPT_ATTENTION = Spec(
    name="prompt_attention",
    shape=PromptShape,
    variants={
        PromptVariant.PAGED_KERNEL: Variant(
            partial(_planned, PromptVariant.PAGED_KERNEL),
            dtypes=HALF,
            limits={**WIDE_LIMITS, **NO_SOFTCAP, **_NO_EXTRA},
            needs=Group.PAGES,
        ),
        # MLX prepares a plan of some 60 ms for every new pair of lengths on CUDA, which no timing
        # of single calls would show: so chunks go padded there, and one by one elsewhere.
        PromptVariant.SDPA_PADDED: _from_pages(PromptVariant.SDPA_PADDED, "cuda"),
        PromptVariant.SDPA_PER_CHUNK: _from_pages(PromptVariant.SDPA_PER_CHUNK, "metal"),
        PromptVariant.SDPA_PIECES: Variant(
            partial(_planned, PromptVariant.SDPA_PIECES),
            Kind.STEPS,
            GPUS,
            limits={**NO_SOFTCAP, "extra_dim": Limit(min=1)},
            needs=Group.PAGES,
        ),
        PromptVariant.GATHER_SDPA: Variant(
            partial(_gathered, prompt_sdpa), Kind.STEPS, ("cpu",), limits=NO_SOFTCAP
        ),
        PromptVariant.SDPA_TILED: Variant(partial(_gathered, prompt_tiles), Kind.STEPS, ANYWHERE),
    },
    reference=PromptVariant.SDPA_TILED,
    # On an H200, bfloat16, us by CUPTI, paged_kernel and sdpa_padded, which MLX fuses for heads of
    # at most 128 and without a mask. 32 and 8 heads of 128: 1 x 2,048 191 and 83, 8 chunks of 37
    # to 475 rows 57 and 87, 24 x 85 40 and 62, 8 x 256 49 and 23; after 4,096 tokens 4 x 512 587
    # and 2,961, 8 x 64 162 and 1,071. 16 and 4 heads of 256: 1 x 2,048 535 and 742, 1 x 512 170
    # and 134, 2,048 after 6,144 1,931 and 2,307. 16 and 2 of 512: 1 x 2,048 1,498 and 891. Of 20
    # of latent attention, whose products are large, MLX's take less than half of what the kernel
    # took when it could (1 x 2,048 2,152 and 985, 512 after 3,584 1,893 and 587).
    defaults=(
        Default(
            PromptVariant.SDPA_PADDED,
            ("cuda",),
            {"from_start": _WHOLE, "rows": Limit(min=1024), "key_dim": Limit(max=128)},
        ),
        Default(
            PromptVariant.SDPA_PADDED,
            ("cuda",),
            {"from_start": _WHOLE, "rows": Limit(min=1024), "key_dim": Limit(min=512)},
        ),
        Default(PromptVariant.PAGED_KERNEL, ("cuda",)),
        Default(PromptVariant.SDPA_PADDED, ("cuda",)),
        Default(PromptVariant.SDPA_PER_CHUNK, ("metal",)),
        Default(PromptVariant.SDPA_PIECES, GPUS),
    ),
    problem=PromptProblem,
    checked=(
        PromptShape(33, 33, 8, 2, 128, 128, 16),
        PromptShape(17, 70, 4, 4, 64, 64, 8, from_start=False),
        PromptShape(9, 90, 14, 2, 96, 96, 32, from_start=False, window=True),
        PromptShape(20, 40, 4, 2, 192, 128, 16, from_start=False, sinks=True),
        PromptShape(5, 1100, 8, 2, 64, 64, 16, from_start=False),
        PromptShape(20, 40, 4, 2, 64, 64, 16, from_start=False, softcap=True),
        PromptShape(12, 40, 4, 2, 512, 512, 16, from_start=False),
        PromptShape(9, 40, 5, 1, 512, 512, 16, from_start=False, extra_dim=64),
    ),
    surveyed={
        **surveyed_shapes(_COMMON),
        "latent attention": _COMMON._replace(kv_heads=1, key_dim=512, value_dim=512, extra_dim=64),
    },
    tuned=_tuned,
    baselines=BY_SDPA,
    untimed=("sinks", "softcap"),
)
