"""Mamba-2's recurrence over a step's rows, with states in slots."""

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
from quire.kernels.recurrent_problem import RecurrentProblem, tuned_shapes
from quire.kernels.scan_settings import LANES, SIMDGROUPS, ScanSettings
from quire.kernels.ssm_scan import ssm_scan, ssm_scan_steps
from quire.kernels.ssm_steps import SsmLayer, SsmRows


class SsmVariant(Enum):
    IN_PLACE = "in_place"
    STEPS = "steps"


class SsmShape(NamedTuple):
    rows: int
    sequences: int
    groups: int
    heads: int
    head_dim: int
    state_dim: int

    @classmethod
    def of(cls, rows: SsmRows, sequences: int) -> SsmShape:
        num_rows, heads, head_dim = rows.x.shape
        groups, state_dim = rows.b.shape[1:]
        return cls(num_rows, sequences, groups, heads, head_dim, state_dim)

    def bucket(self) -> SsmShape:
        return self._replace(rows=round_up(self.rows), sequences=round_up(self.sequences))


class SsmProblem(RecurrentProblem):
    def __init__(self, shape: SsmShape, dtype: mx.Dtype, seed: int, ragged: bool = False) -> None:
        super().__init__(shape.rows, min(shape.rows, shape.sequences), seed=seed, ragged=ragged)
        keys = mx.random.split(mx.random.key(seed), 7)
        mixed = (shape.rows, shape.groups, shape.state_dim)
        heads = (shape.rows, shape.heads)
        self.layer = SsmLayer(
            mx.random.uniform(-1.0, 2.0, (shape.heads,), key=keys[0]),
            normal((shape.heads,), mx.float32, keys[1]).astype(dtype),
        )
        self.keep(
            [
                normal((*heads, shape.head_dim), dtype, keys[2]),
                normal(mixed, dtype, keys[3]),
                normal(mixed, dtype, keys[4]),
                mx.random.uniform(0.001, 0.5, heads, key=keys[5]),
            ],
            normal(
                (self.num_slots, shape.heads, shape.head_dim, shape.state_dim),
                mx.float32,
                keys[6],
            ),
        )
        self.share = shape.heads // shape.groups
        self.num_bytes += self.rows[0].nbytes

    def expected(self) -> list[Float64Array]:
        x, b, c, dt = to_float64(self.rows)
        b, c = (each.repeat(self.share, axis=1)[:, :, None] for each in (b, c))
        a_log, d = to_float64(self.layer)
        decay = np.exp(-np.exp(a_log) * dt)[..., None, None]

        def step(state: Float64Array, t: int) -> tuple[Float64Array, Float64Array]:
            state = state * decay[t] + (x[t] * dt[t][:, None])[..., None] * b[t]
            return state, (state * c[t]).sum(-1) + x[t] * d[:, None]

        return self.row_by_row(x, step)


def _in_place(problem: SsmProblem, settings: Settings) -> list[mx.array]:
    rows, chosen = SsmRows(*problem.rows), ScanSettings(**settings)
    y, fence = ssm_scan(rows, problem.layer, problem.pool, problem.segments, problem.fence, chosen)
    return problem.written([y], fence)


def _steps(problem: SsmProblem, settings: Settings) -> list[mx.array]:
    rows = SsmRows(*problem.rows)
    y = ssm_scan_steps(rows, problem.layer, problem.stepped, problem.segments)
    return problem.stepped_over([y])


# Nemotron 3 Nano 30B-A3B.
_COMMON = SsmShape(16, 16, 8, 64, 64, 128)


SSM_SCAN = Spec(
    name="ssm_scan",
    shape=SsmShape,
    variants={
        SsmVariant.IN_PLACE: Variant(
            _in_place,
            limits={
                "state_dim": Limit(min=32, max=512, multiple_of=32),
                "head_dim": Limit(multiple_of=8),
            },
            settings={"lanes": LANES, "simdgroups": SIMDGROUPS},
        ),
        SsmVariant.STEPS: Variant(_steps, Kind.STEPS, ANYWHERE),
    },
    reference=SsmVariant.STEPS,
    defaults=(Default(SsmVariant.IN_PLACE, GPUS),),
    problem=SsmProblem,
    checked=(
        SsmShape(43, 5, 2, 4, 24, 128),
        SsmShape(4, 4, 1, 2, 16, 64),
        SsmShape(40, 2, 1, 1, 8, 256),
    ),
    surveyed={
        "Nemotron 3 Nano 30B": _COMMON,
        "Nemotron 3 Nano 30B, 64 rows": _COMMON._replace(rows=64, sequences=64),
        "a prompt of Nemotron 3 Nano 30B": _COMMON._replace(rows=512, sequences=1),
        "Granite 4 H tiny": SsmShape(16, 16, 1, 48, 64, 128),
        "Falcon H1 7B": SsmShape(16, 16, 1, 24, 128, 256),
        "Mamba-Codestral 7B": SsmShape(16, 16, 8, 128, 64, 128),
    },
    tuned=tuned_shapes(_COMMON),
    group=Group.STATES,
)
