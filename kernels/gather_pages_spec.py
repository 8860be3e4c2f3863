"""Whole blocks of several sequences into contiguous keys and values."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.attention_problem import for_head_dims
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
from quire.kernels.kv_write import gather_context


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
        self.block_ids, self.written = ints(self.tables), mx.zeros((1,), mx.int32)
        mx.eval(self.block_ids, self.written)
        self.num_bytes = 2 * sum(array.nbytes for array in self.pages)

    def expected(self) -> list[Float64Array]:
        found = [array[self.tables].swapaxes(1, 2) for array in to_float64(self.pages)]
        return [array.reshape(*array.shape[:2], -1, array.shape[-1]) for array in found]


def _copy(problem: GatherProblem, settings: Settings) -> list[mx.array]:
    keys, values = problem.pages
    return list(gather_context(keys, values, problem.block_ids, problem.written))


def _index(problem: GatherProblem, settings: Settings) -> list[mx.array]:
    gathered = [array[problem.block_ids].swapaxes(1, 2) for array in problem.pages]
    return [mx.contiguous(array.flatten(2, 3)) for array in gathered]


_PACKS = Limit(multiple_of=8)

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
    surveyed=for_head_dims(lambda key, value: GatherShape(1, 64, 8, key, value, 16)),
    group=Group.PAGES,
)
