"""What a decode step does between a block's projections: rotation, KV write and attention, of rows
that share no pages."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.attention_problem import PAGED_LIMITS, Pages, spread
from quire.kernels.choice.problem import Float64Array, Problem, ints, to_float64
from quire.kernels.choice.spec import (
    ANYWHERE,
    GPUS,
    Default,
    Group,
    Kind,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.decode_plan import default_settings, plan_on_device
from quire.kernels.kv_write import Slots, scatter
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_decode import fits_lanes, rotate_and_decode
from quire.kernels.paged_decode_spec import DecodeShape
from quire.kernels.ragged import DecodeGroup, RaggedBatch
from quire.kernels.rotate import ProjectedRows
from quire.kernels.rotate_spec import RandomRows


class RotatingDecodeVariant(Enum):
    FUSED = "fused"
    SEPARATE = "separate"  # in the engine by the kernels of both


class RotatingDecodeShape(NamedTuple):
    rows: int
    context: int  # tokens that a row sees, its own included, on average
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    norms: bool = False  # of each head of queries and keys
    traditional: bool = False  # pairs are neighbours
    window: bool = False
    sinks: bool = False
    gated: bool = False  # as in ProjectedRows
    scaled: bool = False  # what is turned is multiplied before

    def bucket(self) -> RotatingDecodeShape:
        return RotatingDecodeShape(round_up(self.rows), round_up(self.context), *self[2:])


class RotatingDecodeProblem(Problem):
    """The result is attention and both page arrays, with the newest token of each row."""

    def __init__(
        self, shape: RotatingDecodeShape, dtype: mx.Dtype, seed: int, ragged: bool
    ) -> None:
        self.shape = shape
        lengths = np.array(spread(shape.context, shape.rows, ragged), np.int32)
        dim, block_size, group = shape.head_dim, shape.block_size, shape.heads // shape.kv_heads
        decodes = DecodeShape(
            *shape[:4],
            key_dim=dim,
            value_dim=dim,
            block_size=block_size,
            window=shape.window,
            sinks=shape.sinks,
        )
        before = self.before = Pages(decodes, lengths.tolist(), dtype, seed, shape.rows)
        self.rows = RandomRows(shape, lengths - 1, dtype, mx.random.key(seed + 1))
        self.num_bytes = before.num_bytes + self.rows.qkv.nbytes
        self.blocks = before.tables[np.arange(shape.rows), (lengths - 1) // block_size]
        self.offsets = (lengths - 1) % block_size
        mapping = ints(self.blocks * block_size + self.offsets)
        self.slots = Slots(mapping, block_size)
        self.tables = ints(before.tables)
        # Each variant writes to pages of its own, whose results stay for the next call.
        self.fused, self.separate = (
            [mx.array(pages) for pages in (before.keys, before.values)] for _ in range(2)
        )
        mx.eval(mapping, self.tables, self.fused, self.separate)
        settings = default_settings(lengths, before.window, shape.kv_heads, group)
        self.plan = plan_on_device(lengths, before.window, settings)
        self.batch = RaggedBatch([DecodeGroup(0, lengths, before.tables)], [])

    def expected(self) -> list[Float64Array]:
        queries, *new = self.rows.in_float64()
        pages = to_float64([self.before.keys, self.before.values])
        for array, rows in zip(pages, new, strict=True):
            array[self.blocks, :, self.offsets] = rows
        after = copy.copy(self.before)
        after.queries = mx.array(queries[:, :, None].astype(np.float32))
        after.keys, after.values = (mx.array(array.astype(np.float32)) for array in pages)
        return [*after.last_rows(), *pages]

    def chained(self, result: Sequence[mx.array]) -> RotatingDecodeProblem:
        other = copy.copy(self)
        other.rows = self.rows.waiting(result)
        return other


def _fused(problem: RotatingDecodeProblem, settings: Settings) -> list[mx.array]:
    rows, before = problem.rows, problem.before
    output = rotate_and_decode(
        ProjectedRows(rows.qkv, rows.positions, problem.slots.mapping, problem.shape.gated),
        PageArrays(problem.fused[0], problem.fused[1], before.arrays.fence),
        problem.tables,
        problem.plan,
        before.scoring,
        rows.rotary,
        rows.norms,
    )
    return [output, *mx.depends(problem.fused, [output])]


def _separate(problem: RotatingDecodeProblem, settings: Settings) -> list[mx.array]:
    queries, *new = problem.rows.by_mlx()
    for array, rows in zip(problem.separate, new, strict=True):
        scatter(array, rows, problem.slots)
    pages = PageArrays(problem.separate[0], problem.separate[1])
    output = paged_attention(queries, pages, problem.batch, problem.before.scoring)
    return [output, *problem.separate]


def _fits(shape: RotatingDecodeShape, dtype: str) -> bool:
    return fits_lanes((shape.head_dim, shape.head_dim), getattr(mx, dtype), shape.block_size)


_COMMON = RotatingDecodeShape(8, 1024, 32, 8, 128, 128, 16)

ROTATE_AND_DECODE = Spec(
    name="rotate_and_decode",
    shape=RotatingDecodeShape,
    variants={
        RotatingDecodeVariant.FUSED: Variant(
            _fused,
            limits={
                "head_dim": PAGED_LIMITS["key_dim"],
                "block_size": PAGED_LIMITS["block_size"],
            },
            fits=_fits,
            needs=Group.BLOCKS,
        ),
        RotatingDecodeVariant.SEPARATE: Variant(_separate, Kind.STEPS, ANYWHERE),
    },
    reference=RotatingDecodeVariant.SEPARATE,
    defaults=(Default(RotatingDecodeVariant.FUSED, GPUS),),
    problem=RotatingDecodeProblem,
    checked=(
        RotatingDecodeShape(3, 50, 8, 2, 128, 128, 16, norms=True),
        RotatingDecodeShape(2, 40, 4, 4, 64, 64, 8, window=True),
        RotatingDecodeShape(3, 60, 18, 2, 80, 32, 32, traditional=True),
        RotatingDecodeShape(1, 20, 2, 1, 256, 256, 16, norms=True, traditional=True),
        RotatingDecodeShape(2, 40, 4, 2, 256, 64, 16, norms=True, gated=True),
        RotatingDecodeShape(3, 60, 16, 2, 64, 64, 16, window=True, sinks=True, scaled=True),
    ),
    surveyed={"with norms": _COMMON._replace(norms=True), "without norms": _COMMON},
)
