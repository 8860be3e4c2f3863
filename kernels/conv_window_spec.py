"""Short convolutions over a step's rows, with tails in slots."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.choice.problem import Float64Array, normal, to_float64
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
from quire.kernels.conv_window import Convolution, QueryKeyHeads, conv_window, conv_window_steps
from quire.kernels.recurrent_problem import RecurrentProblem


class ConvVariant(Enum):
    IN_PLACE = "in_place"
    STEPS = "steps"


class ConvShape(NamedTuple):
    rows: int
    sequences: int
    channels: int
    width: int  # rows that a result is made of
    bias: bool = False
    silu: bool = True
    heads: int = 0  # of queries, and of keys, that are normed; the other channels are values
    dim: int = 0

    @classmethod
    def of(cls, x: mx.array, conv: Convolution, sequences: int) -> ConvShape:
        width = conv.weight.size // x.shape[1]
        heads, dim = conv.heads[:2] if conv.heads else (0, 0)
        bias = conv.bias is not None
        return cls(x.shape[0], sequences, x.shape[1], width, bias, conv.silu, heads, dim)

    def bucket(self) -> ConvShape:
        return self._replace(rows=round_up(self.rows), sequences=round_up(self.sequences))


class ConvProblem(RecurrentProblem):
    def __init__(self, shape: ConvShape, dtype: mx.Dtype, seed: int, ragged: bool = False) -> None:
        super().__init__(shape.rows, min(shape.rows, shape.sequences), seed=seed, ragged=ragged)
        keys = mx.random.split(mx.random.key(seed), 4)
        bias = normal((shape.channels,), dtype, keys[3]) if shape.bias else None
        weight = normal((shape.channels, shape.width, 1), dtype, keys[2])
        heads = QueryKeyHeads(shape.heads, shape.dim) if shape.heads else None
        self.conv = Convolution(weight, bias, shape.silu, heads)
        tail = (self.num_slots, shape.width - 1, shape.channels)
        self.keep(
            [normal((shape.rows, shape.channels), dtype, keys[0])], normal(tail, dtype, keys[1])
        )
        self.num_bytes += self.rows[0].nbytes + weight.nbytes

    def expected(self) -> list[Float64Array]:
        (x,) = to_float64(self.rows)
        weight, *bias = to_float64([each for each in self.conv[:2] if each is not None])
        pool, states = self.expected_states()
        y, row = np.empty_like(x), 0
        for length, state, target in zip(self.lengths, states, self.targets, strict=True):
            window = np.concatenate([state, x[row : row + length]])
            for i in range(length):
                seen = window[i : i + weight.shape[1]]
                y[row + i] = (seen * weight[:, :, 0].T).sum(0) + sum(bias)
            pool[target] = window[length:]
            row += length
        y = y / (1 + np.exp(-y)) if self.conv.silu else y
        if (heads := self.conv.heads) is None:
            return [y, pool]
        q, k, v = np.split(y, [heads.channels, 2 * heads.channels], axis=1)
        normed = []
        for part, scale in zip((q, k), heads.scales, strict=True):
            by_head = part.reshape(-1, heads.heads, heads.dim)
            square = (by_head**2).mean(-1, keepdims=True)
            normed.append(scale * by_head / np.sqrt(square + heads.rms_eps))
        return [*normed, v, pool]

    def parts(self, y: mx.array) -> list[mx.array]:
        heads = self.conv.heads
        return [y] if heads is None else list(heads.parts(y, self.rows[0].shape[0]))


def _in_place(problem: ConvProblem, settings: Settings) -> list[mx.array]:
    (x,) = problem.rows
    y, fence = conv_window(x, problem.conv, problem.pool, problem.segments, problem.fence)
    return problem.written(problem.parts(y), fence)


def _steps(problem: ConvProblem, settings: Settings) -> list[mx.array]:
    (x,) = problem.rows
    y = conv_window_steps(x, problem.conv, problem.stepped, problem.segments)
    return problem.stepped_over(problem.parts(y))


def _fits(shape: ConvShape, dtype: str) -> bool:
    """Heads are normed by the lanes that have them, in whole simdgroups."""
    lanes, in_pack = shape.dim * getattr(mx, dtype).size // 16, 16 // getattr(mx, dtype).size
    return not shape.heads or (
        lanes in (4, 8, 16, 32)
        and shape.dim % in_pack == 0
        and shape.channels % (32 * in_pack) == 0
    )


# Qwen3.5 4B and 9B.
_COMMON = ConvShape(16, 16, 8192, 4)

CONV_WINDOW = Spec(
    name="conv_window",
    shape=ConvShape,
    variants={
        ConvVariant.IN_PLACE: Variant(
            _in_place,
            limits={"channels": Limit(multiple_of=8), "width": Limit(min=2, max=4)},
            fits=_fits,
        ),
        ConvVariant.STEPS: Variant(_steps, Kind.STEPS, ANYWHERE),
    },
    reference=ConvVariant.STEPS,
    defaults=(Default(ConvVariant.IN_PLACE, GPUS),),
    problem=ConvProblem,
    checked=(
        ConvShape(43, 5, 40, 4),
        ConvShape(4, 4, 1040, 3, bias=True, silu=False),
        ConvShape(19, 2, 24, 2, bias=True),
        ConvShape(43, 5, 512, 4, heads=2, dim=64),
    ),
    surveyed={
        "Qwen3.5 4B and 9B": _COMMON,
        "Qwen3.5 9B, 64 rows": _COMMON._replace(rows=64, sequences=64),
        "Qwen3.5 4B and 9B, by head": _COMMON._replace(heads=16, dim=128),
        "a prompt of Qwen3.5 9B": _COMMON._replace(rows=512, sequences=1),
        "Nemotron 3 Nano 30B": ConvShape(16, 16, 6144, 4, bias=True),
        "LFM2.5 2.6B": ConvShape(16, 16, 2048, 3, silu=False),
    },
    group=Group.STATES,
)
