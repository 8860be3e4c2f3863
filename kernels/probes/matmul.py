"""Probes of products with quantised matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.choice.shapes import MatmulShape
from quire.kernels.probes.probe import Float64Array, Probe, normal, to_float64
from quire.kernels.quantized_matmul import VARIANTS, run_variant


def matmul_probe(shape: MatmulShape, dtype: mx.Dtype, seed: int) -> Probe:
    keys = mx.random.split(mx.random.key(seed), 2)
    x = normal((shape.rows, shape.inputs), dtype, keys[0])
    weight = normal((shape.outputs, shape.inputs), dtype, keys[1])
    packed, scales, biases = mx.quantize(weight, group_size=shape.group_size, bits=shape.bits)
    mx.eval(packed, scales, biases)
    del weight
    matrix = packed, scales, biases

    def run(variant: str, settings: Mapping[str, int]) -> list[mx.array]:
        return [run_variant(variant, settings, x, *matrix, shape.group_size, shape.bits)]

    def expected() -> list[Float64Array]:
        codes = _unpack(np.array(packed), shape.bits).reshape(shape.outputs, -1, shape.group_size)
        scale, bias, rows = to_float64([scales, biases, x])
        values = codes * scale[:, :, None] + bias[:, :, None]
        return [rows @ values.reshape(shape.outputs, -1).T]

    return Probe(
        {name: partial(run, name) for name in VARIANTS},
        expected,
        num_bytes=sum(array.nbytes for array in matrix) + x.nbytes,
    )


def _unpack(packed: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.int64]:
    """MLX packs codes without gaps from the lowest bit of each row's first word on."""
    stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(packed), -1, bits).astype(np.int64)
    values: npt.NDArray[np.int64] = (codes << np.arange(bits)).sum(axis=2)
    return values
