"""Rows of a step into a padded batch, and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.choice.problem import Float64Array, Problem, ints, normal, to_float64, waiting
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
from quire.kernels.gather_rows import join_rows, take_rows


class RowsVariant(Enum):
    COPY = "copy"
    INDEX = "index"


class RowsShape(NamedTuple):
    rows: int
    dim: int

    def bucket(self) -> RowsShape:
        return RowsShape(round_up(self.rows), self.dim)


class RowsProblem(Problem):
    """As attention uses them: three arrays of other widths, then one of them behind another."""

    def __init__(self, shape: RowsShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        random = mx.random.split(mx.random.key(seed), 3)
        self.arrays = [
            normal((shape.rows, heads, 1, shape.dim), dtype, key)
            for heads, key in zip((4, 2, 2), random, strict=True)
        ]
        rng = np.random.default_rng(seed)
        self.taken = ints(rng.integers(0, shape.rows, shape.rows + 3))
        self.joined = ints(rng.permutation(2 * shape.rows))
        mx.eval(self.taken, self.joined)
        self.num_bytes = 2 * sum(array.nbytes for array in [*self.arrays, *self.arrays[1:]])

    def expected(self) -> list[Float64Array]:
        a, b, c = to_float64(self.arrays)
        rows = np.array(self.taken)
        return [a[rows], b[rows], c[rows], np.concatenate([b, c])[np.array(self.joined)]]

    def chained(self, result: Sequence[mx.array]) -> RowsProblem:
        other = copy.copy(self)
        other.taken, other.joined = (waiting(x, result) for x in (self.taken, self.joined))
        return other


def _copy(problem: RowsProblem, settings: Settings) -> list[mx.array]:
    arrays = problem.arrays
    return [*take_rows(arrays, problem.taken), join_rows(arrays[1], arrays[2], problem.joined)]


def _index(problem: RowsProblem, settings: Settings) -> list[mx.array]:
    arrays = problem.arrays
    joined = mx.concatenate(arrays[1:])[problem.joined]
    return [*(array[problem.taken] for array in arrays), joined]


TAKE_ROWS = Spec(
    name="take_rows",
    shape=RowsShape,
    variants={
        RowsVariant.COPY: Variant(_copy, limits={"dim": Limit(multiple_of=8)}),
        RowsVariant.INDEX: Variant(_index, Kind.STEPS, ANYWHERE),
    },
    reference=RowsVariant.INDEX,
    defaults=(Default(RowsVariant.COPY, GPUS),),
    problem=RowsProblem,
    checked=(RowsShape(5, 128), RowsShape(33, 64)),
    surveyed={f"head_dim {dim}": RowsShape(256, dim) for dim in (32, 64, 80, 128, 256)},
    group=Group.PAGES,
)
