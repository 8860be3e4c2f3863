"""What stands between the matrix products of a block: a residual and the norm that follows it, and
the gated activation of joined projections."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.choice.problem import Float64Array, Problem, normal, to_float64
from quire.kernels.choice.spec import (
    ANYWHERE,
    GPUS,
    Default,
    Kind,
    Limit,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.fused_ops import add_rms_norm, swiglu_joined

_EPS = 1e-5


class FusedVariant(Enum):
    FUSED = "fused"
    SEPARATE = "separate"


class BlockShape(NamedTuple):
    """Rows of ``dim`` values: sums and norms of them, or gates and as many others."""

    rows: int
    dim: int

    def bucket(self) -> BlockShape:
        return BlockShape(round_up(self.rows), self.dim)


class NormProblem(Problem):
    waits = "x"

    def __init__(self, shape: BlockShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        random = mx.random.split(mx.random.key(seed), 3)
        self.x, self.delta = (normal(shape, dtype, key) for key in random[:2])
        self.weight = normal((shape.dim,), dtype, random[2])
        self.num_bytes = 4 * self.x.nbytes

    def expected(self) -> list[Float64Array]:
        x, delta, weight = to_float64([self.x, self.delta, self.weight])
        total = x + delta
        return [total, rms_normed(total, weight, _EPS)]


class GateProblem(Problem):
    waits = "both"

    def __init__(self, shape: BlockShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        self.both = normal((shape.rows, 2 * shape.dim), dtype, mx.random.key(seed)) * 4
        mx.eval(self.both)
        self.num_bytes = 3 * self.both.nbytes // 2

    def expected(self) -> list[Float64Array]:
        gate, up = np.split(to_float64([self.both])[0], 2, axis=-1)
        return [gate / (1 + np.exp(-gate)) * up]


def rms_normed(x: Float64Array, weight: Float64Array, eps: float) -> Float64Array:
    normed: Float64Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight
    return normed


def _separate_norm(problem: NormProblem, settings: Settings) -> list[mx.array]:
    total = problem.x + problem.delta
    return [total, mx.fast.rms_norm(total, problem.weight, _EPS)]


def _separate_gate(problem: GateProblem, settings: Settings) -> list[mx.array]:
    gate, up = mx.split(problem.both, 2, axis=-1)
    return [gate * mx.sigmoid(gate) * up]


ADD_RMS_NORM = Spec(
    name="add_rms_norm",
    shape=BlockShape,
    variants={
        FusedVariant.FUSED: Variant(
            lambda problem, _: add_rms_norm(problem.x, problem.delta, problem.weight, _EPS),
            limits={"dim": Limit(multiple_of=8)},
        ),
        FusedVariant.SEPARATE: Variant(_separate_norm, Kind.STEPS, ANYWHERE),
    },
    reference=FusedVariant.SEPARATE,
    defaults=(Default(FusedVariant.FUSED, GPUS),),
    problem=NormProblem,
    checked=(BlockShape(3, 1032), BlockShape(1, 64), BlockShape(2, 8192)),
    surveyed={"dim 4096": BlockShape(8, 4096)},
)

SWIGLU = Spec(
    name="swiglu",
    shape=BlockShape,
    variants={
        FusedVariant.FUSED: Variant(
            lambda problem, _: [swiglu_joined(problem.both)],
            limits={"dim": Limit(multiple_of=8)},
        ),
        FusedVariant.SEPARATE: Variant(_separate_gate, Kind.STEPS, ANYWHERE),
    },
    reference=FusedVariant.SEPARATE,
    defaults=(Default(FusedVariant.FUSED, GPUS),),
    problem=GateProblem,
    checked=(BlockShape(3, 1032), BlockShape(1, 8)),
    surveyed={"dim 12288": BlockShape(8, 12288)},
)
