"""Quantised linears over flattened rows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from quire.kernels.linear import quantized_matmul


class FlatQuantizedLinear(nn.QuantizedLinear):
    """Takes all rows as one matrix, where the model passes (T, 1, K).

    MLX's CUDA backend takes the number of rows from the second-last axis: T products of one row
    each read the weights T times, 17 times slower at 2,048 rows. On the CPU, too, the variants that
    unpack the weights once for many rows need to see the rows.
    """

    def __call__(self, x: mx.array) -> mx.array:
        output = _multiply(self, x)
        return output + self["bias"] if "bias" in self else output


class FlatQuantizedEmbedding(nn.QuantizedEmbedding):
    """The same where the embedding is the head too."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _multiply(self, x)


def flatten_quantized_linears(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = FlatQuantizedLinear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = FlatQuantizedEmbedding


def flat_product(
    rows: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    bits: int,
    group_size: int,
    mode: str,
) -> mx.array:
    """(T, inputs) times a quantised (outputs, inputs) matrix, transposed, as a layer keeps it."""
    if mode == "affine":
        assert biases is not None, "affine weights have biases"
        return quantized_matmul(rows, weight, scales, biases, group_size=group_size, bits=bits)
    return mx.quantized_matmul(
        rows, weight, scales, biases, group_size=group_size, bits=bits, mode=mode
    )


def _multiply(layer: Any, x: mx.array) -> mx.array:
    product = flat_product(
        x.reshape(-1, x.shape[-1]),
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        bits=layer.bits,
        group_size=layer.group_size,
        mode=layer.mode,
    )
    return product.reshape(*x.shape[:-1], product.shape[-1])
