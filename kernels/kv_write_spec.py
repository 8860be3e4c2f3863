"""New keys and values of a step into their slots, and whole blocks into contiguous arrays."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.attention_problem import surveyed_shapes
from quire.kernels.choice.problem import Float64Array, Problem, ints, normal, to_float64
from quire.kernels.choice.spec import (
    ANYWHERE,
    GPUS,
    Default,
    Group,
    Kind,
    Limit,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.kv_write import Slots, gather_context, scatter, write_in_place
from quire.kernels.page_arrays import PageArrays


class WriteVariant(Enum):
    IN_PLACE = "in_place"
    SCATTER = "scatter"


class WriteShape(NamedTuple):
    rows: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    keep_rows: bool = False  # the rows are returned too

    def bucket(self) -> WriteShape:
        return WriteShape(round_up(self.rows), *self[1:])


class WriteProblem(Problem):
    """The result is both page arrays, and the rows if they are kept."""

    def __init__(
        self,
        shape: WriteShape,
        dtype: mx.Dtype,
        seed: int,
        ragged: bool = False,
        num_blocks: int | None = None,
    ) -> None:
        """``num_blocks``: of a pool that is larger than a cache."""
        self.shape = shape
        num_blocks = num_blocks or 2 + -(-2 * shape.rows // shape.block_size)
        random = mx.random.split(mx.random.key(seed), 4)
        dims, size = (shape.key_dim, shape.value_dim), (shape.rows, shape.kv_heads, 1)
        self.rows = [normal((*size, d), dtype, k) for d, k in zip(dims, random[:2], strict=True)]
        pages = num_blocks, shape.kv_heads, shape.block_size

        def fresh_pages() -> list[mx.array]:
            return [normal((*pages, d), dtype, k) for d, k in zip(dims, random[2:], strict=True)]

        # Each variant writes to pages of its own, whose results stay for the next call.
        self.fresh_pages = fresh_pages
        self.in_place, self.scattered = fresh_pages(), fresh_pages()
        # Block 0 is nobody's.
        free = np.arange(shape.block_size, num_blocks * shape.block_size)
        self.mapping = np.random.default_rng(seed).permutation(free)[: shape.rows].astype(np.int32)
        self.slots = Slots(ints(self.mapping), shape.block_size)
        self.fence = mx.zeros((1,), mx.int32)
        mx.eval(self.fence, self.slots.mapping, self.slots.indices(shape.kv_heads))
        self.num_bytes = 2 * sum(new.nbytes for new in self.rows)

    def expected(self) -> list[Float64Array]:
        results, rows = to_float64(self.fresh_pages()), to_float64(self.rows)
        blocks, offsets = np.divmod(self.mapping, self.shape.block_size)
        for pages, new in zip(results, rows, strict=True):
            pages[blocks, :, offsets] = new[:, :, 0]
        return results + (rows if self.shape.keep_rows else [])

    def chained(self, result: Sequence[mx.array]) -> WriteProblem:
        """A write in place waits for the fence of the one before. The scatter goes on with the very
        arrays it replaced: had the result arrays of its own, MLX would copy the pool each time."""
        other = copy.copy(self)
        *_, last = result
        if last.size == 1:
            other.fence = last
        else:
            other.scattered = list(result[:2])
        return other


def _in_place(problem: WriteProblem, settings: Settings) -> list[mx.array]:
    pages = PageArrays(problem.in_place[0], problem.in_place[1], problem.fence)
    (keys, values), mapping = problem.rows, problem.slots.mapping
    written = write_in_place(pages, keys, values, mapping, keep_rows=problem.shape.keep_rows)
    kept = [rows for rows in (written.new_keys, written.new_values) if rows is not None]
    fence = written.needed_fence()
    # One operation of all results: the next call of a chain waits for the fence alone.
    found: list[mx.array] = mx.depends([*problem.in_place, *kept, fence], [fence])
    return found


def _scatter(problem: WriteProblem, settings: Settings) -> list[mx.array]:
    for pages, new in zip(problem.scattered, problem.rows, strict=True):
        scatter(pages, new, problem.slots)
    return [*problem.scattered, *(problem.rows if problem.shape.keep_rows else [])]


_COMMON = WriteShape(8, 8, 128, 128, 16)
_PACKS = Limit(multiple_of=8)

KV_WRITE = Spec(
    name="kv_write",
    shape=WriteShape,
    variants={
        WriteVariant.IN_PLACE: Variant(_in_place, limits={"key_dim": _PACKS, "value_dim": _PACKS}),
        WriteVariant.SCATTER: Variant(_scatter, Kind.STEPS, ANYWHERE),
    },
    reference=WriteVariant.SCATTER,
    defaults=(Default(WriteVariant.IN_PLACE, GPUS),),
    problem=WriteProblem,
    checked=(WriteShape(5, 2, 128, 128, 16, keep_rows=True), WriteShape(37, 3, 192, 128, 8)),
    surveyed={
        **surveyed_shapes(_COMMON),
        **{f"block_size {n}": _COMMON._replace(block_size=n) for n in (4, 8, 16, 32, 64)},
    },
    group=Group.PAGES,
)


class GatherVariant(Enum):
    COPY = "copy"
    INDEX = "index"


class GatherShape(NamedTuple):
    sequences: int
    blocks: int  # of each
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int

    def bucket(self) -> GatherShape:
        return GatherShape(round_up(self.sequences), round_up(self.blocks), *self[2:])


class GatherProblem(Problem):
    waits = "block_ids"

    def __init__(self, shape: GatherShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        random = mx.random.split(mx.random.key(seed), 2)
        num_blocks = 1 + shape.sequences * shape.blocks
        dims = shape.key_dim, shape.value_dim
        size = num_blocks, shape.kv_heads, shape.block_size
        self.pages = [
            normal((*size, dim), dtype, key) for dim, key in zip(dims, random, strict=True)
        ]
        order = 1 + np.random.default_rng(seed).permutation(num_blocks - 1)
        self.tables = order.reshape(shape.sequences, shape.blocks)
        self.block_ids, self.fence = ints(self.tables), mx.zeros((1,), mx.int32)
        mx.eval(self.block_ids, self.fence)
        self.num_bytes = 2 * sum(array.nbytes for array in self.pages)

    def expected(self) -> list[Float64Array]:
        found = [array[self.tables].swapaxes(1, 2) for array in to_float64(self.pages)]
        return [array.reshape(*array.shape[:2], -1, array.shape[-1]) for array in found]


def _copy(problem: GatherProblem, settings: Settings) -> list[mx.array]:
    pages = PageArrays(problem.pages[0], problem.pages[1], problem.fence)
    return list(gather_context(pages, problem.block_ids))


def _index(problem: GatherProblem, settings: Settings) -> list[mx.array]:
    gathered = [array[problem.block_ids].swapaxes(1, 2) for array in problem.pages]
    return [mx.contiguous(array.flatten(2, 3)) for array in gathered]


GATHER_PAGES = Spec(
    name="gather_pages",
    shape=GatherShape,
    variants={
        GatherVariant.COPY: Variant(_copy, limits={"key_dim": _PACKS, "value_dim": _PACKS}),
        GatherVariant.INDEX: Variant(_index, Kind.STEPS, ANYWHERE),
    },
    reference=GatherVariant.INDEX,
    defaults=(Default(GatherVariant.COPY, GPUS),),
    problem=GatherProblem,
    checked=(GatherShape(1, 3, 2, 128, 128, 16), GatherShape(3, 2, 3, 192, 128, 8)),
    surveyed=surveyed_shapes(GatherShape(1, 64, 8, 128, 128, 16)),
    group=Group.PAGES,
)
