"""Probes of products with dense and quantised matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels import matmul, quantized_matmul
from quire.kernels.choice.shapes import DenseShape, MatmulShape
from quire.kernels.probes.probe import Float64Array, Probe, normal, to_float64


def dense_probe(shape: DenseShape, dtype: mx.Dtype, seed: int) -> Probe:
    keys = mx.random.split(mx.random.key(seed), 2)
    x = normal((shape.rows, shape.dim), dtype, keys[0])
    weight = normal((shape.outputs, shape.dim), dtype, keys[1])
    transposed = weight.T
    mx.eval(transposed)

    def run(variant: str, settings: Mapping[str, int]) -> list[mx.array]:
        return [matmul.run_variant(variant, settings, x, weight, transposed)]

    def expected() -> list[Float64Array]:
        rows, values = to_float64([x, weight])
        return [rows @ values.T]

    return Probe(
        {name: partial(run, name) for name in matmul.VARIANTS},
        expected,
        num_bytes=weight.nbytes + x.nbytes,
    )


def matmul_probe(shape: MatmulShape, dtype: mx.Dtype, seed: int) -> Probe:
    keys = mx.random.split(mx.random.key(seed), 2)
    x = normal((shape.rows, shape.inputs), dtype, keys[0])
    weight = normal((shape.outputs, shape.inputs), dtype, keys[1])
    packed, scales, biases = mx.quantize(weight, group_size=shape.group_size, bits=shape.bits)
    mx.eval(packed, scales, biases)
    del weight
    matrix = packed, scales, biases

    def run(variant: str, settings: Mapping[str, int]) -> list[mx.array]:
        product = quantized_matmul.run_variant(
            variant, settings, x, *matrix, shape.group_size, shape.bits
        )
        return [product]

    def expected() -> list[Float64Array]:
        codes = _unpack(np.array(packed), shape.bits).reshape(shape.outputs, -1, shape.group_size)
        scale, bias, rows = to_float64([scales, biases, x])
        values = codes * scale[:, :, None] + bias[:, :, None]
        return [rows @ values.reshape(shape.outputs, -1).T]

    return Probe(
        {name: partial(run, name) for name in quantized_matmul.VARIANTS},
        expected,
        num_bytes=sum(array.nbytes for array in matrix) + x.nbytes,
    )


def _unpack(packed: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.int64]:
    """MLX packs codes without gaps from the lowest bit of each row's first word on."""
    stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(packed), -1, bits).astype(np.int64)
    values: npt.NDArray[np.int64] = (codes << np.arange(bits)).sum(axis=2)
    return values
