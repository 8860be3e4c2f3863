"""Products with affine-quantised weights, for the few rows of a decode step.

MLX's own quantised matmul on CUDA reads the weights far below the memory's speed up to some hundred
rows. The kernels here read each weight once for up to 32 rows.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, TemplateValue
from quire.kernels.padding import round_up_to_power_of_two

_INPUTS = ("x", "w", "scales", "biases")


_rows_kernel = GpuKernel("quantized_matmul", _INPUTS, ("output",), headers=("reduce_scatter",))
_matrix_kernel = GpuKernel(
    "quantized_matmul_matrix",
    _INPUTS,
    ("output",),
    headers=("fragments", "quantized_fragments", "quantized_product", "tile_sums"),
)

_CPU_PIECE = 1 << 19  # weights
_MAX_ROW_TILE = 16  # of the rows kernel: each row has a sum per column in every lane


class RowsSettings(NamedTuple):
    """What may be tuned in :func:`rows_matmul`; results differ by rounding only."""

    columns: int = 4  # of the result, in one simdgroup; a power of two
    simdgroups: int = 4  # of a threadgroup, which share K
    depth: int = 2  # words of each column under way in a lane


class MatrixSettings(NamedTuple):
    """What may be tuned in :func:`matrix_matmul`; results differ by rounding only."""

    tiles: int = 2  # of 16 columns of the result, in one simdgroup
    simdgroups: int = 8  # of a threadgroup, which share K; more would not find registers
    depth: int = 2  # quantisation groups of each column under way in a lane


def rows_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    settings: RowsSettings | None = None,
) -> mx.array:
    """:func:`quire.kernels.linear.quantized_matmul` by plain multiply-adds in float32."""
    rows, columns = x.shape[0], w.shape[0]
    row_tile = min(_MAX_ROW_TILE, round_up_to_power_of_two(rows))
    settings = settings or RowsSettings()
    return _run(
        _rows_kernel,
        (x, w, scales, biases),
        {
            "T": x.dtype,
            "BITS": bits,
            "GROUP": group_size,
            "ROWS": row_tile,
            "COLUMNS": settings.columns,
            "SIMDGROUPS": settings.simdgroups,
            "DEPTH": settings.depth,
        },
        threadgroups=-(-rows // row_tile) * -(-columns // settings.columns),
        simdgroups=settings.simdgroups,
    )


def matrix_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    settings: MatrixSettings | None = None,
) -> mx.array:
    """The same product by matrix units, with products exact and sums in float32."""
    rows, columns = x.shape[0], w.shape[0]
    input_tiles = min(4, -(-rows // 8))
    settings = settings or _matrix_settings(columns, input_tiles)
    return _run(
        _matrix_kernel,
        (x, w, scales, biases),
        {
            "T": x.dtype,
            "BITS": bits,
            "GROUP": group_size,
            "TILES": settings.tiles,
            "INPUT_TILES": input_tiles,
            "SIMDGROUPS": settings.simdgroups,
            "DEPTH": settings.depth,
        },
        threadgroups=-(-rows // (8 * input_tiles)) * -(-columns // (16 * settings.tiles)),
        simdgroups=settings.simdgroups,
    )


def _matrix_settings(columns: int, input_tiles: int) -> MatrixSettings:
    """Wider tiles read x less often, as long as there are enough of them to fill the device."""
    if columns <= 2048:
        return MatrixSettings(tiles=1, simdgroups=8, depth=4)
    if columns <= 8192 or input_tiles > 2:
        return MatrixSettings(tiles=2, simdgroups=8, depth=2)
    return MatrixSettings(tiles=4, simdgroups=4, depth=2)


def mlx_matmul(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """The same product by MLX's own."""
    return mx.quantized_matmul(x, w, scales, biases, group_size=group_size, bits=bits)


def dequantize_matmul(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """The same product after unpacking W: the same cost for any number of rows."""
    columns, inputs = w.shape[0], x.shape[1]
    # What the CPU unpacks is used while its cache has it, and takes no new memory each time.
    step = columns if mx.default_device() != mx.cpu else max(1, _CPU_PIECE // inputs)
    products: list[mx.array] = []
    for first in range(0, columns, step):
        piece = slice(first, first + step)
        # Weights wait for nothing: MLX might unpack those of all layers before it uses any.
        packed = mx.depends(w[piece], products[-1] if products else x)
        dense = mx.dequantize(
            packed, scales[piece], biases[piece], group_size=group_size, bits=bits
        )
        products.append(x @ dense.T)
    return products[0] if len(products) == 1 else mx.concatenate(products, axis=1)


def _run(
    kernel: GpuKernel,
    inputs: tuple[mx.array, mx.array, mx.array, mx.array],
    template: dict[str, TemplateValue],
    threadgroups: int,
    simdgroups: int,
) -> mx.array:
    x, w = inputs[:2]
    return kernel(
        inputs,
        template=template,
        groups=(threadgroups, 1, 1),
        threads=32 * simdgroups,
        output_shapes=[(x.shape[0], w.shape[0])],
        output_dtypes=[x.dtype],
    )[0]
