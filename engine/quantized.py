"""Quantised linears over flattened rows."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class FlatQuantizedLinear(nn.QuantizedLinear):
    """Sees (1, T, K) where the model passes (T, 1, K).

    MLX's CUDA backend takes the number of rows from the second-last axis: T products of one row
    each read the weights T times, 17 times slower at 2,048 rows.
    """

    def __call__(self, x: mx.array) -> mx.array:
        output: mx.array = super().__call__(x.reshape(1, -1, x.shape[-1]))
        return output.reshape(*x.shape[:-1], output.shape[-1])


def flatten_quantized_linears(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = FlatQuantizedLinear
