"""Products with affine-quantised weights, for the few rows of a decode step.

MLX's own quantised matmul on CUDA reads the weights far below the memory's speed between 2 rows and
some hundred. The kernels here read each weight once for up to 32 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, TemplateValue, _text

_INPUTS = ("x", "w", "scales", "biases")


class _FragmentKernel(GpuKernel):
    """A kernel whose text uses the matrix units."""

    def _arguments(self, prelude: str) -> dict[str, Any]:
        arguments = super()._arguments(prelude)
        return arguments | {"header": arguments["header"] + _text(f"{prelude}_fragments")}


_rows_kernel = GpuKernel("quantized_matmul", inputs=_INPUTS, outputs=("output",))
_matrix_kernel = _FragmentKernel("quantized_matmul_matrix", inputs=_INPUTS, outputs=("output",))

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_BITS = (4, 8)
_GROUP_SIZES = (32, 64, 128)
_MAX_ROW_TILE = 16  # of the rows kernel: each row has a sum per column in every lane


class RowsSettings(NamedTuple):
    """What may be tuned in the "rows" variant; results differ by rounding only."""

    columns: int = 4  # of the result, in one simdgroup; a power of two
    simdgroups: int = 4  # of a threadgroup, which share K
    depth: int = 2  # words of each column under way in a lane


class MatrixSettings(NamedTuple):
    """What may be tuned in the "matrix" variant; results differ by rounding only."""

    tiles: int = 2  # of 16 columns of the result, in one simdgroup
    simdgroups: int = 8  # of a threadgroup, which share K; more would not find registers
    depth: int = 2  # quantisation groups of each column under way in a lane


def quantized_matmul(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> mx.array:
    """x @ W^T, where W is quantised in MLX's affine mode, by the variant for this shape.

    Args:
        x: (M, K) float32, float16 or bfloat16
        w: (N, K * bits / 32) uint32
        scales: (N, K / group_size) in the dtype of ``x``
        biases: like ``scales``

    Returns:
        (M, N) in the dtype of ``x``.
    """
    name = choose(
        x.shape[0], w.shape[0], x.shape[1], bits, group_size, (x.dtype, scales.dtype), _device()
    )
    return VARIANTS[name](x, w, scales, biases, group_size, bits)


@lru_cache(maxsize=4096)
def choose(
    rows: int,
    columns: int,
    inputs: int,
    bits: int,
    group_size: int,
    dtypes: tuple[mx.Dtype, mx.Dtype],
    device: str,
) -> str:
    """The name in ``VARIANTS`` for an (rows, inputs) x and a (columns, inputs) W.

    The limits stand for measurements on an H200; one row is what MLX's own kernel is made for.

    Args:
        dtypes: of x, and of the scales.
        device: "metal", "cuda" or "cpu"; "cuda-old" is without matrix units for bfloat16.
    """
    if not device.startswith("cuda") or not supports(columns, inputs, bits, group_size, dtypes):
        return "mlx"
    if rows == 1:
        return "mlx"
    if device == "cuda" and dtypes[0] != mx.float32:
        return "matrix" if rows <= 128 else "mlx"
    return "rows" if rows <= 64 else "mlx"


def supports(
    columns: int, inputs: int, bits: int, group_size: int, dtypes: tuple[mx.Dtype, mx.Dtype]
) -> bool:
    """Whether the kernels can multiply by such a (columns, inputs) matrix.

    The "matrix" variant does not take float32 on CUDA.
    """
    return (
        bits in _BITS
        and group_size in _GROUP_SIZES
        and inputs % group_size == 0
        and dtypes[0] in _DTYPES
        and dtypes[0] == dtypes[1]
        # MLX puts smaller arrays where a pointer cannot reach them on Metal.
        and columns * inputs * bits // 32 >= 8
    )


def _device() -> str:
    return "cpu" if mx.default_device() == mx.cpu else _gpu()


@cache
def _gpu() -> str:
    if mx.metal.is_available():
        return "metal"
    return "cuda" if int(mx.device_info()["compute_capability_major"]) >= 8 else "cuda-old"


def rows_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    settings: RowsSettings | None = None,
) -> mx.array:
    """:func:`quantized_matmul` by plain multiply-adds in float32."""
    rows, columns = x.shape[0], w.shape[0]
    row_tile = min(_MAX_ROW_TILE, 1 << (rows - 1).bit_length())
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
    """:func:`quantized_matmul` by matrix units, with products exact and sums in float32."""
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
    """:func:`quantized_matmul` by MLX's own."""
    return mx.quantized_matmul(x, w, scales, biases, group_size=group_size, bits=bits)


def dequantize_matmul(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """:func:`quantized_matmul` after writing out all of W: the same cost for any number of rows."""
    return x @ mx.dequantize(w, scales, biases, group_size=group_size, bits=bits).T


VARIANTS: dict[str, Callable[..., mx.array]] = {
    "matrix": matrix_matmul,
    "rows": rows_matmul,
    "mlx": mlx_matmul,
    "dequantize": dequantize_matmul,
}


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
