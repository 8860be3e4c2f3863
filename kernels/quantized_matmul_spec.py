"""(rows, inputs) times an affine-quantised (outputs, inputs) matrix, transposed."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

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
from quire.kernels.quantized_matmul import (
    MatrixSettings,
    RowsSettings,
    dequantize_matmul,
    matrix_matmul,
    mlx_matmul,
    rows_matmul,
)


class QuantizedVariant(Enum):
    MATRIX = "matrix"  # sums in matrix units; CUDA's do not take float32
    ROWS = "rows"
    MLX = "mlx"
    DEQUANTIZE = "dequantize"


class MatmulShape(NamedTuple):
    rows: int
    outputs: int
    inputs: int
    bits: int
    group_size: int

    def bucket(self) -> MatmulShape:
        sizes = round_up(self.rows), round_up(self.outputs), round_up(self.inputs)
        return MatmulShape(*sizes, *self[3:])


class QuantizedProblem(Problem):
    waits = "x"

    def __init__(self, shape: MatmulShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        self.shape = shape
        random = mx.random.split(mx.random.key(seed), 2)
        self.x = normal((shape.rows, shape.inputs), dtype, random[0])
        weight = normal((shape.outputs, shape.inputs), dtype, random[1])
        self.matrix = mx.quantize(weight, group_size=shape.group_size, bits=shape.bits)
        mx.eval(self.matrix)
        self.flops = 2 * shape.rows * shape.outputs * shape.inputs
        self.num_bytes = sum(array.nbytes for array in self.matrix) + self.x.nbytes
        self.num_bytes += shape.rows * shape.outputs * dtype.size

    def expected(self) -> list[Float64Array]:
        shape, (packed, scales, biases) = self.shape, self.matrix
        codes = unpack(np.array(packed), shape.bits).reshape(shape.outputs, -1, shape.group_size)
        scale, bias, rows = to_float64([scales, biases, self.x])
        values = codes * scale[:, :, None] + bias[:, :, None]
        return [rows @ values.reshape(shape.outputs, -1).T]


def unpack(packed: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.int64]:
    """(N, words) to (N, words * 32 / bits) codes, which MLX packs without gaps from the lowest bit
    of each row's first word on."""
    stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(packed), -1, bits).astype(np.int64)
    values: npt.NDArray[np.int64] = (codes << np.arange(bits)).sum(axis=2)
    return values


def run_quantized(
    variant: QuantizedVariant,
    settings: Settings,
    x: mx.array,
    matrix: tuple[mx.array, mx.array, mx.array],
    group_size: int,
    bits: int,
) -> mx.array:
    """:func:`quire.kernels.linear.quantized_matmul` by one variant; without settings it takes its
    own."""
    given = (x, *matrix, group_size, bits)
    match variant:
        case QuantizedVariant.MATRIX:
            return matrix_matmul(*given, MatrixSettings(**settings) if settings else None)
        case QuantizedVariant.ROWS:
            return rows_matmul(*given, RowsSettings(**settings) if settings else None)
        case QuantizedVariant.MLX:
            return mlx_matmul(*given)
        case QuantizedVariant.DEQUANTIZE:
            return dequantize_matmul(*given)


def _run(
    variant: QuantizedVariant, problem: QuantizedProblem, settings: Settings
) -> list[mx.array]:
    shape = problem.shape
    matrix = problem.matrix
    return [run_quantized(variant, settings, problem.x, matrix, shape.group_size, shape.bits)]


def _tuned(sizes: ModelSizes, device: DeviceName, block_size: int) -> Iterator[MatmulShape]:
    if sizes.bits is None:
        return
    matrices = [
        (sizes.intermediate, sizes.hidden),
        (sizes.hidden, sizes.intermediate),
        (sizes.vocab, sizes.hidden),
    ]
    if (heads := sizes.attention) is not None:
        matrices += [
            (heads.heads * heads.key_dim, sizes.hidden),
            (heads.kv_heads * heads.key_dim, sizes.hidden),
            (sizes.hidden, heads.heads * heads.value_dim),
        ]
    for outputs, inputs in dict.fromkeys(matrices):
        on_cpu = (1, 8) if outputs == sizes.vocab else (1, 8, 64)
        for rows in on_cpu if device == "cpu" else (1, 2, 4, 8, 16, 32, 64, 256):
            yield MatmulShape(rows, outputs, inputs, sizes.bits, sizes.group_size)


_LIMITS = {"bits": Limit(values=(4, 8)), "group_size": Limit(values=(32, 64, 128))}

QUANTIZED_MATMUL = Spec(
    name="quantized_matmul",
    shape=MatmulShape,
    variants={
        QuantizedVariant.MATRIX: Variant(
            partial(_run, QuantizedVariant.MATRIX),
            dtypes=HALF,
            limits=_LIMITS,
            settings={
                "tiles": (1, 2, 4),
                "simdgroups": (4, 8),
                "depth": (2, 4),
            },
        ),
        QuantizedVariant.ROWS: Variant(
            partial(_run, QuantizedVariant.ROWS),
            limits=_LIMITS,
            settings={
                "columns": (4, 8),
                "simdgroups": (4, 8),
                "depth": (1, 2),
            },
        ),
        QuantizedVariant.MLX: Variant(partial(_run, QuantizedVariant.MLX), Kind.STEPS, ANYWHERE),
        QuantizedVariant.DEQUANTIZE: Variant(
            partial(_run, QuantizedVariant.DEQUANTIZE), Kind.STEPS, ANYWHERE
        ),
    },
    reference=QuantizedVariant.DEQUANTIZE,
    # All products of a Qwen3-8B 4-bit step on an H200, bfloat16, ms at 1, 4 and 16 rows: matrix
    # 3.1, 3.2 and 3.4, rows 3.4, 5.2 and 11.5, mlx 4.9, 17.2 and 14.1. At 2,048 rows a whole step
    # takes 64 ms with dequantize, 54 with weights never quantised; mlx multiplies them at a seventh
    # of the dense speed. One row by a matrix of 896 or 1,152 outputs, `quire bench kernels --op
    # matmul`, us at 4 and 8 bits: mlx 9 to 17 and 14 to 18, matrix 11 to 20 and 19.
    # MLX's CPU backend unpacks the matrix again for every row: on two x86-64 cores in float32
    # unpacking it once is 1.4 times as fast at 5 rows, 2 to 3 times at 8 and 8 to 18 from 64
    # on.
    defaults=(
        Default(
            QuantizedVariant.MLX, ("cuda",), {"rows": Limit(max=1), "outputs": Limit(max=2048)}
        ),
        Default(QuantizedVariant.MATRIX, ("cuda",), {"rows": Limit(max=128)}),
        Default(QuantizedVariant.ROWS, ("cuda",), {"rows": Limit(min=2, max=16)}),
        Default(QuantizedVariant.DEQUANTIZE, ("cuda",), {"rows": Limit(min=256)}),
        Default(QuantizedVariant.DEQUANTIZE, ("cpu",), {"rows": Limit(min=8)}),
        Default(QuantizedVariant.MLX, ANYWHERE),
    ),
    problem=QuantizedProblem,
    checked=(
        MatmulShape(1, 96, 256, 4, 64),
        MatmulShape(3, 72, 512, 8, 32),
        MatmulShape(17, 200, 256, 4, 128),
        MatmulShape(32, 64, 128, 4, 64),
    ),
    surveyed={
        f"{bits} bits, group_size {size}": MatmulShape(16, 4096, 4096, bits, size)
        for bits in (2, 3, 4, 5, 6, 8)
        for size in (32, 64, 128)
    },
    tuned=_tuned,
)
