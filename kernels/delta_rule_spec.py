"""The gated delta rule over a step's rows, with states in slots."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import mlx.core as mx

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
from quire.kernels.delta_rule import delta_rule, delta_rule_steps
from quire.kernels.delta_steps import DeltaRows, Gates, row_by_row
from quire.kernels.recurrent_problem import RecurrentProblem, tuned_shapes
from quire.kernels.scan_settings import LANES, SIMDGROUPS, ScanSettings


class DeltaVariant(Enum):
    IN_PLACE = "in_place"
    STEPS = "steps"


class DeltaShape(NamedTuple):
    rows: int
    sequences: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    per_channel: bool = False  # a gate for each key channel, not for each head
    raw: bool = False  # gates and factors are computed too

    @classmethod
    def of(cls, rows: DeltaRows, sequences: int) -> DeltaShape:
        key_heads, key_dim = rows.k.shape[1:]
        return cls(
            rows.q.shape[0],
            sequences,
            key_heads,
            rows.v.shape[1],
            key_dim,
            rows.v.shape[2],
            rows.g.ndim == 3,
            rows.gates is not None,
        )

    def bucket(self) -> DeltaShape:
        return self._replace(rows=round_up(self.rows), sequences=round_up(self.sequences))


class DeltaProblem(RecurrentProblem):
    def __init__(self, shape: DeltaShape, dtype: mx.Dtype, seed: int, ragged: bool = False) -> None:
        super().__init__(shape.rows, min(shape.rows, shape.sequences), seed=seed, ragged=ragged)
        keys = mx.random.split(mx.random.key(seed), 6)
        size = (shape.rows, shape.key_heads, shape.key_dim)
        q, k = (normal(size, mx.float32, key) for key in keys[:2])
        q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        heads = (shape.rows, shape.value_heads)
        gates = (*heads, shape.key_dim) if shape.per_channel else heads
        drawn = normal(gates, mx.float32, keys[3])
        if shape.raw:
            drawn = drawn.astype(dtype)
            factors = normal(heads, dtype, keys[4])
            layer = [mx.linspace(-2.0, 2.0, shape.value_heads), mx.ones(shape.value_heads, dtype)]
        else:
            drawn = mx.exp(-mx.exp(drawn))
            factors, layer = mx.random.uniform(shape=heads, key=keys[4]).astype(dtype), []
        self.keep(
            [
                (q * shape.key_dim**-0.5).astype(dtype),
                k.astype(dtype),
                normal((*heads, shape.value_dim), dtype, keys[2]),
                *(drawn, factors, *layer),
            ],
            normal(
                (self.num_slots, shape.value_heads, shape.value_dim, shape.key_dim),
                mx.float32,
                keys[5],
            ),
        )
        self.share = shape.value_heads // shape.key_heads
        self.num_bytes += self.rows[2].nbytes

    @property
    def delta_rows(self) -> DeltaRows:
        gates = Gates(*self.rows[5:]) if len(self.rows) > 5 else None
        return DeltaRows.of(self.rows[:5], gates)

    def expected(self) -> list[Float64Array]:
        """Gates rounded as mlx-lm rounds them: a step in a sum is a change of all that is kept."""
        q, k, v, g, beta = to_float64(self.delta_rows.gated()[:5])
        q, k = (x.repeat(self.share, axis=1)[:, :, None] for x in (q, k))
        g = g[..., None, None] if g.ndim == 2 else g[:, :, None]

        def step(state: Float64Array, t: int) -> tuple[Float64Array, Float64Array]:
            state = state * g[t]
            delta = (v[t] - (state * k[t]).sum(-1)) * beta[t][:, None]
            state = state + delta[..., None] * k[t]
            return state, (state * q[t]).sum(-1)

        return self.row_by_row(v, step)


def _in_place(problem: DeltaProblem, settings: Settings) -> list[mx.array]:
    rows, chosen = problem.delta_rows, ScanSettings(**settings)
    y, fence = delta_rule(rows, problem.pool, problem.segments, problem.fence, chosen)
    return problem.written([y], fence)


def _steps(problem: DeltaProblem, settings: Settings) -> list[mx.array]:
    y = delta_rule_steps(problem.delta_rows, problem.stepped, problem.segments)
    return problem.stepped_over([y])


def _row_by_row(problem: DeltaProblem, settings: Settings) -> list[mx.array]:
    y = delta_rule_steps(problem.delta_rows, problem.stepped, problem.segments, many=row_by_row)
    return problem.stepped_over([y])


# Qwen3.5 4B and 9B.
_COMMON = DeltaShape(16, 16, 16, 32, 128, 128, raw=True)


DELTA_RULE = Spec(
    name="delta_rule",
    shape=DeltaShape,
    variants={
        DeltaVariant.IN_PLACE: Variant(
            _in_place,
            limits={
                "key_dim": Limit(min=32, max=512, multiple_of=32),
                "value_dim": Limit(multiple_of=8),
            },
            settings={"lanes": LANES, "simdgroups": SIMDGROUPS},
        ),
        DeltaVariant.STEPS: Variant(_steps, Kind.STEPS, ANYWHERE),
    },
    reference=DeltaVariant.STEPS,
    defaults=(Default(DeltaVariant.IN_PLACE, GPUS),),
    problem=DeltaProblem,
    checked=(
        DeltaShape(43, 5, 2, 4, 128, 24),
        DeltaShape(4, 4, 1, 2, 64, 16, per_channel=True),
        DeltaShape(40, 2, 1, 1, 192, 8),
        DeltaShape(43, 5, 2, 4, 64, 24, raw=True),
    ),
    surveyed={
        "Qwen3.5 4B and 9B": _COMMON,
        "Qwen3.5 9B, 64 rows": _COMMON._replace(rows=64, sequences=64),
        "Qwen3.5 27B": _COMMON._replace(value_heads=48),
        "a prompt of Qwen3.5 9B": _COMMON._replace(rows=512, sequences=1),
        "Kimi Linear 48B": DeltaShape(16, 16, 32, 32, 128, 128, per_channel=True),
        "OLMo hybrid 7B": DeltaShape(16, 16, 30, 30, 96, 192),
    },
    tuned=tuned_shapes(_COMMON),
    group=Group.STATES,
    # As mlx-lm does where its kernel does not run.
    baselines={"row by row": _row_by_row},
)
