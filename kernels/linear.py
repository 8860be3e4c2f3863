"""Products with weight matrices, dense and quantised, by the variant for their shape."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.choice.selection import select
from quire.kernels.matmul_spec import MATMUL, DenseShape, MatmulVariant, run_dense
from quire.kernels.quantized_matmul_spec import (
    QUANTIZED_MATMUL,
    MatmulShape,
    QuantizedVariant,
    run_quantized,
)

_MIN_WORDS = 8  # MLX puts smaller arrays where a pointer cannot reach them on Metal


def matmul(
    x: mx.array, weight: mx.array, transposed: mx.array, bias: mx.array | None = None
) -> mx.array:
    """x @ W^T + bias, with sums in float32.

    Args:
        x: (M, K) float32, float16 or bfloat16
        weight: (N, K), row-contiguous
        transposed: (K, N) view of ``weight``, kept so that nobody makes one for each call
        bias: (N,)

    Returns:
        (M, N) in the dtype of ``x``; if that is not the weights', in MLX's common type.
    """
    if x.dtype != weight.dtype:
        return run_dense(MatmulVariant.MLX, {}, x, weight, transposed, bias)
    shape = DenseShape(x.shape[0], weight.shape[0], x.shape[1])
    choice = select(MATMUL, shape, x.dtype)
    return run_dense(choice.variant, choice.settings, x, weight, transposed, bias)


def quantized_matmul(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> mx.array:
    """x @ W^T, where W is quantised in MLX's affine mode.

    Args:
        x: (M, K) float32, float16 or bfloat16
        w: (N, K * bits / 32) uint32
        scales: (N, K / group_size) in the dtype of ``x``
        biases: like ``scales``

    Returns:
        (M, N) in the dtype of ``x``.
    """
    matrix = w, scales, biases
    if x.dtype != scales.dtype or min(w.size, scales.size) < _MIN_WORDS:
        return run_quantized(QuantizedVariant.MLX, {}, x, matrix, group_size, bits)
    shape = MatmulShape(x.shape[0], w.shape[0], x.shape[1], bits, group_size)
    choice = select(QUANTIZED_MATMUL, shape, x.dtype)
    return run_quantized(choice.variant, choice.settings, x, matrix, group_size, bits)


def quantized_matmul_by_head(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """x @ W^T for each head: by MLX's own product, or over weights unpacked once for all rows where
    that is chosen for one such matrix.

    Args:
        x: (heads, M, K) float32, float16 or bfloat16
        w: (heads, N, K * bits / 32) uint32
        scales, biases: (heads, N, K / group_size), as ``mode`` has them

    Returns:
        (heads, M, N) in the dtype of ``x``; if that is not the scales', in MLX's common type.
    """
    if mode == "affine" and x.dtype == scales.dtype:
        shape = MatmulShape(x.shape[1], w.shape[1], x.shape[2], bits, group_size)
        choice = select(QUANTIZED_MATMUL, shape, x.dtype)
        if choice.variant is QuantizedVariant.DEQUANTIZE:
            dense = mx.dequantize(w, scales, biases, group_size=group_size, bits=bits)
            return x @ dense.swapaxes(1, 2)
    return mx.quantized_matmul(x, w, scales, biases, group_size=group_size, bits=bits, mode=mode)
