"""(rows, dim) times a dense (outputs, dim) matrix, transposed."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Float64Array, Problem, normal, to_float64
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.choice.spec import (
    ANYWHERE,
    HALF,
    Default,
    Kind,
    Limit,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.matmul import SkinnySettings, skinny_matmul


class MatmulVariant(Enum):
    SKINNY = "skinny"
    MLX = "mlx"


class DenseShape(NamedTuple):
    rows: int
    outputs: int
    dim: int

    def bucket(self) -> DenseShape:
        return DenseShape(round_up(self.rows), round_up(self.outputs), self.dim)


class DenseProblem(Problem):
    waits = "x"

    def __init__(self, shape: DenseShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        random = mx.random.split(mx.random.key(seed), 3)
        self.x = normal((shape.rows, shape.dim), dtype, random[0])
        self.weight = normal((shape.outputs, shape.dim), dtype, random[1])
        self.transposed = self.weight.T
        self.bias = normal((shape.outputs,), dtype, random[2])
        mx.eval(self.transposed)
        self.flops = 2 * shape.rows * shape.outputs * shape.dim
        self.num_bytes = (
            self.weight.nbytes + self.x.nbytes + shape.rows * shape.outputs * dtype.size
        )

    def expected(self) -> list[Float64Array]:
        rows, values, bias = to_float64([self.x, self.weight, self.bias])
        return [rows @ values.T + bias]


def run_dense(
    variant: MatmulVariant,
    settings: Settings,
    x: mx.array,
    weight: mx.array,
    transposed: mx.array,
    bias: mx.array | None,
) -> mx.array:
    """:func:`quire.kernels.linear.matmul` by one variant; without settings it takes its own."""
    if variant is MatmulVariant.MLX:
        return x @ transposed if bias is None else mx.addmm(bias, x, transposed)
    product = skinny_matmul(x, weight, SkinnySettings(**settings) if settings else None)
    return product if bias is None else product + bias


def _run(variant: MatmulVariant, problem: DenseProblem, settings: Settings) -> list[mx.array]:
    arrays = problem.x, problem.weight, problem.transposed, problem.bias
    return [run_dense(variant, settings, *arrays)]


def _tuned(sizes: ModelSizes, device: DeviceName, block_size: int) -> Iterator[DenseShape]:
    """Of a fused block, where projections of the same input are one."""
    if sizes.bits is not None and not sizes.dense:
        return
    matrices = [(2 * sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate)]
    if (heads := sizes.attention) is not None:
        keys_and_values = heads.kv_heads * (heads.key_dim + heads.value_dim)
        matrices += [
            (heads.heads * heads.key_dim + keys_and_values, sizes.hidden),
            (sizes.hidden, heads.heads * heads.value_dim),
        ]
    for outputs, dim in dict.fromkeys(matrices):
        for rows in (1, 8) if device == "cpu" else (1, 8, 16, 32, 64):
            yield DenseShape(rows, outputs, dim)


def _small(rows: int, outputs: int, dim: int) -> Default[MatmulVariant]:
    return Default(
        MatmulVariant.SKINNY,
        ("cuda",),
        {"rows": Limit(min=2, max=rows), "outputs": Limit(max=outputs), "dim": Limit(max=dim)},
    )


MATMUL = Spec(
    name="matmul",
    shape=DenseShape,
    variants={
        MatmulVariant.SKINNY: Variant(
            partial(_run, MatmulVariant.SKINNY),
            dtypes=HALF,
            limits={"dim": Limit(multiple_of=32)},
            settings={
                "tiles": (1, 2, 4),
                "simdgroups": (4, 8, 16),
                "depth": (2, 4),
            },
        ),
        MatmulVariant.MLX: Variant(partial(_run, MatmulVariant.MLX), Kind.STEPS, ANYWHERE),
    },
    reference=MatmulVariant.MLX,
    # On an H200, bfloat16, us by `quire bench kernels --op matmul`, skinny and mlx: 4096 x 4096 at
    # 4 and 16 rows 13.0 and 13.9, 17.0 and 17.6. GPU time alone by CUPTI: 1024 x 3072 at 8, 16 and
    # 64 rows 5.2, 5.7 and 13.0, 7.3, 7.4 and 7.1. Steps of such small matrices wait for the host,
    # whose time for a launch is less than for a product of cuBLASLt. Large matrices are faster
    # there.
    defaults=(_small(16, 4096, 4096), _small(64, 8192, 3072)),
    problem=DenseProblem,
    checked=(DenseShape(17, 200, 1056), DenseShape(1, 72, 32), DenseShape(64, 40, 320)),
    surveyed={"dim 4096": DenseShape(16, 4096, 4096)},
    tuned=_tuned,
)
